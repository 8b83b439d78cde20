"""What a model is trained for: the teacher's vector, and the teacher's neighbourhoods."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

COSINE_WEIGHT = 5.0
NEIGHBOUR_WEIGHT = 4.0
TEMPERATURE = 0.05


def teacher_loss(vectors: Tensor, targets: Tensor, bank: Tensor, *, neighbours: float = NEIGHBOUR_WEIGHT) -> Tensor:
    """5 (1 - cosine), and how the similarities to the batch's targets and a bank diverge from the teacher's.

    The second term is a Kullback-Leibler divergence of softmaxes at temperature 0.05; without it translation retrieval
    loses two points (docs/LOG.md, "towards a teacher").

    Args:
        vectors: (batch, dim) unit vectors of the model.
        targets: (batch, dim) unit vectors of the teacher.
        bank: (n, dim) the teacher's unit vectors of other texts.
        neighbours: Weight of the divergence.
    """
    loss = COSINE_WEIGHT * (1 - (vectors * targets).sum(1).mean())
    if neighbours:
        known = torch.cat([targets, bank])
        wanted = F.softmax(targets @ known.T / TEMPERATURE, dim=1)
        got = F.log_softmax(vectors @ known.T / TEMPERATURE, dim=1)
        loss = loss + neighbours * F.kl_div(got, wanted, reduction="batchmean")
    return loss
