"""Code-switching: which pieces are words, which match, and what replacing them leaves."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lusifer.adapt import switching
from lusifer.adapt.switching import Pairs, Switcher, foreign_pieces, match_scripts, script_of
from lusifer.adapt.tokens import batches_by_length, count_words, tokenize


def tokenizer_of(words):
    vocabulary = {token: index for index, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


@pytest.mark.parametrize(
    ("word", "script"),
    [
        ("Haus", "LATIN"),
        ("नदी", "DEVANAGARI"),
        ("నీటి", "TELUGU"),
        ("水", "CJK"),
        ("食べる", "KANA"),
        ("l'eau", "LATIN"),
        ("Hausдом", None),
        ("12", None),
        ("!", None),
    ],
)
def test_script(word, script):
    assert script_of(word) == script


def test_whole_words_that_are_not_english(monkeypatch):
    monkeypatch.setattr(switching, "_LEAST_PIECES", 1)
    words = ["▁water", "▁Wasser", "asser", "▁a", "▁вода", "вод", "水", "▁水", "12", "▁eau"]
    pieces = foreign_pieces(tokenizer_of(words), {"water", "a"})
    names = {script: [words[index - 4] for index in ids] for script, ids in pieces.items()}
    assert names == {"LATIN": ["▁Wasser", "▁eau"], "CYRILLIC": ["▁вода"], "CJK": ["水", "▁水"]}
    fewer = foreign_pieces(tokenizer_of(words), {"water", "a"}, most=2)
    assert sum(map(len, fewer.values())) == 2


def test_a_vocabulary_without_word_marks_gives_nothing():
    assert foreign_pieces(tokenizer_of([f"w{number}" for number in range(200)]), set()) == {}


def test_planted_translations_are_matched(monkeypatch):
    monkeypatch.setattr(switching, "_LEAST_PAIRS", 10)
    generator = torch.Generator().manual_seed(0)
    english = torch.randn(80, 16, generator=generator)
    order = torch.randperm(80, generator=generator)
    # A script lies elsewhere than English, as a whole, and its words are noisy copies.
    foreign = english[order] + 5 + 0.3 * torch.randn(80, 16, generator=generator)
    pieces = {"GREEK": list(range(1_000, 1_080))}
    pairs = match_scripts({"GREEK": foreign}, english, pieces)["GREEK"]
    right = (order[pairs.pieces - 1_000] == pairs.words).float()
    assert set(pairs.words[right.bool()].tolist()) == set(range(80))  # Everybody's translation is among the matches.
    best = {}
    for word, piece in zip(pairs.words.tolist(), pairs.pieces.tolist(), strict=True):
        best.setdefault(word, piece)
    hits = sum(int(order[piece - 1_000]) == word for word, piece in best.items())
    assert hits >= 78  # The first of a word's matches is its best.


def marked(text, vocabulary):
    tokenizer = tokenizer_of(["▁the", "▁cat", "▁sat", "▁on", "▁mat", "▁Katze", "▁Matte"])
    return tokenizer, tokenize(tokenizer, [text], [""], vocabulary, max_length=16)


def test_words_are_replaced_and_the_rest_stays():
    tokenizer, texts = marked("the cat sat on the mat", ["cat", "mat"])
    ids, mask, words = texts.batch(torch.tensor([0]), 1, torch.device("cpu"))
    known = tokenizer.get_vocab()
    pairs = Pairs(torch.tensor([0, 1]), torch.tensor([known["▁Katze"], known["▁Matte"]]))
    switcher = Switcher({"LATIN": pairs}, torch.device("cpu"))
    seen = set()
    for seed in range(40):
        new, new_mask = switcher(ids, mask, words, 1.0, torch.Generator().manual_seed(seed))
        assert new_mask.equal(mask)
        seen.add(tuple(tokenizer.convert_ids_to_tokens(new[0][mask[0]].tolist())))
    start = ("▁the",)
    assert start + ("▁Katze", "▁sat", "▁on", "▁the", "▁Matte") in seen
    assert seen <= {
        start + (cat, "▁sat", "▁on", "▁the", mat) for cat in ("▁cat", "▁Katze") for mat in ("▁mat", "▁Matte")
    }
    same, _ = switcher(ids, mask, words, 0.0, torch.Generator().manual_seed(0))
    assert same.equal(ids)


def test_a_word_of_several_tokens_closes_up():
    ids = torch.tensor([[5, 10, 11, 12, 6, 1]])
    mask = torch.tensor([[True] * 5 + [False]])
    words = torch.tensor([[0, 1, -1, -1, 0, 0]])
    switcher = Switcher({"X": Pairs(torch.tensor([0]), torch.tensor([99]))}, torch.device("cpu"))
    for seed in range(30):
        new, new_mask = switcher(ids, mask, words, 1.0, torch.Generator().manual_seed(seed))
        row = new[0][new_mask[0]].tolist()
        assert row in ([5, 99, 6], [5, 10, 11, 12, 6])
        assert new_mask[0].tolist() == [True] * len(row) + [False] * (6 - len(row))


def test_marks_stand_on_whole_words_alone():
    tokenizer = tokenizer_of(["▁the", "▁cat", "▁mat"])
    texts = tokenize(tokenizer, ["the cat the mat", "cat"], ["the ", ""], ["cat", "mat"], max_length=4)
    assert texts.lengths.tolist() == [4, 1]  # The prompt counts, "mat" is truncated.
    assert texts.words.tolist() == [0, 0, 1, 0, 1]


def test_words_are_counted_without_case():
    assert count_words(["The cat's cat", "the CAT", "b"], least=2) == ["the", "cat"]


def test_batches_hold_every_row_within_the_budget():
    lengths = torch.randint(1, 60, (500,), generator=torch.Generator().manual_seed(0))
    batches = list(batches_by_length(lengths, 256))
    assert sorted(torch.cat(batches).tolist()) == list(range(500))
    assert all(len(rows) * (-(int(lengths[rows].max()) // -8) * 8) <= 256 for rows in batches)
