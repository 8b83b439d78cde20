"""What a checkpoint stores, and how it is read back and merged."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import cached_file

from lusifer.errors import LusiferError

if TYPE_CHECKING:
    from lusifer.modeling import LusiferModel

WEIGHTS = "model.safetensors"


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


def load_stored(model: LusiferModel, folder: str, **hub: Any) -> None:
    """Reads a small checkpoint's weights into a model that has its backbones and adapters already.

    Raises:
        LusiferError: If the file is missing, damaged, or does not fit the model.
    """
    try:
        state = load_file(str(cached_file(str(folder), WEIGHTS, **hub)))
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise LusiferError(f"cannot read {WEIGHTS} of the checkpoint {str(folder)!r}: {reason}") from error
    expected = stored_state(model, model.state_dict())
    shapes = [name for name in expected.keys() & state.keys() if expected[name].shape != state[name].shape]
    # Tied weights (T5's embeddings) are written once.
    read = {expected[name].data_ptr() for name in expected.keys() & state.keys()}
    missing = [name for name in expected.keys() - state.keys() if expected[name].data_ptr() not in read]
    check_fit(folder, missing=missing, extra=state.keys() - expected.keys(), shapes=shapes)
    model.load_state_dict(state, strict=False)
