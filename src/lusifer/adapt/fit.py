"""Gradient steps towards the teacher: first the MLP beside the closed form, on stored states; then the encoder's upper
layers together with the head, code-switching on the fly.

A step's texts and its chance follow from the seed and the step's number alone, so that a resumed run takes the same
steps as one that was not interrupted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from lusifer.adapt.collect import Collected
from lusifer.adapt.modeling import LayerHead, mean_states
from lusifer.adapt.student import Student
from lusifer.adapt.switching import Switcher
from lusifer.adapt.tokens import TokenTexts, batches_by_length
from lusifer.adapt.work import Work
from lusifer.teacher.loss import teacher_loss

_HEAD_BANK, _ENCODER_BANK = 4_096, 16_384  # Teacher's vectors that a step's neighbourhoods are compared in.
_ENCODER_NEIGHBOURS = 8.0  # Weight of that comparison while the encoder learns.
_HEAD_ROWS = 1_024
_EVERY = 60.0  # Seconds between checkpoints.
_SHARES_KEPT = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # Of what the head learnt.
_ENCODER_KEPT = 0.8  # Of what encoder and head learnt together.
_POOL = 16  # Batches that are drawn together and sorted by length.


@dataclass(frozen=True)
class Rates:
    """How a run trains.

    Attributes:
        encoder: Peak learning rate of AdamW for the encoder's upper half.
        linear: That of the head's linear map.
        mlp: That of its MLP.
        warm_up: Share of the schedule in which the rates rise.
        switched: Share of the texts that are code-switched.
        dropout: Whether the encoder's own dropout is on, for runs that see a text many times.
    """

    encoder: float = 4e-5
    linear: float = 5e-5
    mlp: float = 5e-4
    warm_up: float = 0.03
    switched: float = 0.5
    dropout: bool = False


class Loop:
    """Steps of AdamW with a cosine schedule that ends with the steps or with the time, whatever comes first.

    Args:
        work: Where checkpoints go.
        name: File of the checkpoint.
        groups: Parameters and their peak learning rates.
        steps: Most steps; None where time alone ends it.
        seconds: Time; infinite where steps alone end it.
        warm_up: Share of the schedule.
        bar: Called after each step with the share of the schedule that it took and the loss.
    """

    def __init__(
        self,
        work: Work,
        name: str,
        groups: Sequence[tuple[Sequence[nn.Parameter], float, float]],
        *,
        steps: int | None,
        seconds: float,
        warm_up: float,
        bar: Callable[[float, float], object],
    ) -> None:
        self.work, self.name, self.bar = work, name, bar
        self.steps, self.seconds, self.warm_up = steps or math.inf, seconds, warm_up
        self.parameters = [p for parameters, *_ in groups for p in parameters]
        self.optimizer = torch.optim.AdamW(
            [{"params": list(ps), "lr": rate, "peak": rate, "weight_decay": decay} for ps, rate, decay in groups],
            betas=(0.9, 0.98),
        )
        self.step, self._before = 0, 0.0
        self._resume()
        self._began = self._saved = time.monotonic()

    @property
    def done(self) -> float:
        """Share of the schedule, 0 to 1."""
        used = self._before + time.monotonic() - self._began
        return min(1.0, max(self.step / self.steps, used / self.seconds))

    def run(self, loss_of: Callable[[int], Tensor]) -> None:
        """Takes steps until the end; ``loss_of`` gets the step's number."""
        share = self.done
        while share < 1:
            factor = min(1.0, (share + 1e-9) / self.warm_up) * (0.5 * (1 + math.cos(math.pi * share)) * 0.98 + 0.02)
            for group in self.optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            loss = loss_of(self.step)
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            before, share = share, self.done
            self.bar(share - before, loss.item())
            if time.monotonic() - self._saved > _EVERY:
                self.save()
        self.save()

    def save(self) -> None:
        """Writes the checkpoint: parameters, the optimizer's moments, step and time."""
        used = self._before + time.monotonic() - self._began
        tensors = {"step": torch.tensor([float(self.step), used], dtype=torch.float64)}
        for number, parameter in enumerate(self.parameters):
            state = self.optimizer.state.get(parameter) or {}
            kept = {"value": parameter, **{key: state[key] for key in ("exp_avg", "exp_avg_sq") if key in state}}
            tensors |= {f"{number}.{key}": value for key, value in kept.items()}
        self.work.save(self.name, tensors)
        self._saved = time.monotonic()

    def _resume(self) -> None:
        if not self.work.path(self.name).is_file():
            return
        tensors = self.work.load(self.name)
        step, self._before = tensors.pop("step").tolist()
        self.step = int(step)
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters):
                parameter.copy_(tensors[f"{number}.value"])
                if f"{number}.exp_avg" in tensors:
                    state: dict[str, Any] = {"step": torch.tensor(step)}
                    for key in ("exp_avg", "exp_avg_sq"):
                        state[key] = tensors[f"{number}.{key}"].to(parameter.device)
                    self.optimizer.state[parameter] = state


