"""Makes a folder of SmolLM2-135M-Instruct (arXiv 2502.02737) that transformers loads from its GGUF file; no network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lusifer.errors import LusiferError

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader

_GGUF_CONTROL = 3  # The type of control tokens in a GGUF vocabulary.


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
