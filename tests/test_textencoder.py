"""Fast encoding: the vectors of the plain path, in order, whatever the batch."""

from __future__ import annotations

import numpy as np
import pytest

from lusifer.textencoder import TextEncoder

TEXTS = ["cat", "the cat sat on the mat", "a dog", "rain fell on the roof " * 6, "rain fell", "she reads", "milk"]


@pytest.mark.parametrize("budget", [1, 16, 50, 10_000])
@pytest.mark.parametrize("window", [1, 3, 100])
def test_order_is_restored_and_vectors_are_those_of_encode(tiny_st, budget, window):
    expected = np.stack([tiny_st.encode(text) for text in TEXTS])
    encoder = TextEncoder(tiny_st, token_budget=budget, window=window)
    found = encoder.encode(TEXTS)
    # Unit vectors in float32, summed in another order.
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(encoder.encode_ids(encoder.tokenize(TEXTS)), expected, atol=1e-5)
    assert found.dtype == np.float32 and np.abs(found[0] - found[1]).max() > 1e-2


def test_long_texts_are_cut_by_the_tokenizer_and_counted(tiny_st):
    long = "the cat sat on the mat " * 50
    encoder = TextEncoder(tiny_st)
    ids = encoder.tokenize(["cat", long, long + "and more"])
    assert len(ids[1]) == tiny_st.max_seq_length and ids[1][-1] == tiny_st.tokenizer.eos_token_id
    assert ids[1] == ids[2] and encoder.cut == 2


def test_nothing_gives_nothing(tiny_st):
    assert TextEncoder(tiny_st).encode([]).shape == (0, tiny_st.get_embedding_dimension())
