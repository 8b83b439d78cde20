"""What a checkpoint stores, and how it is read back and merged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import cached_file

from lusifer.errors import LusiferError
from lusifer.model.safe_files import WEIGHTS

if TYPE_CHECKING:
    from lusifer.model.modeling import LusiferModel


def is_stored(name: str, model: LusiferModel) -> bool:
    """Whether a parameter belongs into this model's checkpoint."""
    if model.config.standalone or name.startswith(("connector.", "head.")) or "lora_" in name:
        return True
    return model.config.encoder_stored and name.startswith("encoder.")


def stored_state(model: LusiferModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of a state dict that goes into the checkpoint."""
    return {name: tensor for name, tensor in state.items() if is_stored(name, model)}


def check_fit(folder: str, *, missing: Iterable[str], extra: Iterable[str], shapes: Iterable[str]) -> None:
    """Refuses weights that do not fit a configuration, where transformers would fill in random ones.

    Raises:
        LusiferError: If any tensor is missing, unexpected or of another shape.
    """
    for what, names in (("lacks", missing), ("has unexpected", extra), ("has other shapes for", shapes)):
        if found := sorted(names):
            raise LusiferError(
                f"the checkpoint {str(folder)!r} does not fit its configuration: it {what} "
                f"{len(found)} tensors, {found[0]} first"
            )


def check_finite(folder: str, state: Mapping[str, Tensor]) -> None:
    """Refuses weights that are no numbers, whose embeddings would be none either.

    Raises:
        LusiferError: If a tensor holds NaN or infinity.
    """
    for name in sorted(state):
        if state[name].is_floating_point() and not bool(torch.isfinite(state[name]).all()):
            raise LusiferError(f"the checkpoint {str(folder)!r} is damaged: {name} holds values that are no numbers")


def check_header(folder: str, expected: Mapping[str, tuple[int, ...]], **hub: Any) -> None:
    """Compares shapes with the head of the weights' file, before memory is taken for what a configuration asks.

    Raises:
        LusiferError: If the file is missing or damaged, or a shape is another.
    """
    try:
        with safe_open(str(cached_file(str(folder), WEIGHTS, **hub)), "pt") as file:
            there = set(file.keys())
            found = {name: tuple(file.get_slice(name).get_shape()) for name in expected if name in there}
    except (OSError, SafetensorError) as error:
        raise _unreadable(folder, error) from error
    check_fit(
        folder,
        missing=expected.keys() - found.keys(),
        extra=(),
        shapes=[name for name, shape in found.items() if shape != expected[name]],
    )


def _unreadable(folder: str, error: Exception) -> LusiferError:
    return LusiferError(f"cannot read {WEIGHTS} of the checkpoint {str(folder)!r}: {str(error).splitlines()[0]}")


def load_stored(model: LusiferModel, folder: str, **hub: Any) -> None:
    """Reads a small checkpoint's weights into a model that has its backbones and adapters already.

    What it does not store is frozen: whoever trains further, with any trainer, would lose it on saving.

    Raises:
        LusiferError: If the file is missing, damaged, or does not fit the model.
    """
    try:
        state = load_file(str(cached_file(str(folder), WEIGHTS, **hub)))
    except (OSError, SafetensorError) as error:
        raise _unreadable(folder, error) from error
    expected = stored_state(model, model.state_dict())
    shapes = [name for name in expected.keys() & state.keys() if expected[name].shape != state[name].shape]
    # Tied weights (T5's embeddings) are written once.
    read = {expected[name].data_ptr() for name in expected.keys() & state.keys()}
    missing = [name for name in expected.keys() - state.keys() if expected[name].data_ptr() not in read]
    check_fit(folder, missing=missing, extra=state.keys() - expected.keys(), shapes=shapes)
    check_finite(folder, state)
    model.load_state_dict(state, strict=False)
    for name, parameter in model.named_parameters():
        if not is_stored(name, model):
            parameter.requires_grad_(False)


def check_loaded(folder: str, model: LusiferModel, found: dict[str, Any]) -> None:
    """Refuses a standalone checkpoint that does not fit its configuration or holds what are no numbers.

    Raises:
        LusiferError: If so; ``found`` is what transformers says of the loading.
    """
    shapes = [key for key, *_ in found["mismatched_keys"]]
    check_fit(folder, missing=found["missing_keys"], extra=found["unexpected_keys"], shapes=shapes)
    check_finite(folder, model.state_dict())
