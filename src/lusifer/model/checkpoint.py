"""What a checkpoint stores, and how it is read back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import cached_file

from lusifer.errors import LusiferError, first_line
from lusifer.trust import SAFE

if TYPE_CHECKING:
    from lusifer.model.configuration import LusiferConfig
    from lusifer.model.modeling import LusiferModel

WEIGHTS = "model.safetensors"


def _is_stored(name: str, model: LusiferModel) -> bool:
    if model.config.standalone or name.startswith(("connector.", "head.")) or "lora_" in name:
        return True
    return model.config.encoder_stored and name.startswith("encoder.")


def stored_state(model: LusiferModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of a model's state dict that goes into its checkpoint."""
    return {name: tensor for name, tensor in state.items() if _is_stored(name, model)}


def check_fit(folder: str, *, missing: Iterable[str], extra: Iterable[str], shapes: Iterable[str]) -> None:
    """Refuses weights that do not fit a configuration, where transformers would fill in random ones.

    Args:
        folder: The checkpoint, for the message.
        missing: Names of missing tensors.
        extra: Names of unexpected tensors.
        shapes: Names of tensors of another shape.

    Raises:
        LusiferError: If there are any.
    """
    for what, names in (("lacks", missing), ("has unexpected", extra), ("has other shapes for", shapes)):
        if wrong := sorted(names):
            raise LusiferError(
                f"the checkpoint {str(folder)!r} does not fit its configuration: it {what} "
                f"{len(wrong)} tensors, {wrong[0]} first"
            )


def _check_finite(folder: str, state: Mapping[str, Tensor]) -> None:
    """Refuses weights that are NaN or infinite, whose embeddings would be NaN too."""
    for name in sorted(state):
        if state[name].is_floating_point() and not bool(torch.isfinite(state[name]).all()):
            raise LusiferError(f"the checkpoint {folder!r} is damaged: {name} contains NaN or infinite values")


def check_header(folder: str, expected: Mapping[str, tuple[int, ...]], **hub: Any) -> None:
    """Compares shapes with the head of the weights' file, before memory is taken for what a configuration asks.

    Args:
        folder: Folder or hub id of the checkpoint.
        expected: Shapes by tensor.
        **hub: ``token``, ``revision``, ...

    Raises:
        LusiferError: If the file is missing or damaged, or a shape is another.
    """
    with _weights(folder, **hub) as path, safe_open(path, "pt") as file:
        stored = set(file.keys())
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in expected if name in stored}
    wrong = [name for name, shape in shapes.items() if shape != expected[name]]
    check_fit(folder, missing=expected.keys() - shapes.keys(), extra=(), shapes=wrong)


@contextmanager
def _weights(folder: str, **hub: Any) -> Iterator[str]:
    try:
        yield str(cached_file(folder, WEIGHTS, **hub))
    except (OSError, SafetensorError) as error:
        raise LusiferError(f"cannot read {WEIGHTS} of the checkpoint {folder!r}: {first_line(error)}") from error


def load_stored(model: LusiferModel, folder: str, **hub: Any) -> None:
    """Reads a small checkpoint's weights into a model that has its backbones and adapters already.

    What it does not store is frozen: whoever trains further, with any trainer, would lose it on saving.

    Args:
        model: The model.
        folder: Folder or hub id of the checkpoint.
        **hub: ``token``, ``revision``, ...

    Raises:
        LusiferError: If the file is missing, damaged, or does not fit the model.
    """
    with _weights(folder, **hub) as path:
        state = load_file(path)
    expected = stored_state(model, model.state_dict())
    shapes = [name for name in expected.keys() & state.keys() if expected[name].shape != state[name].shape]
    # Tied weights (T5's embeddings) are written once.
    read = {expected[name].data_ptr() for name in expected.keys() & state.keys()}
    missing = [name for name in expected.keys() - state.keys() if expected[name].data_ptr() not in read]
    check_fit(folder, missing=missing, extra=state.keys() - expected.keys(), shapes=shapes)
    _check_finite(folder, state)
    model.load_state_dict(state, strict=False)
    for name, parameter in model.named_parameters():
        if not _is_stored(name, model):
            parameter.requires_grad_(False)


def load_standalone(
    load: Callable[..., Any], name: str, config: LusiferConfig, dtype: torch.dtype | str | None, **options: Any
) -> LusiferModel:
    """Reads a checkpoint that holds every weight, each part in its own data type unless one is asked for.

    Args:
        load: transformers' own loader, for this checkpoint.
        name: The checkpoint, for messages.
        config: Its configuration.
        dtype: Data type of the backbones; those of the checkpoint when None or ``auto``.
        **options: For the loader.

    Raises:
        LusiferError: If it is damaged or does not fit its configuration.
    """
    own = {part: getattr(config, f"{part}_config").dtype for part in ("encoder", "llm")}
    mixed = dtype in (None, "auto") and None not in own.values() and own["encoder"] != own["llm"]
    # transformers has one data type for all of a file: the wider one, then each part's own.
    options |= {"dtype": torch.float32 if mixed else dtype or "auto", "config": config, **SAFE}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, report = load(**options)
    except SafetensorError as error:
        raise LusiferError(f"cannot read the weights of the checkpoint {name!r}: {error}") from error
    _check_loaded(name, model, report)
    for part, kept in own.items() if mixed else ():
        for parameter in getattr(model, part).parameters():
            parameter.data = parameter.data.to(kept)
    loaded: LusiferModel = model
    return loaded


def _check_loaded(folder: str, model: LusiferModel, report: dict[str, Any]) -> None:
    """Refuses a standalone checkpoint that does not fit its configuration or holds NaN.

    Args:
        folder: The checkpoint, for the message.
        model: The model read from it.
        report: What transformers says of the loading.

    Raises:
        LusiferError: If so.
    """
    shapes = [key for key, *_ in report["mismatched_keys"]]
    check_fit(folder, missing=report["missing_keys"], extra=report["unexpected_keys"], shapes=shapes)
    _check_finite(folder, model.state_dict())
