"""What a decoder's configuration alone says about the direction it reads in: known families, kinds of layers."""

from __future__ import annotations

from transformers import PretrainedConfig

from lusifer.errors import LusiferError

_STATE_SPACE = "is a state-space model, which is causal and cannot be made bidirectional"
_ALIBI = "has ALiBi positions, which favour later tokens once attention is bidirectional"
_BUILT_IN = "has a causal mask built in, and cannot be made bidirectional"
# Known before any weight is loaded; tests/model/test_all_families.py holds that they are what is measured.
REFUSED = {
    "bloom": _ALIBI,
    "falcon_mamba": _STATE_SPACE,
    "gpt_neo": _BUILT_IN,
    "mamba": _STATE_SPACE,
    "mamba2": _STATE_SPACE,
    "mpt": _ALIBI,
    "openai-gpt": _BUILT_IN,
    "rwkv": _STATE_SPACE,
    "xlnet": "is bidirectional and cannot be made causal, as stage 1 needs",
    "xlstm": _STATE_SPACE,
}
# As transformers names the kinds of layers in ``layer_types``: recurrent or convolutional, and without any mixing.
_CAUSAL_LAYERS = ("linear_attention", "conv")
_NO_MIXING = ("moe", "mlp", "sparse", "dense")
INSTEAD = "give an LLM whose attention can be bidirectional, such as Llama, Qwen or Gemma"


def check_family(name: str, config: PretrainedConfig) -> None:
    """Refuses a decoder that is known not to read in both directions, by its configuration alone.

    Args:
        name: The LLM's name, for the message.
        config: Its configuration.

    Raises:
        LusiferError: If so.
    """
    why = REFUSED.get(config.model_type) or (_ALIBI if getattr(config, "alibi", False) else None)
    kinds = _layer_types(config)
    if why is None and kinds and len(without_attention(config)) == len(kinds):
        why = "has no attention layer and is causal"
    if why is not None:
        raise LusiferError(f"the llm {name!r} ({config.model_type}) {why}; {INSTEAD}")


def causal_layers(config: PretrainedConfig) -> str | None:
    """Which layers of a hybrid decoder stay causal whatever the attention does, in words; None where there are none."""
    kinds = _layer_types(config)
    stay = [number for number, kind in enumerate(kinds) if kind in _CAUSAL_LAYERS]
    part = [number for number, kind in enumerate(kinds) if kind.startswith("hybrid")]
    said = []
    if stay:
        said.append(f"{len(stay)} of {len(kinds)} layers have no attention and stay causal ({_ranges(stay)})")
    if part:
        said.append(f"beside attention, {len(part)} of {len(kinds)} layers have a part that stays causal")
    return "; ".join(said) or None


def _layer_types(config: PretrainedConfig) -> list[str]:
    return list(getattr(config, "layer_types", None) or ())


def without_attention(config: PretrainedConfig) -> list[int]:
    """Numbers of the layers that have no attention."""
    kinds = enumerate(_layer_types(config))
    return [number for number, kind in kinds if kind in (*_CAUSAL_LAYERS, *_NO_MIXING)]


def _ranges(numbers: list[int]) -> str:
    """Layer numbers, the first few of many."""
    shown = ", ".join(str(number) for number in numbers[:8])
    return shown if len(numbers) <= 8 else f"{shown}, ..."
