"""What the closed form needs, block by block: the dictionary, the teacher's vectors and the encoder's mean states.

1. Words of the texts and of the encoder's vocabulary are matched (`lusifer.adapt.switching`).
2. For each block of texts: the teacher's vectors, the mean states of the texts and those of a code-switched copy.
3. Both kinds of states go into the sums of one regression, and in float16 to the disk, for the MLP.

After every block a resumed run goes on; with a limit in time, no block is begun after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lusifer.adapt.closed_form import ClosedForm, Moments, choose
from lusifer.adapt.student import Student
from lusifer.adapt.switching import Dictionary, Pairs, Switcher, foreign_pieces, match_scripts
from lusifer.adapt.tokens import Tokenizing, TokenTexts, count_words, tokenize
from lusifer.adapt.work import Clock, Work
from lusifer.teacher.embedder import check_vectors

_PROGRESS = "collected.json"
_MOMENTS = "moments.safetensors"
_LEAST_COUNT = 3  # Of an English word that is switched.
_MOST_WORDS = 20_000


class Prepared(NamedTuple):
    """Texts to learn from, and held-out ones."""

    train: Tokenizing
    held_out: TokenTexts


def prepare(student: Student, train: Sequence[str], held_out: Sequence[str], roles: Sequence[str]) -> Prepared:
    """Texts as the student reads them.

    Args:
        student: The student.
        train: Texts to learn from.
        held_out: Held-out texts.
        roles: ``query`` or ``document`` of each text, those to learn from first.
    """
    vocabulary = count_words(train, least=_LEAST_COUNT)[:_MOST_WORDS]
    prompts = [student.prompts[role] for role in roles]
    options: Any = {"max_length": student.longest}
    held = tokenize(student.tokenizer, held_out, prompts[len(train) :], vocabulary, **options)
    return Prepared(Tokenizing(student.tokenizer, train, prompts, vocabulary, student.longest), held)


def dictionary(
    student: Student, vocabulary: Sequence[str], *, most: int | None, tick: Callable[[float], object] = lambda _: None
) -> Dictionary:
    """Matches the student's vocabulary with English words.

    Args:
        student: The student.
        vocabulary: The English words.
        most: Pieces of the student's vocabulary that are tried; all when None.
        tick: Called with the share of the work that each batch was.
    """
    pieces = foreign_pieces(student.tokenizer, vocabulary, most=most)
    if not pieces:
        return {}
    last = student.layers[-1:]

    # Matching wants both sides; half as many English words, the most frequent, cover nearly all of the texts.
    vocabulary = vocabulary[: len(vocabulary) if most is None else max(3_000, most // 2)]
    every = len(vocabulary) + sum(map(len, pieces.values()))

    def states(texts: TokenTexts) -> Tensor:
        rows = torch.arange(len(texts))
        return student.states(texts, rows, layers=last, tick=lambda done: tick(done / every)).to(student.device)

    english = tokenize(student.tokenizer, vocabulary, [student.prompts["query"]] * len(vocabulary), [], max_length=32)
    vectors = {script: states(student.piece_texts(ids)) for script, ids in pieces.items()}
    return match_scripts(vectors, states(english), pieces)


def load_dictionary(work: Work, compute: Callable[[], Dictionary]) -> Dictionary:
    """The dictionary of a run, computed once."""

    def flat() -> dict[str, Tensor]:
        pairs = compute()
        return {f"{script}.{part}": getattr(p, part) for script, p in pairs.items() for part in ("words", "pieces")}

    tensors = work.tensors("dictionary.safetensors", flat)
    scripts = sorted({name.rpartition(".")[0] for name in tensors})
    return {script: Pairs(tensors[f"{script}.words"], tensors[f"{script}.pieces"]) for script in scripts}


@dataclass
class Collected:
    """What the training of the head and of the encoder starts from.

    Attributes:
        form: The closed form.
        targets: (texts, dim) float16 unit vectors of the teacher, on the disk.
        states: (2 x stored, inputs) float16 mean states, plain and switched in turn, on the disk.
        texts: Texts collected: the first so many.
        stored: Texts whose states are stored: the first so many of them.
        held_out: Mean states and unit vectors of the held-out texts, plain, (n, inputs) and (n, dim).
        judges: The same of plain and switched held-out texts, one after the other.
    """

    form: ClosedForm
    targets: Any
    states: Any
    texts: int
    stored: int
    held_out: tuple[Tensor, Tensor]
    judges: tuple[Tensor, Tensor]

    def teacher_vectors(self) -> Tensor:
        """(texts, dim) float16, still on the disk."""
        return torch.from_numpy(np.asarray(self.targets[: self.texts]))


class Deadlines(NamedTuple):
    """Seconds left for blocks with mean states, and for blocks with the teacher's vectors alone."""

    states: Callable[[], float]
    vectors: Callable[[], float]


