"""A model as mteb wants it."""

from __future__ import annotations

from typing import Any

import datasets
from mteb.models.abs_encoder import AbsEncoder, get_prompt_name
from sentence_transformers import SimilarityFunction
from torch.utils.data import DataLoader

from lusifer.data.prompts import prompt_for, with_instruction
from lusifer.evaluation.cache import EmbeddingCache
from lusifer.evaluation.instructions import Prompts
from lusifer.evaluation.systems import Embedder


class CachedModel(AbsEncoder):
    """A model as mteb wants it, with prompts and the cache of embeddings.

    Args:
        cache: Embeds texts.
        prompts: Instructions by task name or type; the model's own prompts hold where there are none.
        description: What results call it, see `lusifer.evaluation.results.describe_model`.
        model: The model.
        prompt: A prompt that stands in front of every text, whatever the task.
    """

    def __init__(
        self, cache: EmbeddingCache, prompts: Prompts, description: Any, model: Embedder, *, prompt: str | None = None
    ) -> None:
        self.cache = cache
        self.prompts = prompts
        self.prompt = prompt
        self.loaded = model
        self.mteb_model_meta = description

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """(n, m) similarities, by the model's own function where it has one."""
        if self.loaded.native is not None:
            return self.loaded.native.similarity(embeddings1, embeddings2)
        if self.loaded.similarity is None:
            return super().similarity(embeddings1, embeddings2)
        return SimilarityFunction.to_similarity_fn(self.loaded.similarity)(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """(n,) similarities of rows at the same place."""
        if self.loaded.native is not None:
            return self.loaded.native.similarity_pairwise(embeddings1, embeddings2)
        if self.loaded.similarity is None:
            return super().similarity_pairwise(embeddings1, embeddings2)
        return SimilarityFunction.to_similarity_pairwise_fn(self.loaded.similarity)(embeddings1, embeddings2)

    def prefix(self, task: Any, role: Any) -> str:
        """What stands in front of a text, to the letter.

        Args:
            task: mteb's metadata of the task.
            role: mteb's prompt type; None on both sides of symmetric tasks.
        """
        if self.prompt is not None:
            return self.prompt
        side = getattr(role, "value", role)
        if self.prompts:
            told = self.prompts.get(task.name) or self.prompts.get(task.type) or ""
            if isinstance(told, dict):
                return told.get(side or "query", "")
            return with_instruction(told, "") if told and side != "document" else ""
        return prompt_for(self.loaded, side, prompt_name=get_prompt_name(self.loaded.prompts, task, role))

    def encode(self, inputs: Any, *, task_metadata: Any, prompt_type: Any = None, **kwargs: Any) -> Any:
        """(n, dim) float32 of mteb's batches of texts."""
        texts = [text for batch in inputs for text in batch["text"]]
        if self.loaded.native is None:
            told = self.prefix(task_metadata, prompt_type)
            return self.cache([told + text for text in texts])
        # What it puts in front of a text is its own affair, and may depend on task and side.
        mark = f"{task_metadata.name}\0{getattr(prompt_type, 'value', prompt_type)}\0"
        native, options = self.loaded.native, {"task_metadata": task_metadata, "prompt_type": prompt_type, **kwargs}

        def embed(marked: list[str]) -> Any:
            rows = datasets.Dataset.from_dict({"text": [text.removeprefix(mark) for text in marked]})
            return native.encode(DataLoader(rows, batch_size=32), **options)

        self.cache.embed = embed
        return self.cache([mark + text for text in texts])
