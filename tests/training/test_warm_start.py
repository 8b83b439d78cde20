"""Stage 0 where the answer is known: words aligned by hand, and an encoder that is a linear map of the LLM."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lusifer import LusiferError
from lusifer.model.backbones import load_tokenizer
from lusifer.training.warm_start import (
    _WORD,
    WarmStart,
    _sentencepiece_words,
    _token_words,
    aligned_words,
    fit_connector,
    start_connector,
)
from support.tiny import CORPUS

SENTENCE = "The cats read  bread, milk!"  # Words 0-6: The cats read bread , milk !


@pytest.fixture
def encoder_tokenizer(tiny_encoder):
    return load_tokenizer("encoder", tiny_encoder)


@pytest.fixture
def llm_tokenizer(tiny_llm):
    return load_tokenizer("llm", tiny_llm)


def texts(count):
    words = sorted({word for line in CORPUS for word in line.replace(",", "").split()})
    generator = random.Random(0)
    return [" ".join(generator.sample(words, 8)) for _ in range(count)]


class LinearEncoder(nn.Module):
    """States that are a linear map of what the LLM embeds a token as, up to noise."""

    def __init__(self, codes, mixing, noise):
        super().__init__()
        self.codes, self.mixing, self.noise = codes, mixing, noise

    def forward(self, input_ids, attention_mask):
        states = self.codes[input_ids] @ self.mixing
        return SimpleNamespace(last_hidden_state=states + self.noise * torch.randn_like(states))


@pytest.fixture
def known(tiny_model, llm_tokenizer):
    """A model whose encoder states, times the returned map, are the LLM's embeddings."""

    def make(noise=0.0):
        torch.manual_seed(0)
        codes, embed = torch.randn(len(llm_tokenizer), 32), torch.randn(32, 48)
        mixing = torch.linalg.qr(torch.randn(32, 32))[0] * torch.linspace(0.5, 2, 32)
        tiny_model.llm.get_input_embeddings().weight.data = codes @ embed
        tiny_model.encoder = LinearEncoder(codes, mixing, noise)
        return tiny_model, (torch.linalg.inv(mixing) @ embed).T

    return make


def test_words_of_tokens_by_hand(encoder_tokenizer, llm_tokenizer):
    spans = [match.span() for match in _WORD.finditer(SENTENCE)]
    assert [SENTENCE[begin:end] for begin, end in spans] == ["The", "cats", "read", "bread", ",", "milk", "!"]
    ids, words = _token_words(encoder_tokenizer, SENTENCE, spans, special=True, limit=64)
    pieces = ["<s>", "▁", "<unk>", "he", "▁cat", "s", "▁r", "ea", "d", "▁", "▁bread,", "▁milk", "<unk>", "</s>"]
    assert encoder_tokenizer.convert_ids_to_tokens(ids) == pieces
    # A piece over two words belongs to the first; a lone space and special tokens belong to none.
    assert words == [-1, 0, 0, 0, 1, 1, 2, 2, 2, -1, 3, 5, 6, -1]
    ids, words = _token_words(llm_tokenizer, SENTENCE, spans, special=False, limit=64)
    assert llm_tokenizer.convert_ids_to_tokens(ids) == [
        "T",
        "he",
        "Ġcat",
        "s",
        "Ġrea",
        "d",
        "Ġ",
        "Ġbrea",
        "d",
        ",",
        "Ġmil",
        "k",
        "!",
    ]
    assert words == [0, 0, 1, 1, 2, 2, -1, 3, 3, 4, 5, 5, 6]


@torch.no_grad()
def test_averages_by_hand(tiny_model, encoder_tokenizer, llm_tokenizer):
    other = CORPUS[1]  # Longer: the sentence in question is padded.
    pairs = list(aligned_words(tiny_model, encoder_tokenizer, llm_tokenizer, [SENTENCE, other]))
    x, y = pairs[0]
    ids = torch.tensor([encoder_tokenizer(SENTENCE)["input_ids"]])
    states = tiny_model.encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
    table = tiny_model.llm.get_input_embeddings().weight[llm_tokenizer(SENTENCE)["input_ids"]]
    # The comma has no token of its own on the encoder's side, so neither side has it.
    encoder_side = [slice(1, 4), slice(4, 6), slice(6, 9), slice(10, 11), slice(11, 12), slice(12, 13)]
    llm_side = [slice(0, 2), slice(2, 4), slice(4, 6), slice(7, 9), slice(10, 12), slice(12, 13)]
    tolerance = {"atol": 1e-5, "rtol": 1e-5}  # Float32, another batch size.
    torch.testing.assert_close(x[:6], torch.stack([states[part].mean(dim=0) for part in encoder_side]), **tolerance)
    torch.testing.assert_close(y[:6], torch.stack([table[part].mean(dim=0) for part in llm_side]), **tolerance)
    assert len(x) == len(y) == 6 + len(other.split())


