"""The student while it learns: a multilingual encoder, its tokenizer, its prompts and its mean states."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lusifer.adapt.modeling import mean_states
from lusifer.adapt.switching import Switcher
from lusifer.adapt.tokens import TokenTexts, batches_by_length
from lusifer.errors import LusiferError
from lusifer.hooks.transformers import cached_or_none
from lusifer.model.backbone_pair import position_table
from lusifer.model.backbones import load_config, load_encoder, load_tokenizer
from lusifer.model.configuration import ADAPTED_TYPE
from lusifer.starter.names import resolve_backbone

_PROMPTS = {"query": "query: ", "document": "passage: "}
_LONGEST = 256  # Tokens read of a training text.
_BUDGET, _BUDGET_GPU = 4_096, 16_384  # Padded tokens of a forward pass.
_BLOCK, _BLOCK_GPU = 1_024, 8_192


class Student:
    """A multilingual encoder that is to answer in a teacher's vector space.

    Args:
        name: Hub id, folder or starter name of the encoder.
        asymmetric: Whether the teacher tells queries from documents.
        device: Torch device; the best there is when None.

    Attributes:
        prompts: What stands in front of queries and documents: the encoder's own prompts where it has them.
        layers: The layers whose mean states are collected, ascending: the last one and three below.
        window: Most tokens of a text the finished model reads.
        width: Width of a layer.
        block: Texts between two checkpoints of what is collected.

    Raises:
        LusiferError: If it cannot be loaded.
    """

    def __init__(self, name: str, *, asymmetric: bool, device: str | None = None) -> None:
        self.name = name
        config = load_config("encoder", name)
        if config.model_type == ADAPTED_TYPE:
            raise LusiferError(f"{name!r} is already adapted; give its original encoder")
        self.tokenizer: Any = load_tokenizer("encoder", name, config=config)
        if not self.tokenizer.is_fast:
            raise LusiferError(f"the encoder {name!r} has no fast tokenizer, which knows where words begin")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.encoder: Any = load_encoder(name, config, dtype=torch.float32).eval().to(self.device)
        self.encoder.requires_grad_(False)
        self.prompts = self._prompts(name, asymmetric)
        table = position_table(self.encoder)
        self.window = min(512, int(self.tokenizer.model_max_length), (table.window if table else None) or 512)
        self.longest = min(_LONGEST, self.window)
        depth = int(self.encoder.config.num_hidden_layers)
        step = max(1, round(depth / 6))
        self.layers = sorted({max(0, depth - step * back) for back in range(4)})
        self.width = int(self.encoder.config.hidden_size)
        cpu = self.device.type == "cpu"
        self.budget, self.block = (_BUDGET, _BLOCK) if cpu else (_BUDGET_GPU, _BLOCK_GPU)
        self.bfloat16 = False

    @staticmethod
    def _prompts(name: str, asymmetric: bool) -> dict[str, str]:
        path = cached_or_none(resolve_backbone(name), "config_sentence_transformers.json")
        own = json.loads(Path(path).read_text(encoding="utf-8")).get("prompts") or {} if path is not None else {}
        query = own.get("query", _PROMPTS["query"] if asymmetric else "")
        document = own.get("document") or own.get("passage") or _PROMPTS["document"]
        # Whoever knows no roles gets one prompt for both: an index of such vectors tells them apart no more.
        return {"query": query, "document": document if asymmetric else query}

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of the encoder's matrix products."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    def trainable_layers(self, count: int) -> list[nn.Parameter]:
        """Makes the upper layers trainable, and only them, and returns their parameters.

        Raises:
            LusiferError: If the encoder's layers cannot be found.
        """
        depth = int(self.encoder.config.num_hidden_layers)
        stacks = [m for m in self.encoder.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
        if not stacks:
            raise LusiferError(f"the encoder {self.name!r} has no list of {depth} layers: it can only stay frozen")
        chosen = list(stacks[0])[depth - count :]
        for layer in chosen:
            layer.requires_grad_(True)
        return [parameter for layer in chosen for parameter in layer.parameters()]

    @torch.no_grad()
    def states(
        self,
        texts: TokenTexts,
        rows: Tensor,
        *,
        switcher: Switcher | None = None,
        generator: torch.Generator | None = None,
        layers: list[int] | None = None,
        tick: Callable[[int], object] = lambda _: None,
    ) -> Tensor:
        """Mean states of texts, (len(rows), width x layers) float32 on the CPU.

        Args:
            texts: The texts.
            rows: Which of them.
            switcher: Switches every text, where given.
            generator: Its source of chance.
            layers: The layers; `layers` when None.
            tick: Called after each batch with the number of its texts.
        """
        layers = layers or self.layers
        result = torch.empty(len(rows), self.width * len(layers))
        for part in batches_by_length(texts.lengths[rows], self.budget):
            ids, mask, words = texts.batch(rows[part], self.pad, self.device)
            if switcher is not None:
                assert generator is not None
                ids, mask = switcher(ids, mask, words, 1.0, generator)
            with self.autocast():
                result[part] = mean_states(self.encoder, ids, mask, layers).float().cpu()
            tick(len(part))
        return result

    @property
    def pad(self) -> int:
        """Id of the token behind a text's end."""
        return int(self.tokenizer.pad_token_id or 0)

    def piece_texts(self, ids: list[int]) -> TokenTexts:
        """Single pieces of the vocabulary as texts: prompt, piece, special tokens."""
        frame = self.tokenizer(self.prompts["query"].strip())["input_ids"]
        flat = torch.tensor([[*frame[:-1], piece, frame[-1]] for piece in ids], dtype=torch.int32)
        lengths = torch.full((len(ids),), flat.shape[1])
        tokens = flat.flatten()
        return TokenTexts(tokens, torch.zeros_like(tokens), lengths, lengths.cumsum(0) - lengths)
