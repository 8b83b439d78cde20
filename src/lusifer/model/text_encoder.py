"""Texts to vectors at the speed of the hardware: tokenised ahead, sorted by tokens, in batches of a token budget.

1. A window of texts is tokenised at once, in a thread of its own, while the model is busy with the window before.
2. Its rows are sorted by tokens and split into batches within the budget, of equal length where there are enough:
   padding is a few per cent, where sorting by characters leaves a third.
3. Each batch goes through the model, adapters merged, as one packed row where attention allows it.

Several threads may encode with one model: nothing that they share is changed.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lusifer.errors import LusiferError
from lusifer.hooks.sentence_transformers import InferenceHook, static_features, static_tokenizer
from lusifer.hooks.transformers import no_panics
from lusifer.model.adapters import inference_copy
from lusifer.model.modeling import LusiferModel
from lusifer.model.packing import can_pack, embed_packed
from lusifer.model.token_batches import PASS_TOKENS, exact_batches
from lusifer.progress import bar

WINDOW = 4096
_CHARACTERS = 1 << 22  # Of a window: a token takes some 100 bytes while it is with the tokenizer.
_UNBOUNDED = 1 << 20  # Tokens of a text where a model reads any number.
_ELSEWHERE = 32_768  # Tokens of a pass on anything but a CPU, where many are needed to be busy.
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
_WORTH_IT = 1.3  # How much faster a shorter data type must be to be chosen: it costs some precision.
_lock = threading.Lock()
_backends: WeakKeyDictionary[PreTrainedTokenizerBase, dict[bool, tuple[Any, Any]]] = WeakKeyDictionary()


class Choice(NamedTuple):
    """What `choose_dtype` says.

    Attributes:
        name: ``float32``, ``bfloat16`` or ``float16``.
        reason: Why, for people.
    """

    name: str
    reason: str


def choose_dtype(device: torch.device, shape: tuple[int, int], *, training: bool = False) -> Choice:
    """The data type in which matrix products are fastest on a device, by measuring one; takes some 50 ms.

    It is ``float32`` unless bfloat16 (on GPUs without it: float16) is at least 1.3 times as fast. To train, a GPU is
    not measured: bfloat16 where the GPU has it, and float32 elsewhere, since small gradients vanish in float16.

    Args:
        device: Where the products will be.
        shape: Outputs and inputs of the layer to measure with.
        training: Whether gradients are computed too.
    """
    poor = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    if training and device.type == "cuda":
        return Choice("float32", "this GPU lacks bfloat16") if poor else Choice("bfloat16", "this GPU has it")
    short = torch.float16 if poor else torch.bfloat16
    name = str(short).removeprefix("torch.")
    width, depth = shape

    def seconds(dtype: torch.dtype) -> float:
        rows = torch.randn(PASS_TOKENS, depth, dtype=dtype, device=device)
        weight = torch.randn(width, depth, dtype=dtype, device=device)
        times = []
        for _ in range(4):
            begin = time.perf_counter()
            float(torch.nn.functional.linear(rows, weight)[0, 0])  # Reading a number waits for the device.
            times.append(time.perf_counter() - begin)
        return min(times[1:])

    long, brief = seconds(torch.float32), seconds(short)
    reason = f"a product of {PASS_TOKENS} x {depth} x {width} takes {1e3 * brief:.1f} ms in {name}, "
    reason += f"{1e3 * long:.1f} ms in float32"
    return Choice(name if long > _WORTH_IT * brief else "float32", reason)


def choose_precision(model: SentenceTransformer) -> str:
    """The data type in which this model's largest matrix products are fastest here; see `choose_dtype`."""
    sizes = [layer.weight.shape for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    width, depth = max(sizes, key=lambda shape: shape[0] * shape[1], default=(1024, 1024))
    return choose_dtype(model.device, (width, depth)).name


def set_precision(model: SentenceTransformer, precision: str) -> str:
    """Converts a model, in place, to a data type to compute in, and returns its name; what adds up stays in float32.

    Its adapters are merged, so that it can no longer be trained or saved.

    Args:
        model: A loaded model.
        precision: One of `PRECISIONS`; ``auto`` measures.

    Raises:
        LusiferError: If there is no such precision.
    """
    if precision not in PRECISIONS:
        raise LusiferError(f"no precision {precision!r}; there are {', '.join(PRECISIONS)}")
    precision = choose_precision(model) if precision == "auto" else precision
    parts: list[Any] = [model]
    if isinstance(inner := getattr(model[0], "auto_model", None), LusiferModel):
        inner.merge_for_inference()  # Before rounding, not after.
        parts = [inner.encoder, inner.llm]
    for part in parts:
        part.to(getattr(torch, precision))
    return precision


def _dimension(model: SentenceTransformer) -> int:
    """Length of what the modules give, before ``truncate_dim`` shortens it."""
    given = (getattr(module, "get_embedding_dimension", None) for module in reversed(list(model)))
    return int(next((size for method in given if callable(method) and (size := method())), 0))


def token_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int
) -> tuple[list[list[int]], list[bool]]:
    """Token ids of texts, special tokens included, truncated to what a model reads, and whether each text was longer.

    Calling a tokenizer of transformers switches truncation on and off in the one backend that all threads share, so
    that a text may come back whole where another thread tokenises. This uses private copies with fixed settings.

    Args:
        tokenizer: The tokenizer; not changed.
        texts: The texts.
        max_length: Most tokens of a text.
    """
    plain = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    rows: list[list[int]] = _private(tokenizer, truncation=False)(list(texts), truncation=False, **plain)["input_ids"]
    longer = [len(ids) > max_length for ids in rows]
    if any(longer):
        # By the tokenizer, which knows what stands at the end.
        options = {"truncation": True, "max_length": max_length}
        truncating = _private(tokenizer, **options)
        for row in (row for row, is_longer in enumerate(longer) if is_longer):
            rows[row] = truncating(texts[row], **options, **plain)["input_ids"]
    return rows, longer


