"""A power cut inside a training run."""

from __future__ import annotations

from lusifer.training.alignment import AlignmentLoss
from lusifer.training.contrastive import ContrastiveLoss

_LOSSES = {"align": AlignmentLoss, "contrast": ContrastiveLoss}


class Killed(BaseException):
    """What a test uses in place of a power cut."""


def kill_in(monkeypatch, stage, call):
    """Makes the stage's loss raise at its call number ``call``, counted from 1."""
    loss, calls = _LOSSES[stage], [0]
    real = loss.step

    def step(self, *args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            raise Killed
        return real(self, *args, **kwargs)

    monkeypatch.setattr(loss, "step", step)
