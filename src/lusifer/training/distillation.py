"""Keeping what the encoder knows: the embeddings' neighbourhoods follow those of a guide.

Contrastive training on English also uses up directions along which the encoder keeps its languages together. A guide
that reads the same texts, for example the encoder alone, says how near any two of them are (similarity distillation,
arXiv 1907.09682, as a divergence of softmaxes).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

_SLICE = 256  # Texts per slice of the score matrix.


class _Divergence(torch.autograd.Function):
    """Mean KL divergence over rows; the gradient is made beside the scores, a slice at a time."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, guide: Tensor, temperature: float) -> Tensor:
        total, gradient = vectors.new_zeros(()), torch.zeros_like(vectors)
        for begin in range(0, len(vectors), _SLICE):
            rows = slice(begin, min(begin + _SLICE, len(vectors)))
            own = (torch.arange(rows.stop - begin), torch.arange(begin, rows.stop))
            ours, theirs = (x[rows] @ x.T / temperature for x in (vectors, guide))
            # A text's similarity to itself is 1 for everyone. Not -inf, whose products with 0 are no numbers.
            ours[own] = theirs[own] = -1e4
            ours, theirs = torch.log_softmax(ours, dim=1), torch.log_softmax(theirs, dim=1)
            wanted = theirs.exp()
            total += (wanted * (theirs - ours)).sum()
            if ctx.needs_input_grad[0]:
                slope = (ours.exp_() - wanted) / (temperature * len(vectors))
                gradient[rows].addmm_(slope, vectors)
                gradient.addmm_(slope.T, vectors[rows])
        ctx.save_for_backward(gradient)
        return total / len(vectors)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad[0], None, None


def neighbourhood_divergence(vectors: Tensor, guide: Tensor, *, temperature: float) -> Tensor:
    """Mean over texts of KL(guide || ours) of the softmaxes over similarities to all others; differentiable once.

    Args:
        vectors: (texts, dim).
        guide: (texts, guide_dim), of the same texts; gets no gradient.
        temperature: Positive divisor of the cosines on both sides.
    """
    vectors, guide = normalize(vectors.float(), dim=-1), normalize(guide.float(), dim=-1)
    return _Divergence.apply(vectors, guide, temperature)
