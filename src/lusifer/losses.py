"""The two training losses, and the length-sorted forward pass both use.

Padding decides the speed of training: a batch padded to its longest text wastes half its tokens
or more. Both losses therefore sort a batch by length, cut it into micro-batches that hold at
most a budget of padded tokens, trim each to its own longest text and restore the order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.utils.checkpoint import checkpoint

from lusifer.backbones import LMHead
from lusifer.modeling import LusiferModel

Features = dict[str, Any]


def micro_batches(lengths: Tensor, max_tokens: int) -> Iterator[Tensor]:
    """Groups rows of similar length.

    Args:
        lengths: (rows,) tokens per row.
        max_tokens: Most padded tokens a group may hold; a longer single row is a group of its own.

    Yields:
        Row indices of each group, longest rows first.
    """
    order = torch.argsort(lengths, descending=True, stable=True)
    begin = 0
    while begin < len(order):
        width = max(int(lengths[order[begin]]), 1)
        size = max(1, max_tokens // width)
        yield order[begin : begin + size]
        begin += size


def _trim(features: Features, rows: Tensor) -> Features:
    """Selects rows of padded token features and drops the columns that are padding in all of them."""
    rows = rows.to(features["attention_mask"].device)
    mask = features["attention_mask"][rows]
    columns = mask.bool().any(dim=0)
    columns[0] |= ~columns.any()
    return {name: tensor[rows][:, columns] for name, tensor in features.items()}


def _token_features(features: Features) -> Features:
    shape = features["input_ids"].shape
    return {name: value for name, value in features.items() if isinstance(value, Tensor) and value.shape == shape}


def embed_columns(model: nn.Module, columns: Sequence[Features], max_tokens: int) -> list[Tensor]:
    """Embeds several columns of texts in one length-sorted pass.

    Args:
        model: A SentenceTransformer, or its distributed wrapper.
        columns: Padded token features of each column, ``input_ids`` (rows, seq) and ``attention_mask``.
        max_tokens: Most padded tokens in one forward pass.

    Returns:
        One (rows, dim) tensor per column, in the order of the input; equal to embedding every
        text alone up to floating-point summation order.
    """
    columns = [_token_features(column) for column in columns]
    width = max(column["input_ids"].shape[1] for column in columns)
    merged = {
        name: torch.cat([nn.functional.pad(c[name], (0, width - c[name].shape[1])) for c in columns])
        for name in columns[0]
    }
    groups = list(micro_batches(merged["attention_mask"].sum(dim=1).cpu(), max_tokens))
    parts = [model(_trim(merged, rows))["sentence_embedding"] for rows in groups]
    restore = torch.argsort(torch.cat(groups)).to(parts[0].device)
    return list(torch.cat(parts)[restore].split([len(column["input_ids"]) for column in columns]))


def text_keys(features: Features) -> Tensor:
    """(rows,) int64 keys, equal exactly when two rows hold the same tokens (up to 64-bit hash collisions)."""
    ids, mask = features["input_ids"].long(), features["attention_mask"].long()
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    generator = torch.Generator().manual_seed(0x5EED)
    weights = torch.randint(-(2**62), 2**62, (ids.shape[1],), generator=generator) | 1
    return ((ids + 1) * mask * weights.to(ids.device)[positions]).sum(dim=1)


def info_nce(
    queries: Tensor,
    candidates: Tensor,
    *,
    temperature: float,
    excluded: Tensor | None = None,
) -> Tensor:
    """InfoNCE on cosine similarity over temperature, in float32 (LUSIFER, section 3.2; arXiv 1807.03748).

    Args:
        queries: (batch, dim).
        candidates: (n, dim) with n >= batch; candidate i is the positive of query i.
        temperature: Positive divisor of the cosine.
        excluded: (batch, n) bool, True where a candidate must not count as a negative; a query's
            own positive is never excluded.

    Returns:
        Scalar float32 mean over queries.
    """
    scores = normalize(queries.float(), dim=-1) @ normalize(candidates.float(), dim=-1).T / temperature
    labels = torch.arange(len(queries), device=scores.device)
    if excluded is not None:
        excluded = excluded.clone()
        excluded[labels, labels] = False
        scores = scores.masked_fill(excluded, float("-inf"))
    return cross_entropy(scores, labels)


class ContrastiveLoss(nn.Module):
    """Stage 2: InfoNCE with in-batch and hard negatives (LUSIFER, section 3.2).

    Args:
        model: The model to train.
        temperature: tau; the paper uses 0.05.
        in_batch_negatives: Whether other rows' positives and negatives are negatives too; off for
            classification- and clustering-like data, where they often are not.
        symmetric: Whether each positive must also find its query among the batch's queries.
        max_tokens: Most padded tokens in one forward pass.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        temperature: float = 0.05,
        in_batch_negatives: bool = True,
        symmetric: bool = False,
        max_tokens: int = 16384,
    ) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.in_batch_negatives = in_batch_negatives
        self.symmetric = symmetric
        self.max_tokens = max_tokens

    def _excluded(self, columns: Sequence[Features]) -> Tensor:
        query_keys, *candidate_keys = [text_keys(column) for column in columns]
        rows = torch.arange(len(query_keys), device=query_keys.device)
        keys, owners = torch.cat(candidate_keys), rows.repeat(len(candidate_keys))
        # Another row's copy of this query or of its positive is no negative.
        excluded = (keys == candidate_keys[0].unsqueeze(1)) | (keys == query_keys.unsqueeze(1))
        # Nor is the positive of another row that asks the same.
        excluded[:, : len(rows)] |= query_keys == query_keys.unsqueeze(1)
        if not self.in_batch_negatives:
            excluded |= owners != rows.unsqueeze(1)
        return excluded

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        """Computes the loss of one batch.

        Args:
            sentence_features: Token features of queries, positives and any number of negatives, in
                this order, each (batch, seq).
            labels: Ignored; Sentence Transformers passes it.

        Returns:
            Scalar float32.
        """
        columns = list(sentence_features)
        queries, *candidates = embed_columns(self.model, columns, self.max_tokens)
        excluded = self._excluded(columns)
        loss = info_nce(queries, torch.cat(candidates), temperature=self.temperature, excluded=excluded)
        if self.symmetric and self.in_batch_negatives:
            backward = excluded[:, : len(queries)].T
            loss = (loss + info_nce(candidates[0], queries, temperature=self.temperature, excluded=backward)) / 2
        return loss

    def get_config_dict(self) -> dict[str, Any]:
        """Hyper-parameters for the model card."""
        names = ("temperature", "in_batch_negatives", "symmetric")
        return {name: getattr(self, name) for name in names}


