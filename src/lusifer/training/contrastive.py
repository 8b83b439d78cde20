"""Stage 2: InfoNCE on cosine over temperature, in float32 (LUSIFER, arXiv 2501.00874, section 3.2).

Every rank gathers the embeddings of all ranks, computes the loss of the global batch slice by slice of the score
matrix, and back-propagates the gradient of its own rows: W processes equal one. Candidates that are no negatives are
left out: copies of the query or its positive, and, with a guide and a margin, what the guide scores above the positive
less the margin (GISTEmbed, arXiv 2402.16829). Matryoshka dimensions: arXiv 2205.13147. A teacher's vectors of the
texts may be learnt beside it, or alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from lusifer.errors import LusiferError
from lusifer.model.token_batches import Features, micro_batches, padded_tokens, token_features, trim
from lusifer.teacher.loss import teacher_loss
from lusifer.training.distillation import neighbourhood_divergence
from lusifer.training.gradient_cache import Backward, CachedPass, NoSync, gather, groups_within, in_order, world

_SLICE = 256  # Queries per slice of the score matrix.


class _InfoNCE(torch.autograd.Function):
    """Mean InfoNCE over unit vectors; gradients are made beside the scores, a slice at a time."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, candidates: Tensor, temperature: float, excluded: Callable[[slice], Tensor] | None
    ) -> Tensor:
        wanted, total = any(ctx.needs_input_grad[:2]), queries.new_zeros(())
        query_grad, candidate_grad = torch.zeros_like(queries), torch.zeros_like(candidates)
        for begin in range(0, len(queries), _SLICE):
            rows = slice(begin, min(begin + _SLICE, len(queries)))
            labels = torch.arange(rows.start, rows.stop, device=queries.device)
            own = (labels - begin, labels)
            scores = (queries[rows] / temperature) @ candidates.T
            if excluded is not None:
                out = excluded(rows)
                out[own] = False
                scores.masked_fill_(out, float("-inf"))
            logarithms = torch.log_softmax(scores, dim=1)
            total -= logarithms[own].sum()
            if wanted:
                probabilities = logarithms.exp_()
                probabilities[own] -= 1
                probabilities.mul_(1 / (temperature * len(queries)))
                torch.mm(probabilities, candidates, out=query_grad[rows])
                candidate_grad.addmm_(probabilities.T, queries[rows])
        ctx.save_for_backward(query_grad, candidate_grad)
        return total / len(queries)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        query_grad, candidate_grad = ctx.saved_tensors
        return query_grad * grad[0], candidate_grad * grad[0], None, None


def info_nce(
    queries: Tensor, candidates: Tensor, *, temperature: float, excluded: Callable[[slice], Tensor] | None = None
) -> Tensor:
    """Mean cross-entropy of each query's own candidate among all, on cosine over temperature; differentiable once.

    Args:
        queries: (batch, dim).
        candidates: (n, dim) with n >= batch; candidate i is the positive of query i.
        temperature: Positive divisor of the cosine.
        excluded: Gives a new (slice, n) bool tensor for a slice of the queries, True where a candidate is no negative;
            a query's own positive always counts.
    """
    queries, candidates = normalize(queries.float(), dim=-1), normalize(candidates.float(), dim=-1)
    return _InfoNCE.apply(queries, candidates, temperature, excluded)


