"""From examples to token tensors."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from lusifer.data.collate import AlignCollator, ContrastCollator, llm_preprocess, text_keys, tokenize
from support.batches import tokens

LONG = "a small house stood near the river in the green valley"


@pytest.fixture
def encoder_tokenizer(tiny_encoder):
    return AutoTokenizer.from_pretrained(tiny_encoder)


@pytest.fixture
def llm_tokenizer(tiny_llm):
    return AutoTokenizer.from_pretrained(tiny_llm)


def aligned(position, source, target):
    return {
        "role": "document",
        "task": "complete",
        "dataset": "d",
        "position": position,
        "source": source,
        "plain": source,
        "target": target,
    }


def contrasted(position, query, positive, *negatives):
    return {
        "task": "contrast", "dataset": "d", "position": position, "in_batch_negatives": False,
        "query": query, "plain_query": query, "positive": positive, "negatives": list(negatives),
        "document_instruction": None,
    }  # fmt: skip


def test_each_side_of_stage_1_has_its_own_tokenizer(encoder_tokenizer, llm_tokenizer):
    collator = AlignCollator(encoder_tokenizer, 64, llm_preprocess(llm_tokenizer, 5))
    rows = [aligned(6, "the cat sat on the mat", LONG), aligned(7, "rain", "cat")]
    batch = collator(rows)
    assert set(batch) == {"source", "target", "positions", "task", "dataset"}
    assert (batch["task"], batch["dataset"], batch["positions"].tolist()) == ("complete", "d", [6, 7])
    for row, example in enumerate(rows):
        expected = encoder_tokenizer(example["source"])["input_ids"]
        mask = batch["source"]["attention_mask"][row].bool()
        assert batch["source"]["input_ids"][row][mask].tolist() == expected
    assert batch["target"]["input_ids"].shape == batch["target"]["attention_mask"].shape == (2, 5)
    # No special tokens in targets, padding on the right.
    target = llm_tokenizer("cat", add_special_tokens=False)["input_ids"]
    assert batch["target"]["input_ids"][1, : len(target)].tolist() == target
    assert batch["target"]["attention_mask"][1].tolist() == [1] * len(target) + [0] * (5 - len(target))
    assert batch["source"]["input_ids"].dtype == batch["positions"].dtype == torch.int64


def test_an_llm_tokenizer_without_padding_token_gets_one(llm_tokenizer):
    llm_tokenizer.pad_token = None
    llm_tokenizer.padding_side = "left"
    made = llm_preprocess(llm_tokenizer, 8)(["the cat sat", "a"])
    assert made["attention_mask"][1, 0] == 1 and made["attention_mask"][1, -1] == 0


def test_truncation_keeps_the_special_tokens_at_both_ends(encoder_tokenizer):
    # The published loader cut the end-of-sequence token off long texts.
    whole = encoder_tokenizer(LONG)["input_ids"]
    assert len(whole) > 9
    cut = tokenize(encoder_tokenizer, [LONG, "rain"], 8)
    assert cut["input_ids"].shape[1] == 8
    first, last = encoder_tokenizer.bos_token_id, encoder_tokenizer.eos_token_id
    assert cut["input_ids"][0].tolist() == [first, *whole[1:7], last]
    short = cut["input_ids"][1][cut["attention_mask"][1].bool()].tolist()
    assert short[0] == first and short[-1] == last
    assert cut["attention_mask"][0].tolist() == [1] * 8


def test_padding_is_on_the_right_whatever_the_tokenizer_says(encoder_tokenizer):
    encoder_tokenizer.padding_side = "left"
    batch = tokenize(encoder_tokenizer, [LONG, "rain"], 64)
    assert batch["attention_mask"][1, 0] == 1 and batch["attention_mask"][1, -1] == 0


def test_texts_of_stage_2_are_stacked_column_by_column(encoder_tokenizer):
    rows = [contrasted(4, "cat", "dog", "rain", "sea"), contrasted(5, "train", LONG, "milk", "bread")]
    batch = ContrastCollator(encoder_tokenizer, 64)(rows)
    assert set(batch) == {
        "input_ids", "attention_mask", "keys", "columns", "in_batch_negatives", "positions", "task", "dataset",
    }  # fmt: skip
    assert batch["columns"] == 4 and batch["in_batch_negatives"] is False
    assert (batch["task"], batch["positions"].tolist()) == ("contrast", [4, 5])
    expected = ["cat", "train", "dog", LONG, "rain", "milk", "sea", "bread"]
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    for ids, mask, text in zip(batch["input_ids"], batch["attention_mask"], expected, strict=True):
        assert ids[mask.bool()].tolist() == encoder_tokenizer(text)["input_ids"]
    assert ContrastCollator(encoder_tokenizer, 64)([contrasted(0, "cat", "dog")])["columns"] == 2


def test_the_guide_sees_the_same_texts_in_the_same_order(encoder_tokenizer):
    seen = []

    def features(texts, roles):
        seen.append((texts, roles))
        return {"guide_ids": torch.zeros(len(texts), 2)}

    rows = [contrasted(0, "a", "b", "c"), contrasted(1, "d", "e", "f")]
    batch = ContrastCollator(encoder_tokenizer, 64, features, {"query": "the "})(
        [{**row, "query": f"Find it: {row['query']}"} for row in rows]
    )
    assert seen == [(["a", "d", "b", "e", "c", "f"], ["query"] * 2 + ["document"] * 4)]
    assert batch["guide"]["guide_ids"].shape == (6, 2)


def test_text_keys_ignore_padding_only():
    features = tokens([5, 9, 5])
    for name in features:
        features[name][2] = features[name][0]
    keys = text_keys(**features)
    assert keys[0] == keys[2] == text_keys(features["input_ids"][:1, :5], features["attention_mask"][:1, :5])
    assert keys[0] != keys[1]
    swapped = features["input_ids"][:1].clone()
    swapped[0, :2] = swapped[0, :2].flip(0)
    assert text_keys(swapped, features["attention_mask"][:1]) != keys[0]
    left = {name: tensor[:1, :5].roll(3) for name, tensor in features.items()}
    assert text_keys(**left) != keys[0]
    wide = torch.nn.functional.pad(features["input_ids"][:1, :5], (4, 0)), torch.tensor([[0] * 4 + [1] * 5])
    assert text_keys(*wide) == keys[0]


def test_keys_are_those_of_the_texts_alone(encoder_tokenizer):
    plain = ContrastCollator(encoder_tokenizer, 8)
    prompted = ContrastCollator(encoder_tokenizer, 8, prompts={"query": "the ", "document": "a "})
    rows = [contrasted(0, "cat", "dog", LONG + " rain"), contrasted(1, "dog", "sea", LONG + " milk")]
    keys = plain(rows)["keys"]
    assert keys.dtype == torch.int64 and keys.shape == (6,)
    assert keys[1] == keys[2] and len(set(keys.tolist())) == 4  # What differs behind the last token read is the same.
    instructed = [{**row, "query": f"Find it: {row['query']}"} for row in rows]
    for collator, others in ((plain, instructed), (prompted, rows), (prompted, instructed)):
        assert torch.equal(collator(others)["keys"], keys)


def test_the_tokenizer_is_called_once_for_a_batch(encoder_tokenizer):
    calls = []

    def tokenizer(texts, **kwargs):
        calls.append(len(texts))
        return encoder_tokenizer(texts, **kwargs)

    ContrastCollator(tokenizer, 64)([contrasted(i, "cat", "dog", "rain") for i in range(5)])
    assert calls == [15]


def test_instructions_are_read_and_compared_and_taught_without(encoder_tokenizer, llm_tokenizer):
    rows = [{**contrasted(k, f"q{k}", f"p{k}", "n"), "query": f"ask q{k}"} for k in range(2)]
    for row in rows:
        row["document_instruction"] = "Keep"
    taught = []

    def teach(texts, roles):
        taught.append(texts)
        return torch.zeros(len(texts), 2)

    batch = ContrastCollator(encoder_tokenizer, 64, teach=teach)(rows)
    texts = ["ask q0", "ask q1", *(f"Instruct: Keep\nQuery: {text}" for text in ("p0", "p1", "n", "n"))]
    expected = encoder_tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
    assert torch.equal(batch["input_ids"], expected)
    assert taught == [["q0", "q1", "p0", "p1", "n", "n"]]
    assert batch["keys"][4] == batch["keys"][5] != batch["keys"][2]
    row = {**aligned(0, "Instruct: Again\nQuery: rain", "rain"), "plain": "rain"}
    batch = AlignCollator(encoder_tokenizer, 64, llm_preprocess(llm_tokenizer, 5), teach=teach)([row, row])
    assert taught[1] == ["rain", "rain"]
    assert batch["source"]["input_ids"][0].tolist() == encoder_tokenizer(row["source"])["input_ids"]