@torch.no_grad()
def test_what_truncation_cuts_is_left_out_on_both_sides(tiny_model, encoder_tokenizer, llm_tokenizer):
    (whole_x, whole_y), *_ = aligned_words(tiny_model, encoder_tokenizer, llm_tokenizer, CORPUS[:1])
    tiny_model.config.max_seq_length = 6
    (x, y), *_ = aligned_words(tiny_model, encoder_tokenizer, llm_tokenizer, CORPUS[:1])
    assert 0 < len(x) == len(y) < len(whole_x)
    # The last word may have lost some of its tokens; those before have not.
    torch.testing.assert_close(y[: len(y) - 1], whole_y[: len(y) - 1])


def test_sentencepiece_words_by_hand():
    vocabulary = {0: "<s>", 1: "</s>", 2: "▁the", 3: "▁ca", 4: "t", 5: "▁"}
    tokenizer = SimpleNamespace(convert_ids_to_tokens=lambda ids: [vocabulary[i] for i in ids], all_special_ids=[0, 1])
    ids = [0, 2, 3, 4, 5, 4, 1]
    assert _sentencepiece_words(tokenizer, ids, 3) == (ids, [-1, 0, 1, 1, 2, 2, -1])
    assert _sentencepiece_words(tokenizer, ids, 4) is None  # Not to be followed: rather no words than wrong ones.
    assert _sentencepiece_words(tokenizer, [4, 2], 2) == ([4, 2], [0, 1])  # No meta symbol before the first word.


class Slow:
    """A tokenizer without offsets, as SentencePiece ones without a fast version are."""

    is_fast = False

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, text, **options):
        assert "return_offsets_mapping" not in options
        return self.inner(text, **options)

    def __getattr__(self, name):
        return getattr(self.inner, name)


@torch.no_grad()
def test_tokenizer_without_offsets_gives_the_same_words(tiny_model, encoder_tokenizer, llm_tokenizer):
    plain = [text.replace(",", "") for text in CORPUS]
    (x, y), *_ = aligned_words(tiny_model, encoder_tokenizer, llm_tokenizer, plain)
    (slow_x, slow_y), *_ = aligned_words(tiny_model, Slow(encoder_tokenizer), llm_tokenizer, plain)
    assert torch.equal(x, slow_x)
    assert torch.equal(y, slow_y)
    assert len(x) == sum(len(text.split()) for text in plain)