def _head_groups(head: LayerHead, linear: float, mlp: float) -> list[tuple[list[nn.Parameter], float, float]]:
    groups = [(list(head.linear.parameters()), linear, 0.0)]
    if head.up is not None and head.down is not None:
        groups.append(([*head.up.parameters(), *head.down.parameters()], mlp, 0.01))
    return groups


def _bank(targets: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """The teacher's vectors of a run of texts, which are in random order: (n, dim) float32."""
    size = min(size, len(targets))
    first = int(torch.randint(len(targets) - size + 1, (), generator=generator))
    return targets[first : first + size].float()


def train_head(
    work: Work,
    head: LayerHead,
    data: Collected,
    columns: Tensor,
    *,
    epochs: int,
    seconds: float,
    rates: Rates,
    seed: int,
    bar: Callable[[float, float], object],
) -> None:
    """Trains the head on the stored states, plain and switched.

    Args:
        work: Where checkpoints go.
        head: The head, started from the closed form.
        data: Stored states and targets.
        columns: The inputs of the head among the stored states.
        epochs: Most passes over the states.
        seconds: Time for it.
        rates: Learning rates.
        seed: Of the order.
        bar: As for `Loop`.
    """
    count = 2 * data.stored
    per_epoch = max(1, count // _HEAD_ROWS)
    groups = _head_groups(head, rates.linear, rates.mlp)
    steps = epochs * per_epoch
    loop = Loop(work, "head.safetensors", groups, steps=steps, seconds=seconds, warm_up=rates.warm_up, bar=bar)
    device = head.linear.weight.device
    every = data.teacher_vectors()

    def loss_of(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        # Sorted: the table is on the disk.
        rows = torch.randint(count, (min(_HEAD_ROWS, count),), generator=generator).sort().values
        states = torch.from_numpy(data.states[rows.numpy()].astype(np.float32))[:, columns]
        bank = _bank(every, _HEAD_BANK, generator)
        vectors = normalize(head(states.to(device)), dim=1)
        return teacher_loss(vectors, every[rows // 2].float().to(device), bank.to(device))

    loop.run(loss_of)


@torch.no_grad()
def hold_back(head: LayerHead, data: Collected, columns: Tensor) -> float:
    """Takes back as much of what the head learnt as makes held-out texts agree best with the teacher.

    On few texts the MLP learns them by heart. Trained and closed form are averaged (arXiv 2109.01903), 0 to 1, so that
    the result is never worse than the closed form there.

    Args:
        head: The trained head; changed in place.
        data: The closed form and the held-out texts.
        columns: The inputs of the head among the states.

    Returns:
        The share that is kept.
    """
    device = head.linear.weight.device
    matrix, bias = data.form.matrix.to(device), data.form.bias.to(device)
    states, targets = (part.to(device) for part in data.judges)
    states = states[:, columns]
    start = linear(states, matrix, bias)
    change = head(states) - start
    agreement = {
        share: float((normalize(start + share * change, dim=1) * targets).sum(1).mean()) for share in _SHARES_KEPT
    }
    best = max(agreement, key=lambda share: agreement[share])
    head.linear.weight.lerp_(matrix, 1 - best)
    head.linear.bias.lerp_(bias, 1 - best)
    if head.down is not None:
        head.down.weight.mul_(best)
    return best


def train_encoder(
    work: Work,
    student: Student,
    head: LayerHead,
    layers: Sequence[int],
    texts: TokenTexts,
    data: Collected,
    switcher: Switcher,
    *,
    steps: int | None,
    seconds: float,
    tokens: int,
    rates: Rates,
    seed: int,
    bar: Callable[[float, float], object],
) -> int:
    """Trains the encoder's upper half together with the head, and returns the number of steps.

    Of what they learnt 0.8 is kept (arXiv 2109.01903): that is worth half a point in languages beyond the texts'.

    Args:
        work: Where checkpoints go.
        student: The student.
        head: The head.
        layers: Layers whose mean states the head reads.
        texts: The tokenised texts; the first ``data.texts`` have targets.
        data: Their targets.
        switcher: Switches words.
        steps: Most steps; None where time alone ends it.
        seconds: Time for it.
        tokens: Padded tokens of a batch.
        rates: Learning rates.
        seed: Of texts and words.
        bar: As for `Loop`.
    """
    upper = student.trainable_layers(int(student.encoder.config.num_hidden_layers) // 2)
    start = [parameter.detach().clone() for parameter in [*upper, *head.parameters()]]
    groups = [(upper, rates.encoder, 0.0), *_head_groups(head, rates.linear, rates.mlp)]
    loop = Loop(work, "encoder.safetensors", groups, steps=steps, seconds=seconds, warm_up=rates.warm_up, bar=bar)
    draw, device = _Draw(texts.lengths[: data.texts], tokens, seed), student.device
    every = data.teacher_vectors().to(device)
    texts = texts.to(device)
    student.encoder.train(rates.dropout)

    def loss_of(step: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + step)
        if rates.dropout:  # It draws from the global generator.
            torch.manual_seed(seed * 1_000_003 + step)
        rows = draw(step).to(device)
        ids, mask = switcher(*texts.batch(rows, student.pad, device), rates.switched, generator)
        with student.autocast():
            states = mean_states(student.encoder, ids, mask, list(layers))
        vectors = normalize(head(states.float()), dim=1)
        bank = _bank(every, _ENCODER_BANK, torch.Generator().manual_seed(seed + step))
        return teacher_loss(vectors, every[rows].float(), bank, neighbours=_ENCODER_NEIGHBOURS)

    loop.run(loss_of)
    student.encoder.eval()
    with torch.no_grad():
        for parameter, before in zip([*upper, *head.parameters()], start, strict=True):
            parameter.lerp_(before, 1 - _ENCODER_KEPT)
    return loop.step


class _Draw:
    """Batches of texts of like length: a pool of random texts, sorted, cut by tokens, in random order."""

    def __init__(self, lengths: Tensor, tokens: int, seed: int) -> None:
        self.lengths, self.tokens, self.seed = lengths, tokens, seed
        self.size = max(1, int(_POOL * tokens / float(lengths.float().mean())))
        self._pool = -1
        self._batches: list[Tensor] = []

    def __call__(self, step: int) -> Tensor:
        """Rows of a step's batch."""
        pool, place = divmod(step, _POOL)
        if pool != self._pool:
            generator = torch.Generator().manual_seed(self.seed * 7_919 + pool)
            rows = torch.randint(len(self.lengths), (self.size,), generator=generator)
            batches = [rows[part] for part in batches_by_length(self.lengths[rows], self.tokens)]
            order = torch.randperm(len(batches), generator=generator).tolist()
            self._pool, self._batches = pool, [batches[index] for index in order]
        return self._batches[place % len(self._batches)]
