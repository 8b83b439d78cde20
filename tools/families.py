"""Tries every family of backbone that transformers has, each as a tiny random model, and writes what came of it.

python tools/families.py            writes the table of docs/backbones.md
python tools/families.py --check    fails where it is not what it would write
"""

from __future__ import annotations

import copy
import logging
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from lusifer.errors import LusiferError
from lusifer.model.backbones import build_encoder, build_llm, load_config
from lusifer.model.direction.families import causal_layers, check_family
from lusifer.model.direction.masks import masked_directions
from lusifer.model.direction.measured import check_encoder, settle_direction

PAGE = Path(__file__).parent.parent / "docs" / "backbones.md"
BEGIN, END = "<!-- Made by tools/families.py: change that, not this table. -->", "<!-- The end of what it makes. -->"
# The fields that decide a model's size, whatever a family calls them; each takes those that it has.
_WIDTH = {"hidden_size": 32, "n_embd": 32, "d_model": 32, "embed_dim": 32, "word_embed_proj_dim": 32, "dim": 32}
_WIDTH |= {"embedding_size": 32, "emb_dim": 32, "hidden_dim": 48, "intermediate_size": 48, "n_inner": 48, "ffn_dim": 48}
_WIDTH |= {"ffn_hidden_size": 48, "d_ff": 48, "d_kv": 8, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "d_inner": 48}
_DEPTH = {"num_layers": 2, "n_layer": 2, "n_layers": 2, "encoder_layers": 2, "decoder_layers": 2}
_DEPTH |= {"num_encoder_layers": 2, "num_decoder_layers": 2}
_HEADS = {"num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
_HEADS |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "rotary_dim": 4}
_HEADS |= {"num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4}
_TEXT = {"vocab_size": 100, "max_position_embeddings": 64, "n_positions": 64, "max_seq_len": 64, "seq_length": 64}
_TEXT |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size_per_layer_input": 100}
_TEXT |= {"decoder_start_token_id": 1, "embedding_dimension": 32}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
_EXPERTS |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "shared_intermediate_size": 16}
_EXPERTS |= {
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "hidden_size_per_layer_input": 8,
    "expert_ffn_hidden_size": 16,
}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
_SCAN = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_d_ssm": 64, "n_mamba_heads": 4}
_SCAN |= {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "mamba_chunk_size": 8, "chunk_size": 8}
_SCAN |= {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_SCAN |= {"linear_num_heads": 2, "linear_head_dim": 8, "conv_L_cache": 3, "lru_width": 32, "n_groups": 2}
_OTHER = {"index_head_dim": 8, "index_n_heads": 2, "laurel_rank": 8, "moe_topk": 2, "zero_expert_num": 2, "d_head": 8}
_OTHER |= {"entity_vocab_size": 10, "entity_emb_size": 8, "shared_experts_intermediate_size": 16}
_OTHER |= {"moe_shared_expert_intermediate_size": 16, "pronunciation_embed_dim": 8, "shape_embed_dim": 8}
_OTHER |= {"pronunciation_vocab_size": 10, "shape_vocab_size": 10}
SIZES: dict[str, Any] = {**_WIDTH, **_DEPTH, **_HEADS, **_TEXT, **_EXPERTS, **_LATENT, **_SCAN, **_OTHER}
_MOST = 5_000_000  # Parameters.
_INDEXER = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8}
# Where one family's own rules ask for something else.
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_theta": 1e4, "rope_type": "default"}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16},
    },
    "dots1": {"n_routed_experts": 4},
    "esmc": {"num_key_value_heads": 4},
    "funnel": {"block_sizes": [1, 1]},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_text": {"hidden_size_per_layer_input": 0},  # As its 26B and 31B models have it.
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "neomme": {"head_dim": 16},
    "qwen4_exp_text": {**_INDEXER, "indexer_budget": 16, "indexer_compress_ratio": 4},
    "reformer": {"axial_pos_embds": False},
    "zamba": {"layer_types": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "zaya": {"num_experts_per_tok": 1},
}
# No tiny configuration is made for these, and why.
UNTRIED: dict[str, str] = {
    "blt": "reads bytes through a patcher, of several models",
    "dots3_note_text": "has widths layer by layer",
    "gemma4_assistant": "drafts for another model",
    "funnel": "has two base models in transformers, and its automatic class takes neither",
    "encoder-decoder": "is made of two models",
    "git": "is a multimodal model in one configuration",
    "modernvbert": "is a multimodal model in one configuration",
    "perceiver": "reads bytes into latents",
    "phi4_multimodal": "is a multimodal model in one configuration",
    "ultravbert": "is a multimodal model in one configuration",
    "zamba2": "shares layers by their number, which few layers do not have",
}


@dataclass(frozen=True)
class Outcome:
    """What came of one family.

    Attributes:
        family: transformers' ``model_type``.
        kind: ``works``, ``mask``, ``hybrid``, ``refused`` or ``untried``.
        why: Of a hybrid, what stays causal; else the refusal or the reason.
    """

    family: str
    kind: str
    why: str = ""


def decoders() -> list[str]:
    """Every family that transformers can load as a causal language model, but not as a masked one."""
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(MODEL_FOR_MASKED_LM_MAPPING_NAMES))


def encoders() -> list[str]:
    """Every family of masked language model or encoder-decoder of text."""
    pairs = {family for family in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES if _is_pair(family)}
    return sorted({*MODEL_FOR_MASKED_LM_MAPPING_NAMES, *pairs})