def _private(tokenizer: Any, **options: Any) -> Any:
    """A copy of a tokenizer that is only ever called with these options."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # What a user may change afterwards: added tokens, sides, the language code of NLLB.
    settings: tuple[Any, ...] = (*options.items(), id(backend), len(tokenizer), tokenizer.truncation_side)
    settings = (*settings, repr(getattr(backend, "post_processor", None)))
    with _lock:
        copies = _backends.setdefault(tokenizer, {})
        known = copies.get(options["truncation"])
        if known is None or known[0] != settings:
            own = copy.deepcopy(tokenizer)
            own("a", **options)  # Switches its backend, before other threads see it.
            known = copies[options["truncation"]] = (settings, own)
        return known[1]


class Keeper(Protocol):
    """Keeps the vectors of batches, in the order in which they come, and may know them from before."""

    def take(self, rows: int) -> np.ndarray | None:
        """The (rows, dim) vectors of the next batch, if they are known."""

    def put(self, vectors: np.ndarray) -> None:
        """Keeps the vectors of the next batch."""


class TextEncoder:
    """A loaded model as a function from texts to unit vectors.

    Args:
        model: Any Sentence Transformers model of texts.
        token_budget: Padded tokens of a batch; chosen by the device when None.
        window: Texts tokenised and sorted together.

    Attributes:
        dimension: Length of a vector, whatever the model's ``truncate_dim``.
        max_seq_length: Tokens read of a text; no more than the encoder has positions for.
        cut: How many texts so far were longer.
    """

    def __init__(self, model: SentenceTransformer, *, token_budget: int | None = None, window: int = WINDOW) -> None:
        self.model = model.eval()
        self.inner: Any = None
        self.max_seq_length = int(min(model.max_seq_length or 512, _UNBOUNDED))
        if isinstance(inner := getattr(model[0], "auto_model", None), LusiferModel):
            self.max_seq_length = min(self.max_seq_length, inner.window or self.max_seq_length)
            self.inner = inference_copy(inner)
        self.packs = self.inner is not None and can_pack(self.inner)
        self.static = static_tokenizer(model)
        self.tokenizer: Any = self.static or model.tokenizer
        self.dimension = _dimension(model)
        self.token_budget = token_budget or (PASS_TOKENS if model.device.type == "cpu" else _ELSEWHERE)
        self.window = window
        self.cut = 0

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, special tokens included, truncated to what the model reads; counts the truncated ones."""
        with no_panics("the model"):
            ids, longer = token_ids(self.tokenizer, texts, self.max_seq_length)
        self.cut += sum(longer)
        return ids

    @torch.inference_mode()
    def encode_ids(
        self,
        ids: Sequence[Sequence[int]],
        tick: Callable[[int], object] | None = None,
        keeper: Keeper | None = None,
    ) -> np.ndarray:
        """Embeds tokenised texts in token-sorted batches: (n, dim) float32 unit vectors, in the order of the texts.

        Args:
            ids: Token ids by text, as `tokenize` gives them.
            tick: Called after each batch with the number of its texts.
            keeper: Gets the vectors of each batch, or gives them; ``tick`` does not hear of those.
        """
        embeddings = np.empty((len(ids), self.dimension), dtype=np.float32)
        lengths = torch.tensor([len(row) for row in ids], dtype=torch.long)
        for rows in exact_batches(lengths, self.token_budget):
            batch = rows.tolist()
            if keeper is not None and (kept := keeper.take(len(batch))) is not None:
                embeddings[batch] = kept
                continue
            embeddings[batch] = vectors = self._forward([ids[row] for row in batch]).float().cpu().numpy()
            if keeper is not None:
                keeper.put(vectors)
            if tick is not None:
                tick(len(batch))
        return embeddings

    def stream(
        self, texts: Iterable[str], tick: Callable[[int], object] | None = None, keeper: Keeper | None = None
    ) -> Iterator[np.ndarray]:
        """Embeds texts as they come, in memory for two windows of them.

        Args:
            texts: The texts; read one window ahead of what is yielded.
            tick: Called after each batch with the number of its texts.
            keeper: As in `encode_ids`. The same texts in the same settings come in the same batches.

        Yields:
            (n, dim) float32 unit vectors, in the order of the texts; n is at most ``window``.
        """
        for ids in self._tokenized(texts):
            yield self.encode_ids(ids, tick, keeper)

    def encode(self, texts: Sequence[str], *, progress: bool = False) -> np.ndarray:
        """Embeds texts: (n, dim) float32 unit vectors.

        Args:
            texts: The texts.
            progress: Whether to show a bar.
        """
        embeddings = np.empty((len(texts), self.dimension), dtype=np.float32)
        begin = 0
        with bar(len(texts), "encoding", "text", show=progress) as shown:
            for vectors in self.stream(texts, shown.update):
                embeddings[begin : begin + len(vectors)] = vectors
                begin += len(vectors)
        return embeddings

    def _tokenized(self, texts: Iterable[str]) -> Iterator[list[list[int]]]:
        """Windows of token ids, each made while the one before is in the model."""
        with ThreadPoolExecutor(max_workers=1) as pool:
            ahead = None
            for window in self._windows(texts):
                current, ahead = ahead, pool.submit(self.tokenize, window)
                if current is not None:
                    yield current.result()
            if ahead is not None:
                yield ahead.result()

    def _windows(self, texts: Iterable[str]) -> Iterator[list[str]]:
        window: list[str] = []
        characters = 0
        for text in texts:
            window.append(text)
            characters += len(text)
            if len(window) == self.window or characters >= _CHARACTERS:
                yield window
                window, characters = [], 0
        if window:
            yield window

    def _forward(self, ids: list[Sequence[int]]) -> Tensor:
        """(n, dim) unit vectors of one batch."""
        device = self.model.device
        if self.static is not None:
            features = {name: tensor.to(device) for name, tensor in static_features(ids).items()}
            return self.model(features)["sentence_embedding"]
        if self.packs:
            flat = torch.tensor([token for row in ids for token in row], device=device)
            vectors = embed_packed(self.inner, flat, torch.tensor([len(row) for row in ids], device=device))
        else:
            batch = self.tokenizer.pad({"input_ids": [list(row) for row in ids]}, return_tensors="pt", verbose=False)
            features = {name: tensor.to(device) for name, tensor in batch.items()}
            if self.inner is None:
                return self.model(features)["sentence_embedding"]
            vectors = self.inner(features["input_ids"], features["attention_mask"]).pooler_output
        for module in list(self.model)[1:]:
            vectors = module({"sentence_embedding": vectors})["sentence_embedding"]
        return vectors


class FastSentenceTransformer(InferenceHook):
    """A Sentence Transformers model whose ``encode`` takes the path of `TextEncoder`; all else is as there.

    ``batch_size`` bounds the tokens of a pass: never more than so many texts of full length.
    """

    def embed_texts(self, texts: list[str], *, batch_size: int, progress: bool) -> Tensor | None:
        """(n, dim) float32 embeddings of texts; None where the model is none of ours.

        Args:
            texts: The texts, prompts included.
            batch_size: Most texts of full length in one pass.
            progress: Whether to show a bar.
        """
        if not isinstance(getattr(self[0], "auto_model", None), LusiferModel):
            return None
        encoder = TextEncoder(self)
        encoder.token_budget = min(encoder.token_budget, batch_size * encoder.max_seq_length)
        return torch.from_numpy(encoder.encode(texts, progress=progress))
