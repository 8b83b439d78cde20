"""A table of one vector per token: a text's embedding is the weighted mean of its tokens' vectors.

1. The model embeds every token of its tokenizer alone, between the special tokens that any text has.
2. The vectors are whitened: centred, on their first principal components, each scaled to unit variance.
3. Frequent tokens count less: weight a / (a + p) with the token's probability p (SIF; Arora et al., ICLR 2017), by
   Zipf's law from its rank in the vocabulary, which tokenizers sort by frequency.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
from tokenizers import Tokenizer

from lusifer.errors import LusiferError
from lusifer.loading import load_for_inference
from lusifer.locks import alone_at_new
from lusifer.model.text_encoder import TextEncoder
from lusifer.progress import bar
from lusifer.publishing import publish_folder

DIMENSIONS = 256
_SMOOTH = 1e-4
_BLOCK = 8192


def export_static(
    name: str, output: Path, *, dimensions: int = DIMENSIONS, device: str | None = None, progress: bool = False
) -> dict[str, Any]:
    """Writes a model of one vector per token, complete or not at all.

    Args:
        name: A checkpoint or any Sentence Transformers model, as `lusifer.loading.resolve` takes it.
        output: The folder to make: a Sentence Transformers model of `StaticEmbedding` and `Normalize`.
        dimensions: Dimensions of the new vectors; at most the model's.
        device: Torch device to embed the tokens on; the best there is when None.
        progress: Whether to show a bar.

    Returns:
        ``model``, the folder; ``tokens``; ``dimension``; ``megabytes``.

    Raises:
        LusiferError: If the folder exists, or the model has no tokenizer.json.
    """
    with alone_at_new(output):
        model = load_for_inference(name, device=device)
        encoder = TextEncoder(model)
        backend = getattr(model.tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise LusiferError(f"cannot export {name!r}: its tokenizer has no tokenizer.json")
        table = whitened(token_vectors(encoder, progress=progress), min(dimensions, encoder.dimension))
        table *= frequency_weights(len(table))[:, None]
        table[model.tokenizer.all_special_ids] = 0
        tokenizer = Tokenizer.from_str(backend.to_str())
        tokenizer.no_truncation()
        with publish_folder(output, "static model") as folder:
            static = SentenceTransformer(modules=[StaticEmbedding(tokenizer, table), Normalize()], device="cpu")
            static.save_pretrained(str(folder), create_model_card=False)
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    facts = {"tokens": len(table), "dimension": table.shape[1], "megabytes": round(size / 1e6, 1)}
    return {"model": str(output), **facts}


def token_vectors(encoder: TextEncoder, *, progress: bool = False) -> np.ndarray:
    """Every token of a model's tokenizer embedded alone: (tokens, dim) float32 unit vectors.

    Args:
        encoder: The model.
        progress: Whether to show a bar.
    """
    front, behind = _around(encoder.tokenizer)
    count = encoder.tokenizer.backend_tokenizer.get_vocab_size()
    table = np.empty((count, encoder.dimension), dtype=np.float32)
    with bar(count, "embedding tokens", "token", show=progress) as shown:
        for begin in range(0, count, _BLOCK):
            ids = range(begin, min(begin + _BLOCK, count))
            table[begin : ids.stop] = encoder.encode_ids([[*front, token, *behind] for token in ids], shown.update)
    return table


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens in front of a text and behind it."""
    row = tokenizer("a", return_special_tokens_mask=True)
    inside = [place for place, special in enumerate(row["special_tokens_mask"]) if not special]
    return row["input_ids"][: inside[0]], row["input_ids"][inside[-1] + 1 :]


def whitened(table: np.ndarray, dimensions: int) -> np.ndarray:
    """Vectors (n, dim) on their first principal components, of unit variance each: (n, dimensions) float32."""
    centred = table - table.mean(axis=0)
    variances, axes = np.linalg.eigh(centred.T @ centred / len(centred))
    scales = np.sqrt(np.maximum(variances, variances[-1] / 1e4))  # What hardly varies is rounding, not to be blown up.
    return np.ascontiguousarray(centred @ (axes / scales)[:, ::-1][:, :dimensions], dtype=np.float32)


def frequency_weights(count: int) -> np.ndarray:
    """(count,) float32 weights of tokens in the order of their frequency, the most frequent first."""
    probabilities = 1 / np.arange(2, count + 2)
    probabilities /= probabilities.sum()
    return (_SMOOTH / (_SMOOTH + probabilities)).astype(np.float32)
