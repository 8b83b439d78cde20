"""The format of the checkpoints that LUSIFER's authors publish (github.com/hieum98/lusifer), by our names.

One safetensors file (or several) with every weight and a ``config.json`` that names both backbones: XLM-R and an LLM,
each with LoRA adapters, a feed-forward connector with appended tokens, and a projection of two layers behind the mean.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lusifer.errors import LusiferError, first_line
from lusifer.hooks.huggingface_hub import why_not_loaded

_MARK = "universal_learner_name_or_path"  # No other configuration has it.
_LORA = re.compile(r"(?P<layer>.+)\.lora_(?P<side>[AB])\.(?P<adapter>[^.]+)\.weight$")
# By our part: their prefix, and what may stand in front of the same names in the backbone's own files.
PARTS = {"encoder": ("universal_learner.", ("", "roberta.")), "llm": ("encoder.", ("model.", ""))}
_KNOWN = {"universal_learner_backbone_type": "xlm-r", "connection_type": "ff", "pooling_method": "mean"}
UNUSED = re.compile(r"encoder\.pooler\.|llm\.lm_head\.")  # Neither has a part in an embedding.
_PLAIN = {
    "connection_module.added_tokens": "connector.added_tokens",
    "connection_module.ff.0.": "connector.up.",
    "connection_module.ff.2.": "connector.down.",
    "output_projection.0.": "head.0.",
    "output_projection.2.": "head.2.",
}


@dataclass
class Source:
    """Their checkpoint: our names of its tensors, and where they are.

    Attributes:
        config: Their configuration.
        files: Our name to file and their name; adapters' ``base_layer`` left out of ours.
        adapted: Part to names of its adapted layers within the part.
    """

    config: dict[str, Any]
    files: dict[str, tuple[Path, str]] = field(default_factory=dict)
    adapted: dict[str, set[str]] = field(default_factory=lambda: {"encoder": set(), "llm": set()})

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor by our name."""
        path, theirs = self.files[name]
        with safe_open(path, "pt") as file:
            return tuple(file.get_slice(theirs).get_shape())

    def read(self, name: str) -> Tensor:
        """One tensor by our name; the file is closed again, which frees the pages it was mapped to.

        Raises:
            LusiferError: If it holds infinite values or NaN.
        """
        path, theirs = self.files[name]
        with safe_open(path, "pt") as file:
            tensor: Tensor = file.get_tensor(theirs).clone()
        if not bool(torch.isfinite(tensor).all()):
            raise LusiferError(
                f"{path}: the tensor {theirs} contains NaN or infinite values; fetch the checkpoint again"
            )
        return tensor


def is_authors_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a checkpoint in the authors' format."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and _MARK in config


def fetch(source: str) -> Path:
    """A folder, or the snapshot of a hub id.

    Raises:
        LusiferError: If there is none.
    """
    if Path(source).is_dir():
        return Path(source)
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise LusiferError(f"no checkpoint at {source!r}: no such folder")
    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise LusiferError(f"cannot fetch {source!r} from the hub: {why_not_loaded(source, error)}") from error


def backbone_of(folder: Path, name: str) -> str:
    """A backbone's name, or its folder where the name is relative to the checkpoint's."""
    inside = folder / name
    return str(inside.resolve()) if not Path(name).is_absolute() and inside.is_dir() else name


def read_source(folder: Path) -> Source:
    """Their configuration and our names of their tensors; reads no weights.

    Raises:
        LusiferError: If it is of another format, of a kind we cannot convert, or unreadable.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LusiferError(f"cannot read config.json of the checkpoint {str(folder)!r}: {error}") from error
    if not isinstance(config, dict) or _MARK not in config or "encoder_name_or_path" not in config:
        raise LusiferError(f"{str(folder)!r} is not a checkpoint of the authors: its config.json has no {_MARK!r}")
    for key in (_MARK, "encoder_name_or_path"):
        if not isinstance(config[key], str):
            raise LusiferError(f"{folder}: {key} of config.json is no name: {config[key]!r}")
    for key, known in _KNOWN.items():
        if config.get(key, known) != known:
            raise LusiferError(f"{folder}: {key} {config[key]!r} cannot be converted, only {known!r}")
    source = Source(config)
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                for theirs in file.keys():  # noqa: SIM118 - not a mapping
                    _enter(source, path, theirs)
        except (SafetensorError, OSError) as error:
            raise LusiferError(f"cannot read {str(path)!r}: {first_line(error)}") from error
    if not source.files:
        raise LusiferError(f"the checkpoint {str(folder)!r} has no .safetensors file (pickles are not loaded)")
    return source


def _enter(source: Source, path: Path, theirs: str) -> None:
    """Enters one tensor under our name, ``encoder.layer...lora_A.weight`` and the like for adapters."""
    ours = next((to + theirs.removeprefix(of) for of, to in _PLAIN.items() if theirs.startswith(of)), None)
    for part, (prefix, _) in PARTS.items():
        if ours is None and theirs.startswith(prefix):
            inner = theirs.removeprefix(prefix).removeprefix("base_model.model.")
            inner = inner.removeprefix("model.") if part == "llm" else inner
            if match := _LORA.match(inner):
                source.adapted[part].add(match["layer"])
                inner = f"{match['layer']}.lora_{match['side']}.default.weight"
            ours = f"{part}.{inner.replace('.base_layer.', '.')}"
    if ours is None:
        raise LusiferError(f"{path}: unknown tensor {theirs}; this is not the authors' format")
    if ours in source.files:
        raise LusiferError(f"{path}: {theirs} and {source.files[ours][1]} map to the same tensor, {ours}")
    source.files[ours] = (path, theirs)
