"""A teacher beside the losses of stages 1 and 2: checked before work starts, its vectors computed before training.

They are kept on the disk (`lusifer.teacher.vectors`), so that training needs no teacher in memory, and a run that goes
on, a later stage or another run on the same texts computes none again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from transformers import PretrainedConfig

from lusifer.data.mixture import Mixture
from lusifer.data.prompts import Role
from lusifer.errors import LusiferError
from lusifer.loading import adapted_from, resolve
from lusifer.model.configuration import ADAPTED_TYPE
from lusifer.progress import track
from lusifer.recipes.schema import Recipe
from lusifer.teacher.vectors import TeacherVectors
from lusifer.training.checks import embedding_dimension
from lusifer.training.processes import on_machine, wait_for_all

logger = logging.getLogger(__name__)

TextsOf = Callable[[Sequence[dict[str, Any]]], tuple[list[str], list[Role]]]
_AT_ONCE = 4096  # Texts that the teacher gets together: sorted by length, they are padded little.


def check_teacher(recipe: Recipe, stage: str, encoder: PretrainedConfig, llm: PretrainedConfig) -> None:
    """Refuses a teacher whose space the model cannot answer in; warns where the encoder was adapted to another.

    Args:
        recipe: The recipe.
        stage: ``align`` or ``contrast``.
        encoder: Configuration of its encoder.
        llm: Configuration of its LLM.

    Raises:
        LusiferError: If the teacher cannot be loaded, the dimensions differ, or stage 1 has no adapted encoder.
    """
    name, chosen = getattr(recipe, stage).teacher, recipe.model
    if name is None:
        return
    adapted = encoder.model_type == ADAPTED_TYPE
    if stage == "align" and not adapted:
        raise LusiferError(
            "align.teacher needs an encoder from `lusifer adapt`, which has an embedding before the LLM; "
            "leave align.teacher out, or use contrast.teacher"
        )
    teacher = TeacherVectors(name)
    dimension = embedding_dimension(chosen, encoder, llm)
    if teacher.dimension != dimension:
        remedy = f"set model.head_dim: {teacher.dimension}, or give an encoder adapted to this teacher"
        if adapted:
            remedy = "give an encoder adapted to this teacher"
        raise LusiferError(
            f"{stage}.teacher {name!r} has vectors of {teacher.dimension} dimensions, the model of {dimension}; "
            + remedy
        )
    origin = adapted_from(resolve(chosen.encoder)) if adapted else None
    if origin is not None and origin["teacher_hash"] != teacher.hash:
        logger.warning("%s was adapted to %s, not to %s.teacher", chosen.encoder, origin.get("teacher"), stage)


def vectors_of(name: str | None, mixture: Mixture, texts_of: TextsOf, *, progress: bool) -> TeacherVectors | None:
    """A teacher that knows every text of a stage, held-out ones too; each process embeds its share. None without one.

    Args:
        name: The teacher.
        mixture: The examples of the stage.
        texts_of: Texts, without instructions, and roles of a step's examples.
        progress: Whether to show a bar.

    Raises:
        LusiferError: If the teacher cannot be loaded, or its vectors cannot be kept.
    """
    if name is None:
        return None
    teacher, texts, roles = TeacherVectors(name), list[str](), list[Role]()
    rank, size = on_machine()  # Each machine has a cache of its own.
    held_out, steps = mixture.held_out_examples()[rank::size], range(rank, mixture.steps, size)
    batches = chain(held_out, (_examples(mixture, step) for step in steps))
    total = len(held_out) + len(steps)
    for examples in track(batches, "teacher's vectors", "step", total=total, show=progress, keep=True):
        more = texts_of(examples)
        texts, roles = texts + more[0], roles + more[1]
        if len(texts) >= _AT_ONCE:
            teacher(texts, roles)
            texts, roles = [], []
    if texts:
        teacher(texts, roles)
    wait_for_all()
    teacher.release()
    return teacher


def _examples(mixture: Mixture, step: int) -> list[dict[str, Any]]:
    first = step * mixture.batch_size
    return [mixture[position] for position in range(first, first + mixture.batch_size)]
