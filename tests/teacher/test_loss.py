"""The teacher's loss against its definition, text by text."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from lusifer.teacher.loss import teacher_loss


@pytest.mark.parametrize("neighbours", [0.0, 4.0])
def test_it_is_five_cosine_distances_and_a_divergence(neighbours):
    draw = torch.Generator().manual_seed(0)
    ours, targets, bank = (normalize(torch.randn(n, 6, generator=draw), dim=1) for n in (4, 4, 3))
    expected = 0.0
    for vector, target in zip(ours, targets, strict=True):
        known = [*targets, *bank]
        wanted, got = (torch.stack([x @ y for y in known]) / 0.05 for x in (target, vector))
        wanted, got = wanted.log_softmax(0), got.log_softmax(0)
        expected += 5 * (1 - vector @ target) + neighbours * (wanted.exp() * (wanted - got)).sum()
    torch.testing.assert_close(teacher_loss(ours, targets, bank, neighbours=neighbours), expected / 4)


def test_it_is_zero_at_the_teacher_alone():
    draw = torch.Generator().manual_seed(0)
    targets = normalize(torch.randn(5, 6, generator=draw), dim=1)
    assert float(teacher_loss(targets, targets, targets[:0])) == pytest.approx(0, abs=1e-5)
    assert float(teacher_loss(targets.flip(0), targets, targets[:0])) > 1
