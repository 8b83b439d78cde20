"""Which way a decoder reads: measured, because a family may ignore ``is_causal`` without a word.

LUSIFER reads its LLM both ways (stage 2, encoding) and causally (stage 1; arXiv 2501.00874, section 3). Whether a state
depends on a later one is asked of the gradient, layer by layer: where attention is masked it is exactly zero, in every
data type, and soft tokens learn from it. (Adding a constant to an input and comparing states misleads: a layer norm
takes the constant away.)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.utils.generic import is_flash_attention_requested

from lusifer.errors import LusiferError, first_line
from lusifer.model.direction.families import INSTEAD, causal_layers, check_family, without_attention
from lusifer.model.direction.masks import direction_name, set_needs_mask
from lusifer.model.packing import run_llm

logger = logging.getLogger(__name__)

Read = Callable[[Tensor, Tensor], Tensor]
_TOKENS = 4
# Of the gradient at the state's own input. Masked, it is exactly zero; else above 1e-10 even in random models whose
# attention hardly matters.
_NOTHING = 1e-12


def settle_direction(name: str, llm: Any) -> None:
    """Measures that a loaded decoder reads both ways and causally; notes where it needs a mask written out for that.

    Costs four forward and backward passes of up to eight tokens. The random state is left alone.

    Args:
        name: The LLM's name, for messages.
        llm: A decoder without LM head; its configuration is noted in, in place.

    Raises:
        LusiferError: If it can be made to read in only one direction, or not from input embeddings.
    """
    config, masked = llm.config, list[str]()
    check_family(name, config)
    for is_causal in (False, True):
        read = partial(run_llm, llm, is_causal=is_causal)
        set_needs_mask(config, masked)
        if _follows(name, llm, read, is_causal=is_causal):
            continue
        if is_flash_attention_requested(config):
            raise LusiferError(_refusal(name, config, is_causal, "leave attn_implementation out, or set it to sdpa"))
        masked.append(direction_name(is_causal=is_causal))
        set_needs_mask(config, masked)
        if not _follows(name, llm, read, is_causal=is_causal):
            raise LusiferError(_refusal(name, config, is_causal, INSTEAD))
    if stay := causal_layers(config):
        logger.warning("the llm %r: %s", name, stay)


def check_alone(name: str, llm: Any, *, is_causal: bool) -> None:
    """Refuses a decoder that does not read in a direction where only its configuration's ``is_causal`` says so.

    Args:
        name: The LLM's name, for the message.
        llm: A decoder without LM head, ``is_causal`` set in its configuration.
        is_causal: The direction.

    Raises:
        LusiferError: If it reads in the other one.
    """

    def read(embeds: Tensor, mask: Tensor) -> Tensor:
        states: Tensor = llm(inputs_embeds=embeds.to(llm.dtype), attention_mask=mask.long()).last_hidden_state
        return states

    if not _follows(name, llm, read, is_causal=is_causal):
        wanted, other = (direction_name(is_causal=value) for value in (is_causal, not is_causal))
        instead = "compare with llm-causal:NAME" if not is_causal else "compare with llm:NAME"
        raise LusiferError(
            f"the llm {name!r} ({llm.config.model_type}) by itself stays {other}, not {wanted}; {instead}"
        )


def _refusal(name: str, config: PretrainedConfig, is_causal: bool, instead: str) -> str:
    stays, stage = ("bidirectional", "stage 1") if is_causal else ("causal", "encoding")
    wanted = direction_name(is_causal=is_causal)
    return f"the llm {name!r} ({config.model_type}) stays {stays} where {stage} needs it {wanted}; {instead}"


def _follows(name: str, llm: Any, read: Read, *, is_causal: bool) -> bool:
    """Whether every layer that could reads in a direction, with padding and without."""
    try:
        for padding in (False, True):
            ahead = layers_ahead(llm, read, padding=padding)
            able = ahead.keys() - set(without_attention(llm.config))
            if any(ahead.values()) if is_causal else not all(ahead[layer] for layer in able):
                return False
    except Exception as error:  # Whatever a model says that takes no input embeddings, or no positions.
        raise LusiferError(
            f"the llm {name!r} ({llm.config.model_type}) cannot read input embeddings: {first_line(error)}; {INSTEAD}"
        ) from error
    return True


def check_encoder(name: str, encoder: Any, width: int) -> None:
    """Refuses an encoder that does not read token ids both ways, by a forward pass of twice four tokens.

    Args:
        name: The encoder's name, for the message.
        encoder: The encoder, as `lusifer.model.backbones.load_encoder` gives it.
        width: Width of a state, as the configuration says.

    Raises:
        LusiferError: If it takes something else, gives other states, or reads causally.
    """
    ids = torch.tensor([[11, 12, 13, 14], [11, 12, 13, 15]], device=encoder.get_input_embeddings().weight.device)
    what = f"the encoder {name!r} ({encoder.config.model_type})"
    try:
        with torch.inference_mode():
            states = encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    except Exception as error:  # Whatever a model says that reads no token ids.
        raise LusiferError(f"{what} cannot read token ids alone: {first_line(error)}; give another encoder") from error
    if states.shape != (*ids.shape, width):
        raise LusiferError(
            f"{what} returns states of shape {tuple(states.shape)} for 2 texts of 4 tokens; give another"
        )
    if encoder.dtype == torch.float32 and torch.equal(states[0, 0], states[1, 0]):
        raise LusiferError(
            f"{what} does not read whole texts: its first state does not depend on the last token; give another"
        )


def layers_ahead(llm: Any, read: Read, *, padding: bool) -> dict[int, bool]:
    """Whether the first state of a text depends on the last one, layer by layer, in one forward and backward pass.

    Args:
        llm: The decoder.
        read: Runs it: (batch, seq, llm_dim) float32 embeddings and (batch, seq) bool mask, to (batch, seq, llm_dim).
        padding: Whether the text has padding behind it, for which some models make other masks.

    Returns:
        The answer for each layer by its number; under -1 for a model whose layers are not to be found.
    """
    mask = torch.ones(1 + padding, _TOKENS, dtype=torch.bool, device=llm.get_input_embeddings().weight.device)
    mask[0, -1] = not padding
    # Of its own, or a recipe's seed would mean something else.
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(*mask.shape, llm.config.hidden_size, generator=generator).to(mask.device)
    passes: list[tuple[int, Tensor, Tensor]] = []
    found: dict[int, bool] = {}
    with torch.inference_mode(False), torch.enable_grad():
        # Not a leaf, as soft tokens are none: some models scale their inputs in place.
        start = embeds.requires_grad_() * 1
        with _recorded(llm, mask.shape, passes):
            states = read(start, mask)
        for layer, before, after in passes or [(-1, start, states)]:
            # Random parts of the state: the sum of a normalised one is constant.
            weights = torch.randn(after[0, 0].shape, generator=generator).to(after.device)
            (gradient,) = torch.autograd.grad((after[0, 0].float() * weights).sum(), before, retain_graph=True)
            sizes = gradient[0].float().flatten(1).norm(dim=-1)
            found[layer] = found.get(layer, False) or _is_something(sizes[int(mask[0].sum()) - 1], sizes[0])
    return found


def _is_something(size: Tensor, own: Tensor) -> bool:
    return bool(size > _NOTHING * own)


@contextmanager
def _recorded(llm: Any, shape: torch.Size, passes: list[tuple[int, Tensor, Tensor]]) -> Iterator[None]:
    """Collects what goes into each layer and comes out of it, as long as it is one state a token."""

    def record(number: int, module: nn.Module, inputs: Any, options: Any, output: Any) -> None:
        before = inputs[0] if inputs else options.get("hidden_states")
        after = output[0] if isinstance(output, tuple | list) else output
        if isinstance(before, Tensor) and before.shape[:2] == shape == after.shape[:2]:
            passes.append((number, before, after))

    lists = [module for module in llm.children() if isinstance(module, nn.ModuleList)]
    layers = next((layers for layers in lists if len(layers) == llm.config.num_hidden_layers), ())
    handles = [
        layer.register_forward_hook(partial(record, number), with_kwargs=True) for number, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
