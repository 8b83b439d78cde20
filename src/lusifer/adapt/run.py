"""``lusifer adapt``: from a teacher, or its vectors, to a model that answers in its space in many languages.

1. Checks: the teacher, the texts, the encoder, the folder.
2. The closed form (`lusifer.adapt.collect`), the MLP beside it and the encoder's upper half (`lusifer.adapt.fit`).
3. A report, and the model.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lusifer.adapt.collect import (
    Collected,
    Deadlines,
    Dictionary,
    Prepared,
    collect,
    dictionary,
    load_dictionary,
    pieces_within,
    prepare,
)
from lusifer.adapt.fit import Rates, hold_back, train_encoder, train_head
from lusifer.adapt.modeling import LayerHead
from lusifer.adapt.report import agreement
from lusifer.adapt.saving import save, sentence_transformer
from lusifer.adapt.sources import Source, open_source
from lusifer.adapt.student import Student
from lusifer.adapt.switching import Switcher
from lusifer.adapt.work import Clock, Work
from lusifer.errors import LusiferError
from lusifer.model.fingerprint import model_hash
from lusifer.model.text_encoder import TextEncoder, choose_dtype
from lusifer.progress import bar
from lusifer.publishing import write_json

logger = logging.getLogger(__name__)

ENCODER = "starter:multilingual-e5-small"
_SHARES = {"dictionary": 0.15, "states": 0.62, "vectors": 0.0, "head": 0.92}  # Of the time, when no encoder is trained.
_LONG = {"dictionary": 0.06, "states": 0.22, "vectors": 0.32, "head": 0.36, "encoder": 0.97}
_CLOCK, _PRECISION = "clock.json", "precision.json"
_PRECISIONS = ("auto", "float32", "bfloat16")
_KEPT_EVERY = 20.0  # Seconds: what a kill takes from the count of the time.


@dataclass(frozen=True)
class _Pace:
    """What suits the speed of a device.

    Attributes:
        worth_it: Minutes from which the encoder learns too: below, it would get a few hundred steps.
        tokens: Padded tokens of a step.
        rates: How head and encoder learn.
    """

    worth_it: float
    tokens: int
    rates: Rates


_ON_CPU = _Pace(15.0, 2_048, Rates())
_ON_GPU = _Pace(2.0, 32_768, Rates(encoder=8e-5, dropout=True))  # Larger steps, and each text many times.


@dataclass(frozen=True)
class Options:
    """What a run may be asked for.

    Attributes:
        encoder: Hub id, folder or starter name of the multilingual encoder.
        texts: Files of English text; with ``general`` beside the bundled text.
        general: Whether the bundled text is used.
        text_column: Column of the text in files and tables.
        vector_column: Column of the vectors in a table.
        minutes: Time for everything; no limit when None, where the counts below end it.
        most_texts: Texts used at most.
        most_stored: Texts at most whose states are kept on the disk, for the MLP.
        most_pieces: Pieces of the encoder's vocabulary at most that words are switched to, the most frequent ones; as
            many as the time allows when None, all without a limit.
        head_epochs: Passes over the stored states to train the MLP; 0 leaves it out.
        encoder_steps: Steps of the encoder; 0 keeps it frozen, None as many as the time allows, none without a limit.
        plain: Only the last layer and no MLP: the model then loads without lusifer.
        precision: ``float32`` or ``bfloat16`` of the encoder's matrix products; ``auto`` takes bfloat16 where it is
            faster, decided once a run.
        device: Torch device; the best there is when None.
        seed: Of order and chance.
        restart: Throw away unfinished work.
    """

    encoder: str = ENCODER
    texts: tuple[str, ...] = ()
    general: bool = True
    text_column: str | None = None
    vector_column: str | None = None
    minutes: float | None = 10.0
    most_texts: int = 200_000
    most_stored: int = 60_000
    most_pieces: int | None = None
    head_epochs: int = 12
    encoder_steps: int | None = None
    plain: bool = False
    precision: str = "auto"
    device: str | None = None
    seed: int = 0
    restart: bool = False


def adapt(teacher: str, output: Path, options: Options | None = None, *, progress: bool = True) -> dict[str, Any]:
    """Trains a model that answers in a teacher's vector space, and returns the report; the model is ``output/model``.

    An interrupted run goes on where it stopped when it is called again.

    Args:
        teacher: Folder or hub id of a Sentence Transformers model; or a table of texts and vectors, as
            `lusifer.data.vector_tables.open_vectors` takes it.
        output: Folder of the result.
        options: Everything else.
        progress: Whether to show bars.

    Raises:
        LusiferError: If teacher, texts or encoder cannot be used, or the folder holds another run.
    """
    options = options or Options()
    if options.precision not in _PRECISIONS:
        raise LusiferError(f"no precision {options.precision!r}; there are {', '.join(_PRECISIONS)}")
    torch.manual_seed(options.seed)
    began = time.monotonic()
    source = open_source(teacher, options)
    student = Student(options.encoder, asymmetric=source.asymmetric, device=options.device)
    if options.plain:
        student.layers = student.layers[-1:]
    work = Work(output / "work", _plan(source, options), restart=options.restart)
    used = float(work.read(_CLOCK).get("seconds", 0)) + time.monotonic() - began
    run = _Run(source, student, work, Clock(options.minutes, used), options, progress)
    try:
        report = run.all_steps(output)
        write_json(output / "report.json", report)
        return report
    finally:
        run.keep_time(0)
        work.close()


def _plan(source: Source, options: Options) -> dict[str, Any]:
    """What an unfinished run must have in common with this one to be gone on with."""
    encoder = {"encoder": options.encoder, "encoder_hash": model_hash(options.encoder, "encoder:")}
    plan = {"teacher_hash": source.hash, **encoder, "texts": source.texts_hash}
    return {**plan, "plain": options.plain, "seed": options.seed, "layout": 1}


class _Run:
    """The steps of one run, in their order."""

    def __init__(
        self, source: Source, student: Student, work: Work, clock: Clock, options: Options, progress: bool
    ) -> None:
        self.source, self.student, self.work, self.clock = source, student, work, clock
        self.options, self.progress = options, progress
        trains = options.encoder_steps != 0 and not options.plain
        self.pace = _ON_CPU if student.device.type == "cpu" else _ON_GPU
        long = trains and (options.minutes or 0) >= self.pace.worth_it
        self.shares = _LONG if long else _SHARES
        self.encoder_steps = options.encoder_steps or (None if long else 0)
        self._kept = 0.0

    def all_steps(self, output: Path) -> dict[str, Any]:
        """From texts to the saved model."""
        source, student, options = self.source, self.student, self.options
        texts = prepare(student, source.train, source.held_out, source.roles)
        device = student.device
        self._choose_precision()
        with self._bar("dictionary", 1.0) as shown:

            def compute() -> Dictionary:
                most = options.most_pieces or pieces_within(student, self.clock, self.shares["dictionary"])
                return dictionary(student, texts.train.vocabulary, most=most, tick=shown.update)

            matches = load_dictionary(self.work, compute)
            shown.update(1 - shown.n)
        if not matches:
            logger.warning("the encoder's vocabulary has no whole words to switch to: training on plain English only")
        switcher = Switcher(matches, device)
        data = self._collect(texts, switcher)
        head, columns = self._start(data)
        closed = self._agreement(head, data, columns)
        taken = [f"closed form of layers {list(data.form.layers)}"]
        if not options.plain and options.head_epochs:
            self._train_head(head, data, columns)
            kept = hold_back(head, data, columns)
            taken.append("MLP" if kept == 1 else f"MLP, {kept:.0%} of it kept")
        if self.encoder_steps != 0:
            steps = self._train_encoder(head, texts, data, switcher)
            taken.append(f"{steps:,} steps of the encoder")
        student.encoder.requires_grad_(False)
        return self._finish(output, head, list(data.form.layers), data, closed, taken)

    def keep_time(self, least: float = _KEPT_EVERY) -> None:
        """Writes the time used, if so many seconds went by since it was written."""
        if self.clock.used - self._kept >= least:
            self._kept = self.clock.used
            self.work.write(_CLOCK, self.clock.elapsed())

    def _choose_precision(self) -> None:
        """Decides the precision once a run: a timing that comes out otherwise later must not change its steps."""
        student, name = self.student, self.options.precision
        if name == "auto":
            name = self.work.read(_PRECISION).get("precision", "auto")
        if name == "auto":
            name = choose_dtype(student.device, (4 * student.width, student.width), training=True).name
        self.work.write(_PRECISION, {"precision": name})
        student.bfloat16 = name == "bfloat16"

    def _collect(self, texts: Prepared, switcher: Switcher) -> Collected:
        with self._bar("closed form", len(texts.train), "text") as shown:
            return collect(
                self.work,
                self.student,
                texts,
                switcher,
                self.source.vectors,
                self.source.held_out_vectors(),
                deadlines=Deadlines(
                    partial(self.clock.until, self.shares["states"]), partial(self.clock.until, self.shares["vectors"])
                ),
                most_stored=self.options.most_stored,
                seed=self.options.seed,
                bar=partial(self._advance, shown),
            )

    def _start(self, data: Collected) -> tuple[LayerHead, Tensor]:
        """The head at the closed form, and the places of its inputs among the stored states."""
        form, width = data.form, self.student.width
        hidden = 0 if self.options.plain or not self.options.head_epochs else _hidden(data.stored)
        head = LayerHead(form.matrix.shape[1], form.matrix.shape[0], hidden)
        head.start_from({name: getattr(form, name) for name in ("matrix", "bias", "mean", "deviation")})
        columns = torch.cat([torch.arange(width) + self.student.layers.index(layer) * width for layer in form.layers])
        return head.to(self.student.device), columns

    @torch.no_grad()
    def _agreement(self, head: LayerHead, data: Collected, columns: Tensor) -> dict[str, float]:
        states, targets = data.held_out
        vectors = torch.nn.functional.normalize(head(states[:, columns].to(self.student.device)), dim=1)
        return agreement(vectors.cpu().numpy(), targets.numpy())

    def _train_head(self, head: LayerHead, data: Collected, columns: Tensor) -> None:
        with self._bar("MLP", 1.0) as shown:
            train_head(
                self.work,
                head,
                data,
                columns,
                epochs=self.options.head_epochs,
                seconds=max(1.0, self.clock.until(self.shares["head"])),
                rates=self.pace.rates,
                seed=self.options.seed,
                bar=partial(self._advance, shown),
            )

    def _train_encoder(self, head: LayerHead, texts: Prepared, data: Collected, switcher: Switcher) -> int:
        with self._bar("encoder", 1.0) as shown:
            return train_encoder(
                self.work,
                self.student,
                head,
                data.form.layers,
                texts.train.all(),
                data,
                switcher,
                steps=self.encoder_steps,
                seconds=max(1.0, self.clock.until(self.shares.get("encoder", 0.95))),
                tokens=self.pace.tokens,
                rates=self.pace.rates,
                seed=self.options.seed,
                bar=partial(self._advance, shown),
            )

    def _finish(
        self,
        output: Path,
        head: LayerHead,
        layers: list[int],
        data: Collected,
        closed: dict[str, float],
        taken: list[str],
    ) -> dict[str, Any]:
        student, source = self.student, self.source
        model = sentence_transformer(
            student.encoder, student.tokenizer, head, layers, window=student.window, prompts=student.prompts
        )
        encoder = TextEncoder(model)

        def queries(texts: Any) -> np.ndarray:
            return encoder.encode([student.prompts["query"] + text for text in texts])

        prompts = [student.prompts[role] for role in source.roles[len(source.train) :]]
        english = encoder.encode([a + b for a, b in zip(prompts, source.held_out, strict=True)])
        report: dict[str, Any] = {
            "teacher": source.name,
            "encoder": self.options.encoder,
            "english": agreement(english, source.held_out_vectors().numpy()),
            "closed_form": {**closed, "layers": layers, "penalty": data.form.penalty},
            **source.everyday(queries),
            "texts": data.texts,
            "left_out": source.left_out,
            "source": source.described,
            "steps": ", ".join(taken),
            "precision": "bfloat16" if student.bfloat16 else "float32",
            "seconds": round(self.clock.used),
        }
        origin = {"teacher": source.name, "teacher_hash": source.hash, "dimension": source.dimension}
        save(model, output / "model", origin, report)
        return report

    def _advance(self, shown: Any, done: float, loss: float | None = None) -> None:
        if loss is not None:
            shown.note(f"loss {loss:.3f}")
        shown.update(min(done, max(0.0, shown.total - shown.n)))
        self.keep_time()

    def _bar(self, what: str, total: float, unit: str = "") -> Any:
        return bar(total, what, unit, show=self.progress)


def _hidden(texts: int) -> int:
    """Width of the MLP: 2,048, less where there are few texts."""
    return int(min(2_048, max(64, texts // 16 // 32 * 32)))