def collect(
    work: Work,
    student: Student,
    texts: Prepared,
    switcher: Switcher,
    vectors: Callable[[Tensor], np.ndarray],
    held_out: Tensor,
    *,
    deadlines: Deadlines,
    most_stored: int,
    seed: int,
    bar: Callable[[int], object],
) -> Collected:
    """Goes through the texts and solves the regression.

    The first texts get the teacher's vectors and mean states, plain and switched. Later ones, of which the encoder
    learns, get the teacher's vectors alone, at a fifth of the cost.

    Args:
        work: Where files go.
        student: The student.
        texts: The texts.
        switcher: Makes the code-switched copies.
        vectors: From rows of the texts to the teacher's (n, dim) unit vectors.
        held_out: (n, dim) the teacher's vectors of the held-out texts.
        deadlines: Seconds left; the first block is done in any case.
        most_stored: Most texts with mean states.
        seed: Of the copies.
        bar: Called with the number of texts of each block.
    """
    inputs, dim, count = student.width * len(student.layers), held_out.shape[1], len(texts.train)
    room = min(most_stored, count)
    targets, states = work.rows("targets.f16", count, dim), work.rows("states.f16", 2 * room, inputs)
    moments, complete = Moments(inputs, dim), work.read(_PROGRESS).get("complete", False)
    done, stored, sums = _resumed(work)
    if done:
        moments.sums = sums
        texts.train.next(done)
        bar(done)
    while done < count and not complete:
        with_states = stored == done and done < room and (deadlines.states() > 0 or done == 0)
        if not with_states and deadlines.vectors() <= 0:
            break
        rows = torch.arange(done, min(done + student.block, room if with_states else count))
        wanted = vectors(rows)
        check_vectors(wanted, "the teacher")
        targets[done : done + len(rows)] = wanted
        block, goal = texts.train.next(len(rows)), torch.from_numpy(wanted)
        if with_states:
            plain, switched = _both_states(student, block, switcher, seed + done)
            for part in (plain,) if switcher.empty else (plain, switched):
                moments.add(part, goal)
            pairs = torch.stack([plain, switched], dim=1).reshape(-1, inputs)
            states[2 * done : 2 * (done + len(rows))] = pairs.numpy()
            stored += len(rows)
        done += len(rows)
        targets.flush()
        states.flush()
        # One file says both how far the work is and what the sums are: a kill cannot part them.
        work.save(_MOMENTS, {f"{done}.{stored}": moments.sums})
        bar(len(rows))
    work.write(_PROGRESS, {"complete": True})
    known = _held_out_states(work, student, texts.held_out, switcher, seed)
    judges = torch.cat(list(known)), torch.cat([held_out] * len(known))
    form = choose(moments, student.layers, *judges)
    return Collected(form, targets, states, done, stored, (known[0], held_out), judges)


def _both_states(student: Student, block: TokenTexts, switcher: Switcher, seed: int) -> tuple[Tensor, Tensor]:
    """Mean states of texts and of their code-switched copies."""
    rows, generator = torch.arange(len(block)), torch.Generator(student.device).manual_seed(seed)
    return student.states(block, rows), student.states(block, rows, switcher=switcher, generator=generator)


def _resumed(work: Work) -> tuple[int, int, Tensor]:
    """Texts that are done, those that are in the sums on the disk, and these."""
    if not work.path(_MOMENTS).is_file():
        return 0, 0, torch.empty(0)
    ((name, sums),) = work.load(_MOMENTS).items()
    done, stored = name.split(".")
    return int(done), int(stored), sums


def _held_out_states(
    work: Work, student: Student, texts: TokenTexts, switcher: Switcher, seed: int
) -> Sequence[Tensor]:
    """Mean states of held-out texts, plain and switched."""
    rows = torch.arange(len(texts))

    def compute() -> dict[str, Tensor]:
        generator = torch.Generator(student.device).manual_seed(seed - 1)
        result = {"plain": student.states(texts, rows)}
        if not switcher.empty:
            result["switched"] = student.states(texts, rows, switcher=switcher, generator=generator)
        return result

    return list(work.tensors("held_out.safetensors", compute).values())


def pieces_within(student: Student, clock: Clock, share: float) -> int | None:
    """How many pieces of the vocabulary can be encoded in a share of the time, measured; all without a limit."""
    left = clock.until(share)
    if left == float("inf"):
        return None
    sample = list(range(min(512, len(student.tokenizer))))
    begin = clock.used
    student.states(student.piece_texts(sample), torch.arange(len(sample)), layers=student.layers[-1:])
    rate = len(sample) / max(clock.used - begin, 1e-6)
    return max(5_000, int(0.5 * left * rate))  # The rest is for English words and for matching.
