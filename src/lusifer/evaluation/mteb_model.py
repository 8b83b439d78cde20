"""A model as mteb wants it, with what stands in front of texts, by task or type of task."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import mteb
import yaml
from mteb.models.abs_encoder import AbsEncoder, get_prompt_name
from sentence_transformers import SimilarityFunction
from torch.utils.data import DataLoader

from lusifer.data.prompts import prompt_for, with_instruction
from lusifer.errors import LusiferError, first_line
from lusifer.evaluation.cache import EmbeddingCache
from lusifer.evaluation.systems import Embedder
from lusifer.recipes.files import load_yaml

Prompts = dict[str, str | dict[str, str]]


def load_prompts(path: Path | None = None, own: Sequence[str] = ()) -> Prompts:
    """Reads what stands in front of texts, by task name or mteb type.

    Args:
        path: YAML file, the bundled one when None. A text is an instruction, put before queries and before both sides
            of symmetric tasks; a mapping gives what stands before a ``query`` and a ``document``, to the letter.
        own: Names of tasks of the user's own data, which mteb does not know.

    Raises:
        LusiferError: If it cannot be read, is no such mapping, or names a task or type that does not exist.
    """
    where = path or (files("lusifer") / "resources" / "prompts.yaml")
    try:
        prompts = load_yaml(where.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise LusiferError(f"cannot read instructions from {where}: {first_line(error)}") from None
    if not isinstance(prompts, dict) or not all(map(_is_prompt, prompts.values())):
        raise LusiferError(
            f"{where} must map task names or types to instructions, each a line of text or 'query' and 'document'"
        )
    tasks = mteb.get_tasks(exclude_superseded=False, exclude_private=False, exclude_beta=False)
    known = {*own, *(kind for task in tasks for kind in (task.metadata.name, task.metadata.type))}
    if unknown := [key for key in prompts if str(key) not in known]:
        close = "".join(f"; {name}?" for name in get_close_matches(str(unknown[0]), known, 1))
        raise LusiferError(f"{where}: mteb has no task or type {unknown[0]!r}{close}")
    return {str(key): value for key, value in prompts.items()}


def _is_prompt(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value) and set(value) <= {"query", "document"} and all(isinstance(v, str) for v in value.values())
    return isinstance(value, str) and bool(value.strip())


class CachedModel(AbsEncoder):
    """A model as mteb wants it, with prompts and the cache of embeddings.

    Args:
        cache: Embeds texts.
        prompts: Instructions by task name or type; the model's own prompts hold where there are none.
        description: What results call it, see `lusifer.evaluation.results.Results.model`.
        model: The model.
        prompt: Put before every text, whatever the task.

    Attributes:
        own: Instructions that tasks of the user's own data bring, by their names; they hold where ``prompts`` do.
    """

    def __init__(
        self, cache: EmbeddingCache, prompts: Prompts, description: Any, model: Embedder, *, prompt: str | None = None
    ) -> None:
        self.cache = cache
        self.prompts = prompts
        self.prompt = prompt
        self.own: Prompts = {}
        self.loaded = model
        self.mteb_model_meta = description

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """(n, m) similarities, by the model's own function where it has one."""
        return self._scorer().similarity(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """(n,) similarities of rows at the same place."""
        return self._scorer().similarity_pairwise(embeddings1, embeddings2)

    def _scorer(self) -> Any:
        if self.loaded.native is not None:
            return self.loaded.native
        if self.loaded.similarity is None:
            return super()
        kind = self.loaded.similarity
        return SimpleNamespace(
            similarity=SimilarityFunction.to_similarity_fn(kind),
            similarity_pairwise=SimilarityFunction.to_similarity_pairwise_fn(kind),
        )

    def prefix(self, task: Any, role: Any) -> str:
        """What stands in front of a text, to the letter.

        Args:
            task: The task.
            role: mteb's prompt type; None on both sides of symmetric tasks.
        """
        if self.prompt is not None:
            return self.prompt
        side = getattr(role, "value", role)
        if self.prompts:
            chosen = self.prompts.get(task.name) or self.own.get(task.name) or self.prompts.get(task.type) or ""
            if isinstance(chosen, dict):
                return chosen.get(side or "query", "")
            return "" if side == "document" else with_instruction(chosen, "")
        return prompt_for(self.loaded, side, prompt_name=get_prompt_name(self.loaded.prompts, task, role))

    def encode(self, inputs: Any, *, task_metadata: Any, prompt_type: Any = None, **kwargs: Any) -> Any:
        """(n, dim) float32 of mteb's batches of texts."""
        texts = [text for batch in inputs for text in batch["text"]]
        if self.loaded.native is None:
            prefix = self.prefix(task_metadata, prompt_type)
            return self.cache([prefix + text for text in texts])
        # What it puts in front of a text is its own affair, and may depend on task and side.
        mark = f"{task_metadata.name}\0{getattr(prompt_type, 'value', prompt_type)}\0"
        native, options = self.loaded.native, {"task_metadata": task_metadata, "prompt_type": prompt_type, **kwargs}

        def embed(marked: list[str]) -> Any:
            rows = datasets.Dataset.from_dict({"text": [text.removeprefix(mark) for text in marked]})
            return native.encode(DataLoader(rows, batch_size=32), **options)

        self.cache.embed = embed
        return self.cache([mark + text for text in texts])