def _is_pair(family: str) -> bool:
    make: Any = CONFIG_MAPPING[family]
    return bool(make.is_encoder_decoder or getattr(make, "model_type", "") == "encoder-decoder")


def tiny_config(family: str) -> PretrainedConfig:
    """A family's smallest configuration that still has a layer of each kind.

    Raises:
        Exception: Whatever transformers says where it does not go together.
    """
    make: Any = CONFIG_MAPPING[family]
    default = make()
    renamed = getattr(make, "attribute_map", {})
    known = {*getattr(make, "__dataclass_fields__", ()), *renamed}
    known -= {name for name in known if isinstance(getattr(make, renamed.get(name, name), None), property)}
    fields = {name: size for name, size in SIZES.items() if name in known}
    if "kv_lora_rank" in known:  # Latent attention has as many keys as queries; the width of a head follows.
        fields |= {"num_key_value_heads": 4}
        fields.pop("head_dim", None)
    kinds = list(getattr(default, "layer_types", None) or ())
    each = sorted(dict.fromkeys(kinds), key=lambda kind: kind == "full_attention")
    if "layer_types" in known and kinds:
        fields |= {"layer_types": (each * 2)[: max(2, len(each))], "num_hidden_layers": max(2, len(each))}
    else:
        fields["num_hidden_layers"] = max([2, *(kinds.index(kind) + 1 for kind in each)])
    fields = {name: value for name, value in fields.items() if name in known}
    return make(**{**fields, **SPECIAL.get(family, {})})


def try_decoder(family: str) -> Outcome:
    """Loads a tiny model of a family as `LusiferModel.from_backbones` loads an LLM."""
    if family in UNTRIED:
        return Outcome(family, "untried", UNTRIED[family])
    try:
        config = _stored("llm", tiny_config(family))
        check_family(family, config)
        _assert_tiny(family, build_llm, config)
        torch.manual_seed(0)
        llm = _random(build_llm(config))
        settle_direction(family, llm)
    except LusiferError as error:
        return Outcome(family, "refused", _without_name(str(error), family))
    if stays := causal_layers(llm.config):
        return Outcome(family, "hybrid", stays)
    return Outcome(family, "mask" if masked_directions(llm.config) else "works")


def try_encoder(family: str) -> Outcome:
    """The same for an encoder."""
    if family in UNTRIED:
        return Outcome(family, "untried", UNTRIED[family])
    try:
        config = _stored("encoder", tiny_config(family))
        _assert_tiny(family, build_encoder, config)
        torch.manual_seed(0)
        encoder = _random(build_encoder(config))
        check_encoder(family, encoder, config.hidden_size)
    except LusiferError as error:
        return Outcome(family, "refused", _without_name(str(error), family))
    return Outcome(family, "works")


def _stored(what: str, config: PretrainedConfig) -> PretrainedConfig:
    """A configuration as it comes back from a folder, by the door that every backbone takes."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return load_config(what, folder)


def _assert_tiny(family: str, build: Any, config: PretrainedConfig) -> None:
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in build(copy.deepcopy(config)).parameters())
    assert size < _MOST, f"{family} has {size:,} parameters: SIZES or SPECIAL lack a field"


def _random(model: Any) -> Any:
    """Ready to run; no parameter all zero, as some families begin, because nothing would pass through."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.any():
                parameter.normal_(std=0.02)
    return model.eval()


def _without_name(text: str, family: str) -> str:
    text = re.sub(rf"^(the (llm|encoder) )?'[^']*' \({re.escape(family)}\) ", "", text)
    return text.partition(";")[0]


_SAID = {
    "works": "Read both ways and causally, as transformers has them",
    "mask": "Read both ways and causally with a mask written out; not with FlashAttention",
    "hybrid": "Hybrids: attention is read both ways, other layers stay causal",
    "refused": "Refused",
    "untried": "Not tried here",
}


def table() -> str:
    """What came of every family, as the page shows it."""
    parts = []
    for title, outcomes in (("Decoders", _each(decoders(), try_decoder)), ("Encoders", _each(encoders(), try_encoder))):
        rows = [f"### {title}\n", "| outcome | families |", "|---|---|"]
        for kind, said in _SAID.items():
            mine = [outcome for outcome in outcomes if outcome.kind == kind]
            shown = said if title == "Decoders" or kind != "works" else "Work"
            if kind in ("works", "mask", "hybrid") and mine:
                rows.append(_row(shown, mine))
                continue
            for why in sorted({outcome.why for outcome in mine}):
                rows.append(_row(f"{shown}: {why}", [outcome for outcome in mine if outcome.why == why]))
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def _row(said: str, outcomes: list[Outcome]) -> str:
    names = ", ".join(f"`{outcome.family}`" for outcome in outcomes)
    return f"| {said} ({len(outcomes)}) | {names} |"


def _each(families: list[str], attempt: Callable[[str], Outcome]) -> list[Outcome]:
    return [attempt(family) for family in families]


def page() -> str:
    """The page with the table that holds today."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}"


def main() -> None:
    """Writes or checks."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(min(2, torch.get_num_threads()))
    text = page()
    stale = text != PAGE.read_text(encoding="utf-8")
    if "--check" in sys.argv[1:]:
        sys.exit("run python tools/families.py: docs/backbones.md would change" if stale else 0)
    if stale:
        PAGE.write_text(text, encoding="utf-8")
        print(PAGE)


if __name__ == "__main__":
    main()