@dataclass
class _Columns:
    """Which texts of a global batch are no negatives of which, by their keys and by a guide's embeddings."""

    keys: Tensor  # (columns, rows) int64: queries, positives, then negatives.
    guide: Tensor | None  # (columns, rows, guide_dim) unit vectors.
    margin: float

    def against(self, anchor: int, candidates: slice, rows: slice) -> Tensor:
        """(slice, n) bool: texts of the ``candidates`` columns that are no negatives of these rows of a column."""
        own, others = self.keys[:, rows].unsqueeze(2), self.keys[candidates].flatten()
        out = (others == own[0]) | (others == own[1])
        # What belongs to another row that asks the same.
        out[:, : self.keys.shape[1]] |= self.keys[anchor] == own[anchor]
        if self.guide is not None:
            scores = self.guide[anchor, rows] @ self.guide[candidates].flatten(0, 1).T
            out |= scores > self._limit()[rows].unsqueeze(1)
        return out

    def against_own(self) -> Tensor:
        """(batch, columns - 2) bool: hard negatives that are none of their own row."""
        negatives = self.keys[2:].T
        out = (negatives == self.keys[1].unsqueeze(1)) | (negatives == self.keys[0].unsqueeze(1))
        if self.guide is not None:
            out |= torch.einsum("bd,nbd->bn", self.guide[0], self.guide[2:]) > self._limit().unsqueeze(1)
        return out

    def _limit(self) -> Tensor:
        assert self.guide is not None
        return (self.guide[0] * self.guide[1]).sum(dim=-1) - self.margin