def test_known_map_is_found(known, llm_tokenizer):
    model, expected = known()
    start = fit_connector(model, llm_tokenizer, llm_tokenizer, texts(200), ridge=1e-3, spectrum=1.0, progress=False)
    assert start.explained > 0.99
    # Ridge 1e-3 against squared states summing to hundreds, in float32 products.
    torch.testing.assert_close(start.weight, expected, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(start.bias, torch.zeros(48), atol=2e-3, rtol=0)
    assert (start.words, start.held_out_words) == (180 * 8, 20 * 8)


def test_explained_is_low_where_nothing_is_to_be_explained(known, llm_tokenizer):
    model, _ = known()
    model.encoder.codes = torch.randn_like(model.encoder.codes)[torch.randperm(len(llm_tokenizer))]
    # 32 columns fit some of 150 distinct tokens by accident, never most.
    start = fit_connector(model, llm_tokenizer, llm_tokenizer, texts(200), ridge=1e-3, spectrum=1.0, progress=False)
    assert start.explained < 0.7


def test_held_out_texts_are_not_fitted(known, llm_tokenizer):
    model, _ = known(noise=0.1)
    fitted, last = texts(90), ["the sea", "bread and milk"] * 5
    torch.manual_seed(1)
    first = fit_connector(model, llm_tokenizer, llm_tokenizer, [*fitted, *last], spectrum=1.0, progress=False)
    torch.manual_seed(1)
    second = fit_connector(model, llm_tokenizer, llm_tokenizer, [*fitted, *texts(10)], spectrum=1.0, progress=False)
    assert torch.equal(first.weight, second.weight)
    assert first.explained != second.explained


def test_ridge_equals_the_augmented_least_squares(known, llm_tokenizer):
    model, _ = known(noise=0.3)
    corpus = texts(40)
    torch.manual_seed(2)
    pairs = list(aligned_words(model, llm_tokenizer, llm_tokenizer, corpus[:36]))
    torch.manual_seed(2)
    options = {"spectrum": 1.0, "progress": False}
    start = fit_connector(model, llm_tokenizer, llm_tokenizer, corpus, ridge=50.0, **options)
    x, y = (torch.cat(side).double() for side in zip(*pairs, strict=True))
    centred_x, centred_y = x - x.mean(dim=0), y - y.mean(dim=0)
    rows = torch.cat([centred_x, 50.0**0.5 * torch.eye(32, dtype=torch.float64)])
    solution = torch.linalg.lstsq(rows, torch.cat([centred_y, torch.zeros(32, 48, dtype=torch.float64)])).solution
    # Products of a batch are summed in float32.
    torch.testing.assert_close(start.weight.double(), solution.T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(start.bias.double(), y.mean(dim=0) - x.mean(dim=0) @ solution, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spectrum", [0.0, 0.5])
def test_spectrum_bends_the_singular_values_only(known, llm_tokenizer, spectrum):
    model, _ = known()
    options = {"ridge": 10.0, "progress": False}
    plain = fit_connector(model, llm_tokenizer, llm_tokenizer, texts(100), spectrum=1.0, **options)
    bent = fit_connector(model, llm_tokenizer, llm_tokenizer, texts(100), spectrum=spectrum, **options)
    left, values, right = torch.linalg.svd(plain.weight.double(), full_matrices=False)
    shape = left @ torch.diag(values**spectrum) @ right
    factor = (bent.weight.double() * shape).sum() / shape.square().sum()
    # Two decompositions of a float32 matrix.
    torch.testing.assert_close(bent.weight.double(), factor * shape, atol=1e-4, rtol=1e-4)
    # The factor is the least-squares one: what it leaves is orthogonal to what it predicts.
    pairs = list(aligned_words(model, llm_tokenizer, llm_tokenizer, texts(100)[:90]))
    x, y = (torch.cat(side) for side in zip(*pairs, strict=True))
    predicted = (x - x.mean(dim=0)) @ bent.weight.T
    left_over = y - y.mean(dim=0) - predicted
    assert abs(float((predicted * left_over).sum() / predicted.square().sum())) < 1e-3


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_apply_makes_the_connector_that_map(tiny_model, scale):
    torch.manual_seed(0)
    start = WarmStart(torch.randn(48, 32), torch.randn(48), 0.5, 10, 2)
    states = torch.randn(2, 5, 32)
    start_connector(tiny_model, start, scale=scale)
    expected = scale * (states @ start.weight.T + start.bias)
    torch.testing.assert_close(tiny_model.connector(states), expected, atol=1e-4, rtol=1e-5)  # Values up to 50.


def test_fit_changes_nothing(tiny_model, encoder_tokenizer, llm_tokenizer):
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    start = fit_connector(tiny_model, encoder_tokenizer, llm_tokenizer, CORPUS, progress=False)
    for name, tensor in tiny_model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert (start.weight.shape, start.bias.shape) == ((48, 32), (48,))
    start_connector(tiny_model, start)
    torch.nn.functional.mse_loss(tiny_model.connector(torch.randn(1, 2, 32)), torch.zeros(1, 2, 48)).backward()
    assert tiny_model.connector.shortcut.weight.grad.abs().max() > 0  # Not an inference tensor: it can learn.


@pytest.mark.parametrize("nothing", [["", "   "], []])
def test_no_words_is_an_error(tiny_model, encoder_tokenizer, llm_tokenizer, nothing):
    with pytest.raises(LusiferError, match=f"no words in {len(nothing)} texts"):
        fit_connector(tiny_model, encoder_tokenizer, llm_tokenizer, nothing, progress=False)


def test_tokenizers_that_cannot_be_followed_are_an_error(tiny_model, encoder_tokenizer, llm_tokenizer):
    # Byte-level pieces without offsets: no meta symbol tells where words begin.
    with pytest.raises(LusiferError, match="could align no words"):
        fit_connector(tiny_model, encoder_tokenizer, Slow(llm_tokenizer), CORPUS, progress=False)
