"""What we use of transformers that is not public."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import AutoModel, PretrainedConfig
from transformers.utils import cached_file

from lusifer.errors import LusiferError, first_line
from lusifer.quiet import muted


def cached_or_none(name: str, file: str, **hub: Any) -> str | None:
    """Path of a model's file in its folder or in the hub's cache; None where there is none, or no hub.

    Touches the arguments ``_raise_exceptions_for_*`` of ``transformers.utils.cached_file``.

    Args:
        name: Folder or hub id.
        file: Name of the file.
        **hub: ``token``, ``revision``, ``cache_dir``, ...

    Raises:
        OSError: If the repository is gated or does not exist.
    """
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return cached_file(name, file, **{**hub, **quiet})


def has_pooler(config: PretrainedConfig) -> bool:
    """Whether ``AutoModel`` builds this kind of model with a pooler unless told otherwise.

    Touches ``AutoModel._model_mapping``, the only way from a configuration to its class without an instance.
    """
    auto: Any = AutoModel
    model_class = auto._model_mapping.get(type(config), None)
    return isinstance(model_class, type) and "add_pooling_layer" in inspect.signature(model_class).parameters


def remove_capturing_hooks(model: nn.Module) -> None:
    """Removes the hooks that ``output_hidden_states`` leaves behind; the next use installs them again.

    Touches ``_output_capturing_hooks_installed`` and the name of the hooks of ``transformers.utils.output_capturing``.
    """
    for module in model.modules():
        module.__dict__.pop("_output_capturing_hooks_installed", None)
        hooks = module._forward_hooks
        for key in [key for key, hook in hooks.items() if "output_capturing_hook" in hook.__qualname__]:
            del hooks[key]


@contextmanager
def no_panics(what: str) -> Iterator[None]:
    """Makes one line of a panic of the tokenizers' Rust code, which ``except Exception`` does not see.

    Touches the exception's name: pyo3 gives its class in no module that can be imported.

    Args:
        what: Whose tokenizer it is, for the message.

    Raises:
        LusiferError: In place of a panic.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise LusiferError(
            f"the tokenizer of {what} fails ({first_line(error)}): its tokenizer.json is damaged, or has a "
            "pattern that never ends on such a text; fetch the model again"
        ) from error


@contextmanager
def no_load_report() -> Iterator[None]:
    """Silences the list of tensors that a load leaves out: touches the logger of ``transformers.modeling_utils``."""
    with muted("transformers.modeling_utils"):
        yield


class InitializesParts:
    """A model made of transformers' own models; each computes its buffers when a checkpoint is loaded.

    In a class that is not transformers' own, modules without weights of their own are passed over: Falcon-H1's scales
    stayed uninitialised memory. `is_custom_code` is public but undocumented.
    """

    @classmethod
    def is_custom_code(cls) -> bool:
        """Whether transformers may pass over such modules."""
        return False
