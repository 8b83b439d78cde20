"""Texts to vectors at the speed of the hardware: tokenised ahead, sorted by tokens, in batches of a token budget.

This is what ``lusifer.load`` encodes with, and so everything on top of Sentence Transformers.

1. A window of texts is tokenised at once, in a thread of its own, while the model is busy with the window before.
2. Its rows are sorted by their number of tokens and cut into batches of at most a budget of padded tokens, of equal
   length where there are enough, so that padding is a few per cent however lengths and scripts are mixed (sorted by
   characters, as Sentence Transformers does, a third of the tokens is padding when scripts differ).
3. Each batch goes through the model, adapters folded into its weights, as one packed row where attention allows it
   (`lusifer.model.varlen`); the vectors return to the order of the texts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from tqdm.auto import tqdm

from lusifer.errors import LusiferError
from lusifer.model.modeling import LusiferModel
from lusifer.model.token_batches import PASS_TOKENS, exact_batches
from lusifer.model.varlen import can_pack, embed_packed

WINDOW = 4096
_CHARACTERS = 1 << 22  # Of a window: a token takes some 100 bytes while it is with the tokenizer.
_ELSEWHERE = 32_768  # Tokens of a pass on anything but a CPU, where many are needed to be busy.
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
_WORTH_IT = 1.3  # How much faster a shorter data type must be to be chosen: it costs some precision.


def choose_precision(model: SentenceTransformer) -> str:
    """The data type in which this model's matrix products are fastest here, by measuring one; takes some 50 ms.

    Args:
        model: A loaded model.

    Returns:
        ``float32`` unless bfloat16 (on GPUs without it: float16) is at least 1.3 times as fast.
    """
    device = model.device
    sizes = [layer.weight.shape for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    width, depth = max(sizes, key=lambda shape: shape[0] * shape[1], default=(1024, 1024))
    short = torch.bfloat16
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        short = torch.float16
    seconds = {}
    for dtype in (torch.float32, short):
        rows = torch.randn(PASS_TOKENS, depth, dtype=dtype, device=device)
        weight = torch.randn(width, depth, dtype=dtype, device=device)
        times = []
        for _ in range(4):
            begin = time.perf_counter()
            float(torch.nn.functional.linear(rows, weight)[0, 0])  # Reading a number waits for the device.
            times.append(time.perf_counter() - begin)
        seconds[dtype] = min(times[1:])
    return str(short).removeprefix("torch.") if seconds[torch.float32] > _WORTH_IT * seconds[short] else "float32"


def set_precision(model: SentenceTransformer, precision: str) -> str:
    """Converts a model, in place, to the data type it shall compute in; what adds up stays in float32.

    Args:
        model: A loaded model.
        precision: One of `PRECISIONS`; ``auto`` measures.

    Returns:
        The data type's name.

    Raises:
        LusiferError: If there is no such precision.
    """
    if precision not in PRECISIONS:
        raise LusiferError(f"no precision {precision!r}; there are {', '.join(PRECISIONS)}")
    precision = choose_precision(model) if precision == "auto" else precision
    dtype = getattr(torch, precision)
    inner: Any = getattr(model[0], "auto_model", None)
    if isinstance(inner, LusiferModel):
        inner.eval().fold_adapters()  # Before rounding, not after.
        for part in (inner.encoder, inner.llm):
            part.to(dtype)
    else:
        model.to(dtype)
    return precision


def _dimension(model: SentenceTransformer) -> int:
    """Length of what the modules give, before ``truncate_dim`` cuts it."""
    cut, model.truncate_dim = model.truncate_dim, None
    try:
        return int(model.get_embedding_dimension() or 0)
    finally:
        model.truncate_dim = cut


class TextEncoder:
    """A loaded model as a function from texts to unit vectors.

    Args:
        model: Any Sentence Transformers model of texts.
        token_budget: Padded tokens of a batch; chosen by the device when None.
        window: Texts tokenised and sorted together.

    Attributes:
        dimension: Length of a vector, whatever the model's ``truncate_dim``.
        max_seq_length: Tokens read of a text.
        cut: How many texts so far were longer and were cut.
    """

    def __init__(self, model: SentenceTransformer, *, token_budget: int | None = None, window: int = WINDOW) -> None:
        self.model = model.eval()
        self.inner: Any = getattr(model[0], "auto_model", None)
        self.packs = False
        if isinstance(self.inner, LusiferModel):
            self.inner.fold_adapters()
            self.packs = can_pack(self.inner)
        self.tokenizer: Any = model.tokenizer
        self.dimension = _dimension(model)
        self.max_seq_length = int(model.max_seq_length or 512)
        self.token_budget = token_budget or (PASS_TOKENS if model.device.type == "cpu" else _ELSEWHERE)
        self.window = window
        self.cut = 0

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, special tokens included, cut to what the model reads; counts the cut ones."""
        found: list[list[int]] = self.tokenizer(
            list(texts), truncation=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]
        long = [row for row, ids in enumerate(found) if len(ids) > self.max_seq_length]
        for row in long:  # Cut by the tokenizer, which knows what stands at the end.
            found[row] = self.tokenizer(texts[row], truncation=True, max_length=self.max_seq_length)["input_ids"]
        self.cut += len(long)
        return found

    @torch.inference_mode()
    def encode_ids(self, ids: Sequence[Sequence[int]], tick: Callable[[int], object] | None = None) -> np.ndarray:
        """Embeds tokenised texts, in token-sorted batches.

        Args:
            ids: Token ids by text, as `tokenize` gives them.
            tick: Is told after each batch how many texts it held.

        Returns:
            (n, dim) float32 unit vectors, in the order of the texts.
        """
        found = np.empty((len(ids), self.dimension), dtype=np.float32)
        for rows, vectors in self._batches(ids):
            found[rows] = vectors
            if tick is not None:
                tick(len(rows))
        return found

    def stream(self, texts: Iterable[str], tick: Callable[[int], object] | None = None) -> Iterator[np.ndarray]:
        """Embeds texts as they come, in memory for two windows of them.

        Args:
            texts: The texts; read one window ahead of what is yielded.
            tick: Is told after each batch how many texts it held.

        Yields:
            (n, dim) float32 unit vectors, in the order of the texts; n is at most ``window``.
        """
        for ids in self._tokenized(texts):
            yield self.encode_ids(ids, tick)

    def encode(self, texts: Sequence[str], *, progress: bool = False) -> np.ndarray:
        """Embeds texts.

        Args:
            texts: The texts.
            progress: Whether to show a bar.

        Returns:
            (n, dim) float32 unit vectors.
        """
        found = np.empty((len(texts), self.dimension), dtype=np.float32)
        begin = 0
        with tqdm(total=len(texts), desc="encoding", unit="text", disable=not progress) as bar:
            for vectors in self.stream(texts, bar.update):
                found[begin : begin + len(vectors)] = vectors
                begin += len(vectors)
        return found

    def _tokenized(self, texts: Iterable[str]) -> Iterator[list[list[int]]]:
        """Windows of token ids, each made while the one before is in the model."""
        rest = iter(texts)
        with ThreadPoolExecutor(max_workers=1) as pool:
            ahead = None
            while window := self._next_window(rest):
                current, ahead = ahead, pool.submit(self.tokenize, window)
                if current is not None:
                    yield current.result()
            if ahead is not None:
                yield ahead.result()

    def _next_window(self, texts: Iterator[str]) -> list[str]:
        found: list[str] = []
        characters = 0
        for text in texts:
            found.append(text)
            characters += len(text)
            if len(found) == self.window or characters >= _CHARACTERS:
                break
        return found

    def _batches(self, ids: Sequence[Sequence[int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        if not len(ids):
            return
        lengths = torch.tensor([len(row) for row in ids])
        for rows in exact_batches(lengths, self.token_budget):
            chosen = rows.tolist()
            yield np.array(chosen), self._forward([ids[row] for row in chosen]).float().cpu().numpy()

    def _forward(self, ids: list[Sequence[int]]) -> Tensor:
        """(n, dim) unit vectors of one batch."""
        if self.packs:
            device = self.model.device
            flat = torch.tensor([token for row in ids for token in row], device=device)
            vectors = embed_packed(self.inner, flat, torch.tensor([len(row) for row in ids], device=device))
            for module in list(self.model)[1:]:
                vectors = module({"sentence_embedding": vectors})["sentence_embedding"]
            return vectors
        batch = self.tokenizer.pad({"input_ids": [list(row) for row in ids]}, return_tensors="pt", verbose=False)
        features = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
        return self.model(features)["sentence_embedding"]


class FastSentenceTransformer(SentenceTransformer):
    """A Sentence Transformers model whose ``encode`` takes the path of `TextEncoder`; all else is as there.

    ``batch_size`` bounds the tokens of a pass: never more than so many texts of full length.
    """

    def _inference(self, inputs: list[Any], **options: Any) -> Any:
        """Embeddings (n, dim) of texts with arguments that ``encode`` has resolved; what is not plain goes its way."""
        known = ("prompt", "batch_size", "show_progress_bar", "output_value", "save_to_cpu", "normalize_embeddings")
        # `task` is what encode_query and encode_document say to a router of modules, which our models have none of.
        extra = set(options) - {*known, "truncate_dim", "device", "task"}
        inner = getattr(self[0], "auto_model", None)
        plain = options["output_value"] == "sentence_embedding" and not extra and isinstance(inner, LusiferModel)
        if not plain or not all(isinstance(text, str) for text in inputs) or not inputs:
            return super()._inference(inputs, **options)
        self._resolve_inference_device(options["device"])
        encoder = TextEncoder(self)
        encoder.token_budget = min(encoder.token_budget, options["batch_size"] * encoder.max_seq_length)
        texts = [f"{options['prompt']}{text}" for text in inputs] if options["prompt"] else inputs
        found = torch.from_numpy(encoder.encode(texts, progress=options["show_progress_bar"]))
        if options["truncate_dim"] is not None:
            found = found[:, : options["truncate_dim"]]
        if options["normalize_embeddings"]:
            found = torch.nn.functional.normalize(found, dim=1)
        return found if options["save_to_cpu"] else found.to(self.device)