class ContrastiveLoss(nn.Module):
    """InfoNCE over queries, positives and hard negatives.

    A batch says by ``in_batch_negatives`` whether other rows' texts are negatives too; else each query has only its
    own hard negatives.

    Args:
        temperature: tau; the paper uses 0.05.
        symmetric: Whether each positive must also find its query among the batch's queries (in-batch only).
        matryoshka_dims: The loss is the mean over embeddings truncated to these; empty for the whole embedding.
        guide: Maps ``batch["guide"]`` to a dict with ``sentence_embedding``; never trained.
        guide_margin: Candidates the guide scores above ``positive - guide_margin`` are left out; None for none.
        infonce_weight: Weight of InfoNCE; 0 leaves it out.
        teacher_weight: Weight of `lusifer.teacher.loss.teacher_loss` on whole embeddings, where a batch has a teacher's
            vectors.
        distill: Weight of `lusifer.training.distillation`'s divergence from the guide.
        distill_temperature: Its temperature.
        max_tokens: Most padded tokens in one forward pass.
        graph_tokens: Most padded tokens whose activations are kept; the rest goes through the gradient cache.
    """

    def __init__(
        self,
        *,
        temperature: float = 0.05,
        symmetric: bool = False,
        matryoshka_dims: Sequence[int] = (),
        guide: nn.Module | None = None,
        guide_margin: float | None = None,
        infonce_weight: float = 1.0,
        teacher_weight: float = 1.0,
        distill: float = 0.0,
        distill_temperature: float = 0.05,
        max_tokens: int = 16384,
        graph_tokens: int = 65536,
    ) -> None:
        super().__init__()
        self.temperature, self.symmetric = temperature, symmetric
        self.matryoshka_dims = list(matryoshka_dims)
        self.guide = None if guide is None else guide.requires_grad_(False).eval()
        self.guide_margin = guide_margin
        self.infonce_weight, self.teacher_weight = infonce_weight, teacher_weight
        self.distill, self.distill_temperature = distill, distill_temperature
        self.max_tokens, self.graph_tokens = max_tokens, graph_tokens

    def train(self, mode: bool = True) -> ContrastiveLoss:
        """Switches the mode of everything but the guide."""
        super().train(mode)
        if self.guide is not None:
            self.guide.eval()
        return self

    def forward(self, model: nn.Module, batch: dict[str, Any], *, progress: float = 0.0) -> Tensor:
        """The loss of this process's rows alone, in one graph: a scalar in float32.

        Args:
            model: A `LusiferModel` or its distributed wrapper.
            batch: ``input_ids`` and ``attention_mask`` (columns * rows, seq): queries, positives, then column by
                column the hard negatives; ``keys`` (columns * rows,) int64, equal for texts that are equal without
                prompts and instructions; ``columns``; ``in_batch_negatives``; ``guide``, the guide's features;
                ``teacher`` (columns * rows, dim), a teacher's unit vectors.
            progress: Ignored.
        """
        features, columns = token_features(batch), batch["columns"]
        vectors = self._embed(features, lambda few: model(**few).pooler_output).unflatten(0, (columns, -1))
        options = {"guide": self._guide_vectors(batch), "targets": _targets(batch)}
        return self.of_embeddings(vectors, _keys(batch), **options, in_batch=batch["in_batch_negatives"])

    @torch.no_grad()
    def teacher_cosine(self, model: nn.Module, batch: dict[str, Any]) -> float:
        """Mean cosine of a batch's embeddings with the teacher's vectors; arguments as for `forward`."""
        vectors = self._embed(token_features(batch), lambda few: model(**few).pooler_output)
        return float(cosine_similarity(vectors.float(), batch["teacher"]).mean())

    def _embed(self, features: Features, embed: Callable[[Features], Tensor]) -> Tensor:
        groups = micro_batches(features["attention_mask"].sum(dim=1).cpu(), self.max_tokens)
        return in_order([embed(trim(features, rows)) for rows in groups], groups)

    def step(
        self, model: nn.Module, batch: dict[str, Any], *, backward: Backward, no_sync: NoSync, progress: float = 0.0
    ) -> dict[str, float]:
        """Adds the gradient of the global batch's loss to the model's parameters.

        Args:
            model: A `LusiferModel` or its distributed wrapper.
            batch: This rank's rows, as for `forward`; the same number on every rank.
            backward: Back-propagates a scalar.
            no_sync: Context in which gradients are not reduced over the ranks.
            progress: Ignored.

        Returns:
            ``loss`` of the global batch; real ``tokens``, shares of ``padding`` and ``recomputed`` on this rank.

        Raises:
            LusiferError: If the ranks' batches are not parts of one batch.
        """
        rank, size = world()
        features, columns = token_features(batch), batch["columns"]
        lengths = features["attention_mask"].sum(dim=1)
        _check_agreement(batch, lengths.device)
        groups, kept = groups_within(lengths, self.max_tokens, self.graph_tokens)
        cached = CachedPass(lambda rows: model(**trim(features, rows)).pooler_output, groups, kept, lengths.device)
        vectors = cached.forward(no_sync).float()
        guide, targets = (None if x is None else _joined(x) for x in (self._guide_vectors(batch), _targets(batch)))
        every = _joined(vectors.unflatten(0, (columns, -1))).requires_grad_()
        keys = _joined(_keys(batch))
        loss = self.of_embeddings(every, keys, guide, targets, in_batch=batch["in_batch_negatives"])
        (gradient,) = torch.autograd.grad(loss, every)
        rows = len(vectors) // columns
        # Wrappers average gradients over the ranks.
        own = gradient[:, rank * rows : (rank + 1) * rows].flatten(0, 1) * size
        cached.backward(own, backward, no_sync)
        padded, tokens = padded_tokens(lengths.cpu(), groups), float(lengths.sum())
        total = max(sum(padded), 1)
        metrics = {"loss": float(loss.detach()), "recomputed": sum(padded[kept:]) / total}
        return {**metrics, "tokens": tokens, "padding": 1 - tokens / total}

    def of_embeddings(
        self,
        vectors: Tensor,
        keys: Tensor,
        guide: Tensor | None = None,
        targets: Tensor | None = None,
        *,
        in_batch: bool = True,
    ) -> Tensor:
        """The loss of a batch that is embedded already: a scalar in float32.

        Args:
            vectors: (columns, rows, dim): queries, positives, then the hard negatives.
            keys: (columns, rows) int64, equal for equal texts, see `lusifer.data.collate.text_keys`.
            guide: (columns, rows, guide_dim) float32 unit vectors of the guide model.
            targets: (columns, rows, dim) float32 unit vectors of the teacher.
            in_batch: Whether other rows' texts are negatives.

        Raises:
            LusiferError: If a Matryoshka dimension exceeds the embedding's.
        """
        columns = _Columns(keys, None if self.guide_margin is None else guide, self.guide_margin or 0.0)
        dims = self.matryoshka_dims or [vectors.shape[-1]]
        if max(dims) > vectors.shape[-1]:
            raise LusiferError(f"matryoshka_dims asks for {max(dims)} dimensions, the model has {vectors.shape[-1]}")
        one = self._in_batch if in_batch else self._own_negatives
        # Cosines over a small temperature need all of float32.
        with torch.autocast(vectors.device.type, enabled=False):
            texts, loss = vectors.flatten(0, 1), vectors.new_zeros((), dtype=torch.float32)
            if self.infonce_weight:
                parts = [one(vectors[..., :dim].float(), columns) for dim in dims]
                loss = loss + self.infonce_weight * torch.stack(parts).mean()
            if self.teacher_weight and targets is not None:
                ours, theirs = normalize(texts.float(), dim=-1), targets.flatten(0, 1)
                # The neighbours are the other texts of the global batch.
                loss = loss + self.teacher_weight * teacher_loss(ours, theirs, theirs[:0])
            if self.distill and guide is not None:
                theirs, tau = guide.flatten(0, 1), self.distill_temperature
                parts = [neighbourhood_divergence(texts[:, :dim], theirs, temperature=tau) for dim in dims]
                loss = loss + self.distill * torch.stack(parts).mean()
            return loss

    def _in_batch(self, vectors: Tensor, columns: _Columns) -> Tensor:
        queries, candidates = vectors[0], vectors[1:].flatten(0, 1)
        out = partial(columns.against, 0, slice(1, None))
        loss = info_nce(queries, candidates, temperature=self.temperature, excluded=out)
        if self.symmetric:
            out = partial(columns.against, 1, slice(1))
            loss = (loss + info_nce(vectors[1], queries, temperature=self.temperature, excluded=out)) / 2
        return loss

    def _own_negatives(self, vectors: Tensor, columns: _Columns) -> Tensor:
        vectors = normalize(vectors, dim=-1)
        scores = torch.einsum("bd,nbd->bn", vectors[0], vectors[1:]) / self.temperature
        out = nn.functional.pad(columns.against_own(), (1, 0))
        labels = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
        return cross_entropy(scores.masked_fill(out, float("-inf")), labels)

    @torch.no_grad()
    def _guide_vectors(self, batch: dict[str, Any]) -> Tensor | None:
        """(columns, rows, guide_dim) float32 unit vectors of the guide."""
        if self.guide is None:
            return None
        if "guide" not in batch:
            raise LusiferError("the loss has a guide model, but the batch holds no features for it (`guide`)")
        features: dict[str, Any] = batch["guide"]
        guide: Any = self.guide
        if "attention_mask" in features:
            vectors = self._embed(token_features(features), lambda few: guide(few)["sentence_embedding"])
        else:
            vectors = guide(dict(features))["sentence_embedding"]
        return normalize(vectors.float(), dim=-1).unflatten(0, (batch["columns"], -1))


