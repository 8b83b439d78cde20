"""Stage 1: the frozen LLM reads soft tokens and must write the target (LUSIFER, arXiv 2501.00874, section 3.1).

Each length-sorted group of a batch runs forward and backward on its own. The state before each target token predicts
it; the LM head sees these states alone, slice by slice, so that logits are never kept. Each input embedding of the
target is replaced, with some probability, by a mask embedding: the LLM must read the soft tokens, not its own prefix.
Beside it an adapted encoder may be held to its teacher's vectors while it learns.
"""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lusifer.errors import LusiferError
from lusifer.hooks.transformers import no_load_report
from lusifer.model.backbones import SAFE_LOADING, load_part
from lusifer.model.token_batches import Features, micro_batches, padded_tokens, token_features, trim
from lusifer.teacher.loss import teacher_loss
from lusifer.training.gradient_cache import Backward, NoSync, gather, groups_within, world


class LMHead(nn.Module):
    """The LLM's next-token head: projection, then whatever scaling its family applies to logits.

    Args:
        weight: (vocab, llm_dim).
        bias: (vocab,) or None.
        config: Read for ``final_logit_softcapping`` (Gemma), ``logits_scaling`` (Granite), ``logit_scale`` (Cohere).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, config: PretrainedConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        factors = [float(getattr(config, name, None) or 1.0) for name in ("logit_scale", "logits_scaling")]
        self.scale = factors[0] / factors[1]

    def forward(self, hidden: Tensor) -> Tensor:
        """Maps states (tokens, llm_dim) to float32 logits (tokens, vocab)."""
        logits = nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias).float()
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def load_lm_head(name: str, llm: PreTrainedModel, *, revision: str | None = None, **hub: Any) -> LMHead:
    """Loads the frozen LM head of an LLM: the embedding matrix if tied, else read through a causal model of no layers.

    Args:
        name: Where the LLM was loaded from.
        llm: The LLM, without head.
        revision: Its hub revision.
        **hub: As for ``from_pretrained``.

    Raises:
        LusiferError: If it cannot be read.
    """
    config = AutoConfig.for_model(**llm.config.to_dict())
    if config.tie_word_embeddings:
        embeddings: Any = llm.get_input_embeddings()
        return LMHead(embeddings.weight.detach(), None, config)
    config.num_hidden_layers = 0
    if getattr(config, "layer_types", None):
        config.layer_types = []
    kwargs = {"config": config, "dtype": llm.dtype, "revision": revision or "main", **hub}
    with no_load_report():
        loader = partial(AutoModelForCausalLM.from_pretrained, **SAFE_LOADING)
        model, report = load_part("llm head", name, loader, **kwargs)
    if any("embed_tokens" not in key for key in report["missing_keys"]):
        raise LusiferError(f"the llm {name!r} has no LM head, which stage 1 needs: set align.enabled: false")
    head = model.get_output_embeddings()
    return LMHead(head.weight.detach().to(llm.device), getattr(head, "bias", None), config)


class _CrossEntropy(torch.autograd.Function):
    """Summed cross-entropy behind a frozen LM head; the gradient is made beside the logits."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, wanted: Tensor, head: LMHead, chunk: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        gradient = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        for begin in range(0, len(states), chunk):
            rows = slice(begin, begin + chunk)
            logits = head(states[rows])
            if head.softcap is not None and gradient is not None:
                slope = 1 - (logits / head.softcap) ** 2
            labels = (torch.arange(len(logits), device=logits.device), wanted[rows])
            logarithms = torch.log_softmax(logits, dim=1)
            total -= logarithms[labels].sum()
            if gradient is None:
                continue
            probabilities = logarithms.exp_()
            probabilities[labels] -= 1
            if head.softcap is not None:
                probabilities.mul_(slope)
            if head.scale != 1:
                probabilities.mul_(head.scale)
            gradient[rows] = (probabilities.to(head.weight.dtype) @ head.weight).to(gradient.dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad[0].to(gradient.dtype), None, None, None


def token_cross_entropy(states: Tensor, wanted: Tensor, head: LMHead, chunk: int = 256) -> Tensor:
    """Summed cross-entropy of tokens, a scalar differentiable once, without keeping logits; by liger-kernel on a GPU.

    Args:
        states: (tokens, llm_dim).
        wanted: (tokens,) int64.
        head: The LLM's head; it gets no gradient.
        chunk: States per slice.
    """
    # The head computes in its own precision, whatever autocast would choose for it.
    with torch.autocast(states.device.type, enabled=False):
        if states.is_cuda and head.scale == 1 and importlib.util.find_spec("liger_kernel") is not None:
            return _fused(states, wanted, head)
        return _CrossEntropy.apply(states, wanted, head, chunk)


def _fused(states: Tensor, wanted: Tensor, head: LMHead) -> Tensor:
    liger = importlib.import_module("liger_kernel.transformers")
    kernel = liger.LigerFusedLinearCrossEntropyLoss(reduction="sum", softcap=head.softcap)
    return kernel(head.weight, states.to(head.weight.dtype), wanted, head.bias).float()


class AlignmentLoss(nn.Module):
    """Mean next-token cross-entropy over the target tokens of the global batch.

    Args:
        lm_head: The LLM's head; it is never saved with the model.
        mask_embedding: (llm_dim,), what replaces a masked input of the target.
        mask_probability: Probability that a target input is masked in training: a number, or (start, end) of a line.
        max_tokens: Most padded tokens (source plus target) in one forward pass.
        chunk: States per slice of the LM head.
        teacher_weight: Weight of `lusifer.teacher.loss.teacher_loss` on an adapted encoder's own embedding, where a
            batch has a teacher's vectors.
        seed: With a row's position in the mixture, it alone decides what is masked.
    """

    def __init__(
        self,
        lm_head: LMHead,
        mask_embedding: Tensor,
        *,
        mask_probability: float | tuple[float, float] = 0.5,
        max_tokens: int = 8192,
        chunk: int = 256,
        teacher_weight: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.lm_head, self.mask_probability = lm_head, mask_probability
        self.max_tokens, self.chunk, self.seed = max_tokens, chunk, seed
        self.teacher_weight = teacher_weight
        self.register_buffer("mask_embedding", mask_embedding.detach().float(), persistent=False)

    def probability(self, progress: float) -> float:
        """Probability that a target input is masked at this share of the stage, in [0, 1]."""
        begin, end = np.broadcast_to(self.mask_probability, 2).tolist()
        return begin + (end - begin) * progress

    def choose_masked(self, target_mask: Tensor, positions: Tensor, progress: float) -> Tensor:
        """Chooses the target inputs to mask: (rows, target_seq) bool.

        Args:
            target_mask: (rows, target_seq), non-zero at real tokens, padded on the right.
            positions: (rows,) int64, each row's position in the mixture.
            progress: Share of the stage done, in [0, 1].
        """
        probability = self.probability(progress)
        chosen = np.zeros(target_mask.shape, dtype=bool)
        lengths = target_mask.long().sum(dim=1).tolist()
        for row, (position, length) in enumerate(zip(positions.tolist(), lengths, strict=True)):
            chosen[row, :length] = np.random.default_rng((self.seed, position)).random(length) < probability
        return torch.from_numpy(chosen).to(target_mask.device)

    def states(self, model: nn.Module, source: Features, target: Features, masked: Tensor | None) -> Tensor:
        """The states (supervised, llm_dim) that predict the real target tokens, row by row in order.

        Args:
            model: A `LusiferModel` or its distributed wrapper.
            source: ``input_ids`` and ``attention_mask`` (rows, source_seq) of the encoder's tokenizer.
            target: The same (rows, target_seq) of the LLM's tokenizer, padded on the right.
            masked: (rows, target_seq) bool, True at the target inputs to mask; None for none.
        """
        return self._read(model, source, target, masked).last_hidden_state

    def _read(self, model: nn.Module, source: Features, target: Features, masked: Tensor | None) -> Any:
        return model(
            source["input_ids"],
            source["attention_mask"],
            target_ids=target["input_ids"],
            target_mask=target["attention_mask"],
            target_masked=masked,
            mask_embedding=None if masked is None else self.mask_embedding,
        )

    def _group_loss(
        self,
        model: nn.Module,
        batch: dict[str, Any],
        rows: Tensor,
        progress: float,
        *,
        scale: float,
        every: Tensor | None,
    ) -> Tensor:
        """A group's part of the loss: ``scale`` is of its target tokens, ``every`` all ranks' teacher vectors."""
        source, target = (trim(token_features(batch[part]), rows) for part in ("source", "target"))
        masked = None
        if self.training and self.probability(progress) > 0:
            masked = self.choose_masked(target["attention_mask"], batch["positions"].cpu()[rows], progress)
        output = self._read(model, source, target, masked)
        wanted = target["input_ids"][target["attention_mask"].bool()]
        loss = token_cross_entropy(output.last_hidden_state, wanted, self.lm_head, self.chunk) * scale
        if every is None:
            return loss
        count = len(batch["positions"])
        part = _teacher_loss(output.pooler_output, every, rows, count)
        return loss + self.teacher_weight * len(rows) / count * part

    def forward(self, model: nn.Module, batch: dict[str, Any], *, progress: float = 0.0) -> Tensor:
        """The loss of this process's rows alone, in one graph: a scalar in float32.

        Args:
            model: A `LusiferModel` or its distributed wrapper.
            batch: ``source`` and ``target`` as for `states`; ``positions`` (rows,) int64 in the mixture; ``teacher``
                (rows, dim), a teacher's unit vectors of the sources.
            progress: Share of the stage done, in [0, 1].
        """
        groups = micro_batches(_lengths(batch).cpu(), self.max_tokens)
        scale, every = 1 / max(int(batch["target"]["attention_mask"].sum()), 1), batch.get("teacher")
        losses = [self._group_loss(model, batch, rows, progress, scale=scale, every=every) for rows in groups]
        return torch.stack(losses).sum()

    def step(
        self, model: nn.Module, batch: dict[str, Any], *, backward: Backward, no_sync: NoSync, progress: float = 0.0
    ) -> dict[str, float]:
        """Adds the gradient of the global batch's loss to the model's parameters, group by group.

        Args:
            model: A `LusiferModel` or its distributed wrapper.
            batch: This rank's rows, as for `forward`; the same number on every rank.
            backward: Back-propagates a scalar.
            no_sync: Context in which gradients are not reduced over the ranks.
            progress: Share of the stage done, in [0, 1].

        Returns:
            ``loss`` of the global batch; real ``tokens`` and share of ``padding`` on this rank; ``mask_probability``.

        Raises:
            LusiferError: If the ranks' batches differ in their number of rows.
        """
        lengths = _lengths(batch)
        counts = gather(torch.stack([batch["target"]["attention_mask"].sum(), lengths.new_tensor(len(lengths))]))
        if bool((counts[:, 1] != len(lengths)).any()):
            raise LusiferError(
                f"ranks hold different numbers of rows ({counts[:, 1].tolist()}); give each the same number"
            )
        # Wrappers average gradients over the ranks; the loss is one mean over the tokens of all of them.
        scale = len(counts) / max(int(counts[:, 0].sum()), 1)
        every = gather(batch["teacher"]).flatten(0, 1) if "teacher" in batch else None
        groups, _ = groups_within(lengths, self.max_tokens, 0)
        total = torch.zeros((), device=lengths.device)
        for index, rows in enumerate(groups):
            with nullcontext() if index == len(groups) - 1 else no_sync():
                loss = self._group_loss(model, batch, rows, progress, scale=scale, every=every)
                backward(loss)
            total += loss.detach()
        tokens, padded = float(lengths.sum()), sum(padded_tokens(lengths.cpu(), groups))
        metrics = {"loss": float(gather(total).mean()), "mask_probability": self.probability(progress)}
        return {**metrics, "tokens": tokens, "padding": 1 - tokens / max(padded, 1)}


def _teacher_loss(vectors: Tensor, every: Tensor, rows: Tensor, count: int) -> Tensor:
    """The teacher's loss of some of this process's ``count`` rows among those of the global batch."""
    first = world()[0] * count if len(every) > count else 0  # `forward` sees this process's rows alone.
    own = rows.to(every.device) + first
    others = torch.ones(len(every), dtype=torch.bool, device=every.device)
    others[own] = False
    with torch.autocast(vectors.device.type, enabled=False):
        return teacher_loss(nn.functional.normalize(vectors.float(), dim=-1), every[own], every[others])


def _lengths(batch: dict[str, Any]) -> Tensor:
    """(rows,) tokens of source and target."""
    return batch["source"]["attention_mask"].sum(dim=1) + batch["target"]["attention_mask"].sum(dim=1)


@torch.no_grad()
def held_out_metrics(loss: AlignmentLoss, model: nn.Module, batch: dict[str, Any]) -> dict[str, float]:
    """How much the LLM reads out of the soft tokens.

    Every target is predicted after its ``own`` soft tokens, those of ``other`` text (the next row's) and ``none`` (BOS
    and the added tokens alone), with its inputs ``visible`` and all masked (``hidden``).

    Args:
        loss: The loss of the stage.
        model: A `LusiferModel` or its distributed wrapper; left in the mode it was in.
        batch: As for `AlignmentLoss.forward`, of at least two rows.

    Returns:
        ``{inputs}_{soft tokens}_{metric}``: token ``accuracy`` and mean ``cross_entropy``, in nats.

    Raises:
        LusiferError: If the batch has a single row.
    """
    source, target = (token_features(batch[part]) for part in ("source", "target"))
    if len(source["input_ids"]) < 2:
        raise LusiferError("held-out metrics compare with another text's soft tokens: give at least two rows")
    other = {name: tensor.roll(1, dims=0) for name, tensor in source.items()}
    none = {**source, "attention_mask": torch.zeros_like(source["attention_mask"])}
    metrics: dict[str, float] = {}
    was_training = model.training
    model.eval()
    for inputs, masked in (("visible", None), ("hidden", target["attention_mask"].bool())):
        for name, features in (("own", source), ("other", other), ("none", none)):
            accuracy, entropy = _scores(loss, model, features, target, masked)
            metrics |= {f"{inputs}_{name}_accuracy": accuracy, f"{inputs}_{name}_cross_entropy": entropy}
    model.train(was_training)
    return metrics


def _scores(
    loss: AlignmentLoss, model: nn.Module, source: Features, target: Features, masked: Tensor | None
) -> tuple[float, float]:
    """Token accuracy and mean cross-entropy of a batch."""
    hits, entropy, count = 0, 0.0, 0
    for rows in micro_batches(_lengths({"source": source, "target": target}).cpu(), loss.max_tokens):
        few = trim(target, rows)
        states = loss.states(model, trim(source, rows), few, None if masked is None else few["attention_mask"].bool())
        wanted = few["input_ids"][few["attention_mask"].bool()]
        for part, tokens in zip(states.split(loss.chunk), wanted.split(loss.chunk), strict=True):
            hits += int((loss.lm_head(part).argmax(dim=1) == tokens).sum())
        entropy += float(token_cross_entropy(states, wanted, loss.lm_head, loss.chunk))
        count += len(wanted)
    return hits / max(count, 1), entropy / max(count, 1)