class AlignmentLoss(nn.Module):
    """Stage 1: the frozen LLM reads soft tokens and must write the target (LUSIFER, section 3.1).

    Causal: the state before each target token predicts it. Only target tokens are supervised.
    Each input embedding of the target is replaced, with probability ``mask_probability``, by the
    mean embedding, so that the LLM has to look at the soft tokens rather than at its own prefix.

    Args:
        model: The model to train.
        lm_head: The LLM's head; it lives here and is never saved with the model.
        mask_probability: p, between 0 and 1; applied in training mode only.
        max_tokens: Most padded tokens (source plus target) in one forward pass.
        chunk: Supervised positions per slice of the LM head, which bounds the memory of the logits.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        lm_head: LMHead,
        *,
        mask_probability: float = 0.5,
        max_tokens: int = 8192,
        chunk: int = 512,
    ) -> None:
        super().__init__()
        self.model = model
        self.lm_head = lm_head
        self.mask_probability = mask_probability
        self.max_tokens = max_tokens
        self.chunk = chunk
        self.register_buffer("mask_embedding", self._lusifer().llm_embeddings().float().mean(dim=0), persistent=False)

    def _lusifer(self) -> LusiferModel:
        model: Any = getattr(self.model, "module", self.model)
        return model[0].auto_model

    def masked_target(self, target_ids: Tensor) -> Tensor:
        """Input embeddings of the target, (batch, target_seq, llm_dim) float32, some replaced by the mean."""
        embeddings = self._lusifer().llm.get_input_embeddings()(target_ids).float()
        if not self.training or self.mask_probability == 0:
            return embeddings
        masked = torch.rand(target_ids.shape, device=target_ids.device) < self.mask_probability
        mask_embedding: Any = self.mask_embedding
        return torch.where(masked.unsqueeze(-1), mask_embedding, embeddings)

    def token_losses(self, source: Features, target: Features) -> Tensor:
        """Cross-entropy of every real target token, row by row in order: (supervised,) float32."""
        mask = target["attention_mask"].bool()
        states = self._lusifer().align(
            source["input_ids"], source["attention_mask"], self.masked_target(target["input_ids"]), mask
        )
        wanted = target["input_ids"][mask]
        losses = [
            checkpoint(self._chunk_loss, s, w, use_reentrant=False)
            for s, w in zip(states.split(self.chunk), wanted.split(self.chunk), strict=True)
        ]
        return torch.cat(losses)

    def _chunk_loss(self, states: Tensor, wanted: Tensor) -> Tensor:
        return cross_entropy(self.lm_head(states), wanted, reduction="none")

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        """Mean next-token cross-entropy over the batch's target tokens.

        Args:
            sentence_features: Source features (batch, seq) of the encoder's tokenizer and target
                features (batch, target_seq) of the LLM's tokenizer, both padded on the right.
            labels: Ignored; Sentence Transformers passes it.

        Returns:
            Scalar float32.
        """
        source, target = (_token_features(column) for column in sentence_features)
        lengths = source["attention_mask"].sum(dim=1) + target["attention_mask"].sum(dim=1)
        losses = [
            self.token_losses(_trim(source, rows), _trim(target, rows))
            for rows in micro_batches(lengths.cpu(), self.max_tokens)
        ]
        return torch.cat(losses).mean()