def _keys(batch: dict[str, Any]) -> Tensor:
    """(columns, rows) int64, equal for equal texts."""
    return batch["keys"].unflatten(0, (batch["columns"], -1))


def _targets(batch: dict[str, Any]) -> Tensor | None:
    """(columns, rows, dim) float32 unit vectors of the teacher, where a batch has one."""
    return batch["teacher"].unflatten(0, (batch["columns"], -1)) if "teacher" in batch else None


def _joined(local: Tensor) -> Tensor:
    """(columns, rows, ...) of every rank to (columns, world * rows, ...), without gradient."""
    return gather(local).transpose(0, 1).flatten(1, 2)


def _check_agreement(batch: dict[str, Any], device: torch.device) -> None:
    """Refuses batches that ranks drew differently, before a collective call waits for ever."""
    rank, size = world()
    if size == 1:
        return
    name, columns, flag = str(batch["dataset"]), batch["columns"], batch["in_batch_negatives"]
    digest = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")
    shape = [digest, columns, int(flag), len(batch["input_ids"]), int("guide" in batch), int("teacher" in batch)]
    every = gather(torch.tensor(shape, device=device))
    if bool((every != every[0]).any()):
        raise LusiferError(
            f"the ranks' batches do not belong together: rank {rank} drew {len(batch['input_ids'])} texts in "
            f"{columns} columns from {name!r} (in_batch_negatives {'on' if flag else 'off'}) and another rank "
            "something else; start every rank with the same recipe, the same data files and the same seed"
        )
