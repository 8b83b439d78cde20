"""Turns the files inside the starter wheels into folders that transformers loads; touches no network."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lusifer.errors import LusiferError

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader

    from lusifer.starter.use_encoder import UseConfig

MAX_LENGTH = 512
_CHUNKS = 17
_USE_PAD = 3  # The first of three pieces that the published vocabulary keeps for such uses.
_LAST_SPECIAL = 5
_GGUF_CONTROL = 3  # The type of control tokens in a GGUF vocabulary.
_NEVER = -1e6  # A score no segmentation picks.


def convert_use(resources: Path, target: Path) -> None:
    """Converts the multilingual Universal Sentence Encoder (arXiv 1907.04307).

    Args:
        resources: Folder with ``weights.npz`` and ``sp.model``.
        target: Existing empty folder; receives configuration, weights (float16 table, the rest float32) and tokenizer.

    Raises:
        LusiferError: If a file is missing or is not what it should be.
    """
    from safetensors.torch import save_file

    from lusifer.starter.use_encoder import UseConfig

    try:
        pieces, charsmap = _read_sentencepiece((resources / "sp.model").read_bytes())
        config = UseConfig(vocab_size=len(pieces), max_position_embeddings=MAX_LENGTH)
        tensors = _use_tensors(resources / "weights.npz", config)
    except (OSError, ValueError, KeyError, IndexError, struct.error) as error:
        raise LusiferError(f"{resources} does not hold the files of the sentence encoder: {error}") from error
    config.architectures = ["UseModel"]
    config.dtype = "float32"
    config.save_pretrained(target)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    _use_tokenizer(pieces, charsmap).save_pretrained(target)


def _use_tensors(path: Path, config: UseConfig) -> dict[str, torch.Tensor]:
    import numpy as np
    import torch

    with np.load(path, allow_pickle=False) as archive:
        scale, low = archive["scale"], archive["lo"]
        rows = archive["q1"].shape[0]
        # Values of six bits times a float32 scale: rounding them to float16 keeps every embedding at a
        # cosine of 0.9999995 or more (measured) and halves the file. Loading widens them to float32 again.
        table = np.empty((rows, _CHUNKS, config.embedding_size), dtype=np.float16)
        for chunk in range(_CHUNKS):
            table[:, chunk] = archive[f"q{chunk + 1}"] * scale[chunk] + low[chunk]
        rest = {name: archive[name] for name in archive.files if not re.fullmatch(r"q\d+", name)}
    table = table.reshape(-1, config.embedding_size)[: config.vocab_size]
    orders = config.ngrams
    arrays = {
        "embeddings.weight": table,
        "ngram_input.weight": np.concatenate([rest[f"proj{n}"].T for n in orders]),
        "ngram_input.bias": np.concatenate([rest[f"proj_b{n}"] for n in orders]),
        "ngram_norm.weight": np.concatenate([rest[f"ln_g{n}"] for n in orders]),
        "ngram_norm.bias": np.concatenate([rest[f"ln_b{n}"] for n in orders]),
        "norm.weight": rest["ln_g"],
        "norm.bias": rest["ln_b"],
        "project.weight": rest["cnn_W"].T,
        "project.bias": rest["cnn_b"],
    }
    for branch, n in enumerate(orders):
        for layer in (0, 1):
            arrays[f"ngram_layers.{branch}.{layer}.window.weight"] = rest[f"w{layer + 1}_{n}"].T
            arrays[f"ngram_layers.{branch}.{layer}.window.bias"] = rest[f"b{layer + 1}_{n}"]
    dan = {"hidden1": "d0", "hidden2": "d1", "shortcut2": "p1", "hidden3": "d2", "out": "d3", "shortcut_out": "p3"}
    arrays |= {f"dan.{ours}.weight": rest[theirs].T for ours, theirs in dan.items()}
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def _wire_fields(data: bytes) -> Iterator[tuple[int, Any]]:
    # The protobuf wire format: four fields are wanted, and the alternative is another dependency.
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(kind) or (varint() if kind == 2 else None)
        if size is None or at + size > len(data):
            raise ValueError("not a SentencePiece model")
        yield key >> 3, data[at : at + size]
        at += size


def _read_sentencepiece(data: bytes) -> tuple[list[tuple[str, float]], bytes]:
    pieces: list[tuple[str, float]] = []
    charsmap = b""
    for field, value in _wire_fields(data):
        if field == 1:
            piece = dict(_wire_fields(value))
            pieces.append((piece[1].decode(), struct.unpack("<f", piece.get(2, bytes(4)))[0]))
        elif field == 3:
            charsmap = dict(_wire_fields(value))[2]
    if len(pieces) < 7 or not charsmap or [piece for piece, _ in pieces[:3]] != ["<unk>", "<s>", "</s>"]:
        raise ValueError("sp.model is not the expected SentencePiece model")
    return pieces, charsmap


def _use_normalizer(charsmap: bytes) -> Any:
    """SentencePiece's normalisation in terms of ``tokenizers``.

    ``Precompiled`` alone takes the shortest match of a grapheme where SentencePiece takes the longest, so that
    decomposed text loses its accents. NFKC first leaves it only single characters to map. Stand-ins from the
    noncharacters mend the rest: one saves the fullwidth tilde, one keeps Arabic and Hebrew vowel signs in the order
    they were typed, and one marks the start, so that a text of nothing but spaces still leaves one unknown token.
    """
    from tokenizers import Regex, normalizers

    tilde, barrier, start = "\ufdd0", "\ufdd1", "\ufdd2"
    vowel_signs = "[\u0591-\u05c7\u064b-\u0652\u0670\u06d6-\u06ed]"
    return normalizers.Sequence(
        [
            normalizers.Replace("\uff5e", tilde),
            normalizers.Prepend(start),
            normalizers.Replace(Regex(f"(?={vowel_signs})"), barrier),
            normalizers.NFKC(),
            normalizers.Precompiled(charsmap),
            normalizers.Replace(barrier, ""),
            normalizers.Replace(tilde, "\uff5e"),
            normalizers.Replace(Regex(f"{start} *(?=[^ ])"), "▁"),
            normalizers.Replace(Regex(r" +\z"), ""),
            normalizers.Replace(Regex(" +"), "▁"),
        ]
    )


def _known_characters(pieces: list[tuple[str, float]]) -> str:
    # As ranges: a class of five thousand single characters is slower to compile and twice the size.
    codes = sorted({ord(character) for piece, _ in pieces for character in piece})
    ranges: list[list[int]] = []
    for code in codes:
        if ranges and code == ranges[-1][1] + 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(f"\\x{{{first:x}}}-\\x{{{last:x}}}" for first, last in ranges)


def _use_tokenizer(pieces: list[tuple[str, float]], charsmap: bytes) -> Any:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    from lusifer.starter.use_encoder import UseTokenizer

    # Without a score of their own, the special pieces would win wherever a text spells one out, such as
    # "<s>". Scores are rounded to 2**-14: then their decimals are few enough to be read back from JSON
    # exactly, and equally good segmentations ("aaaa") tie, as they should, instead of being told apart by
    # a last bit.
    vocab = [
        (piece, round(score * 2**14) / 2**14 if index > _LAST_SPECIAL else _NEVER)
        for index, (piece, score) in enumerate(pieces)
    ]
    vocab[_USE_PAD] = ("<pad>", _NEVER)
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=False))
    tokenizer.normalizer = _use_normalizer(charsmap)
    # The library fuses neighbouring unknown characters into one token, the encoder's package does not.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"[^{_known_characters(pieces)}]"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return UseTokenizer(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=MAX_LENGTH,
        # Special tokens are never read out of a text: nobody can forge an end by writing "</s>".
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def convert_smollm2(gguf: Path, target: Path) -> None:
    """Converts SmolLM2-135M-Instruct (arXiv 2502.02737) from its GGUF file to a ``LlamaForCausalLM``.

    Transformers' ``gguf_file=`` route gives the same numbers in four times the time.

    Args:
        gguf: The GGUF file, tensors in Q4_1 and Q8_0.
        target: Existing empty folder; receives configuration, weights (float16, norms float32) and tokenizer.

    Raises:
        LusiferError: If the file is not a GGUF file of a Llama model.
    """
    from gguf import GGUFReader
    from safetensors.torch import save_file

    try:
        reader = GGUFReader(gguf)
        config = _llama_config(reader)
        tensors = _llama_tensors(reader, config)
        tokenizer = _smollm2_tokenizer(reader)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise LusiferError(f"{gguf} is not the expected GGUF file: {error}") from error
    config.save_pretrained(target)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(target)


def _gguf_value(reader: GGUFReader, name: str) -> Any:
    return reader.fields[name].contents()


def _llama_config(reader: GGUFReader) -> Any:
    from transformers import LlamaConfig

    if _gguf_value(reader, "general.architecture") != "llama":
        raise ValueError("its architecture is not llama")

    def value(name: str) -> Any:
        return _gguf_value(reader, f"llama.{name}")

    return LlamaConfig(
        vocab_size=value("vocab_size"),
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=value("attention.head_count"),
        num_key_value_heads=value("attention.head_count_kv"),
        max_position_embeddings=value("context_length"),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("rope.freq_base")},
        # A GGUF file without an output matrix uses the embeddings in its place.
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
        bos_token_id=_gguf_value(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_gguf_value(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_gguf_value(reader, "tokenizer.ggml.padding_token_id"),
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )


_LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _llama_tensors(reader: GGUFReader, config: Any) -> dict[str, torch.Tensor]:
    import numpy as np
    import torch
    from gguf.quants import dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors = {}
    for tensor in reader.tensors:
        *block, name, kind = tensor.name.split(".")
        if kind != "weight" or name not in _LLAMA_NAMES:
            raise ValueError(f"unknown tensor {tensor.name}")
        array = dequantize(tensor.data, tensor.tensor_type)
        if name in heads:
            # GGUF interleaves the two rotated halves of a head; transformers keeps them side by side.
            rows, width = array.shape
            array = array.reshape(heads[name], -1, 2, width).swapaxes(1, 2).reshape(rows, width)
        # Weights of 4 or 8 bits times a float16 scale lose less in float16 than in bfloat16 (final states
        # off by 0.07% and 0.48%, measured), at the same size. Loading widens them to float32 by default.
        if array.ndim > 1:
            array = array.astype(np.float16)
        prefix = f"model.layers.{block[1]}." if block else ""
        tensors[f"{prefix}{_LLAMA_NAMES[name]}.weight"] = torch.from_numpy(np.array(array, order="C"))
    return tensors


def _smollm2_tokenizer(reader: GGUFReader) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = _gguf_value(reader, "tokenizer.ggml.tokens")
    kinds: list[int] = _gguf_value(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _gguf_value(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    # The published tokenizer cuts numbers into digits first, which transformers' GGUF route leaves out.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _GGUF_CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    named = {
        f"{ours}_token": tokens[_gguf_value(reader, f"tokenizer.ggml.{theirs}_token_id")]
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=_gguf_value(reader, "llama.context_length"),
        chat_template=_gguf_value(reader, "tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **named,
    )
