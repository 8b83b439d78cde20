"""The connector's two starts and its sums, against forms written out by hand."""

from __future__ import annotations

import pytest
import torch

from lusifer.model.connector import FeedForwardConnector


def test_forward_by_hand():
    torch.manual_seed(0)
    connector = FeedForwardConnector(6, 10, 4)
    for parameter in connector.parameters():
        torch.nn.init.normal_(parameter)
    states = torch.randn(2, 3, 6)
    hidden = (states @ connector.up.weight.T + connector.up.bias).clamp(min=0)
    expected = hidden @ connector.down.weight.T + connector.down.bias
    expected = expected + states @ connector.shortcut.weight.T + connector.shortcut.bias
    # Float32, another summation order.
    torch.testing.assert_close(connector(states), expected, atol=1e-5, rtol=1e-5)


def test_without_residual():
    torch.manual_seed(0)
    connector = FeedForwardConnector(6, 10, 4, num_added_tokens=3, residual=False)
    assert not any("shortcut" in name for name, _ in connector.named_parameters())
    assert connector.added_tokens.shape == (3, 4)
    assert connector(torch.randn(2, 5, 6)).shape == (2, 5, 4)
    with pytest.raises(ValueError, match="residual=True"):
        connector.start_linear(torch.zeros(4, 6), torch.zeros(4))


def test_linear_start_is_the_map_and_every_layer_can_leave_it():
    torch.manual_seed(0)
    connector = FeedForwardConnector(6, 10, 4)
    connector.scale_to(torch.randn(4), 0.1)  # What came before must not shine through.
    weight, bias, states = torch.randn(4, 6), torch.randn(4), torch.randn(2, 3, 6)
    connector.start_linear(weight, bias)
    torch.testing.assert_close(connector(states), states @ weight.T + bias, atol=1e-5, rtol=1e-5)  # float32 sums
    optimizer = torch.optim.SGD(connector.parameters(), lr=0.1)
    before = {name: parameter.clone() for name, parameter in connector.named_parameters()}
    for _ in range(2):  # `up` learns only once `down` has left zero.
        optimizer.zero_grad()
        connector(states).square().mean().backward()
        optimizer.step()
    for name, parameter in connector.named_parameters():
        if name != "added_tokens":  # The model places these.
            assert not torch.equal(parameter, before[name]), name


@torch.no_grad()
def test_random_start_has_the_asked_mean_and_spread_whatever_the_encoders():
    torch.manual_seed(0)
    mean = torch.linspace(-1, 1, 32)
    for encoder_std in (0.2, 1.0, 5.0):
        connector = FeedForwardConnector(64, 512, 32, num_added_tokens=2000)
        connector.scale_to(mean, 0.1, encoder_std)
        soft = connector(encoder_std * torch.randn(4000, 64))
        # 512 random hidden units: the spread differs by some per cent from draw to draw, not by a factor.
        centred = soft - soft.mean(dim=0)
        second_moment = (soft - mean).square().mean().sqrt()
        assert float(second_moment) == pytest.approx(0.1, rel=0.15)
        assert float(centred.square().mean().sqrt()) < float(second_moment)
        # 2,000 draws around each component: 0.1 / sqrt(2000) is 0.002, times five.
        torch.testing.assert_close(connector.added_tokens.mean(dim=0), mean, atol=0.011, rtol=0)
        assert float((connector.added_tokens - mean).std()) == pytest.approx(0.1, rel=0.05)
