"""The regression: streaming sums equal the whole table, and layers follow the number of texts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from lusifer.adapt.closed_form import Moments, choose, layer_sets
from lusifer.errors import LusiferError


def table(rows, inputs=12, outputs=5, noise=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(rows, inputs, generator=generator) + 3
    targets = normalize(states @ torch.randn(inputs, outputs, generator=torch.Generator().manual_seed(9)), dim=1)
    return states, normalize(targets + noise * torch.randn(rows, outputs, generator=generator), dim=1)


def test_streaming_sums_give_the_ridge_regression_of_the_whole_table():
    states, targets = table(500)
    moments = Moments(12, 5)
    for part in range(0, 500, 64):
        moments.add(states[part : part + 64], targets[part : part + 64])
    form = moments.solve(torch.arange(12), 0.1)
    x, y = (a.double().numpy() - a.double().numpy().mean(0) for a in (states, targets))
    square = x.T @ x / 500
    penalty = 0.1 * np.trace(square) / 12
    expected = np.linalg.solve(square + penalty * np.eye(12), x.T @ y / 500).T
    # float64 sums, rounded to float32 at the end.
    np.testing.assert_allclose(form.matrix.numpy(), expected, rtol=1e-5, atol=1e-6)
    predicted = states @ form.matrix.T + form.bias
    np.testing.assert_allclose(predicted.mean(0), targets.mean(0), atol=1e-5)


def test_sums_do_not_grow_with_the_texts():
    moments = Moments(12, 5)
    for seed in range(5):
        moments.add(*table(100, seed=seed))
        assert moments.sums.shape == (18, 18)
    assert moments.count == 500


def test_the_layers_that_predict_held_out_texts_are_chosen():
    states, targets = table(2_000, inputs=8)
    noise = torch.randn(2_000, 8, generator=torch.Generator().manual_seed(5))
    both = torch.cat([states, noise], dim=1)  # The lower layer knows, the last one does not.
    moments = Moments(16, 5)
    moments.add(both[:1_500], targets[:1_500])
    form = choose(moments, [1, 2], both[1_500:], targets[1_500:])
    assert form.layers == (1, 2)
    assert form.agreement > 0.9
    flipped = Moments(16, 5)
    flipped.add(both[:1_500].roll(8, dims=1), targets[:1_500])
    form = choose(flipped, [1, 2], both[1_500:].roll(8, dims=1), targets[1_500:])
    assert form.agreement > 0.9
    assert form.matrix[:, -8:].abs().sum() > form.matrix[:, :-8].abs().sum()


def test_few_texts_get_the_last_layer_alone():
    assert layer_sets([6, 8, 10, 12], rows=5_000, width=384) == [(12,), (10, 12), (8, 10, 12)]
    assert layer_sets([6, 8, 10, 12], rows=2_000, width=384) == [(12,)]
    assert layer_sets([6, 8, 10, 12], rows=40_000, width=384)[-1] == (6, 8, 10, 12)


def test_no_texts_are_refused():
    with pytest.raises(LusiferError, match="no texts"):
        Moments(4, 2).solve(torch.arange(4), 0.1)
