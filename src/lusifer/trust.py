"""What no model's own files may ask for: pickles, code, files outside of its folder, patterns that never end.

A symbolic link leads out of a folder as a path in a configuration does: a vocabulary that is a link to a private file
is part of every model trained on it. Only links within the folder are followed, and those into the stores where caches
keep files of the folder.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

from lusifer.errors import LusiferError
from lusifer.hooks.transformers import cached_or_none

# Whatever a model's own files say: pickles may run code when they are opened.
SAFE = {"use_safetensors": True, "weights_only": True}
_INDEX = "model.safetensors.index.json"
_ADAPTER = "adapter_model"
# Under which names Sentence Transformers looks for the options of a Transformer module, in this order.
_FAMILIES = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
# Options of ``from_pretrained`` that name files, folders or code, beside those that say so by their endings.
_PLACES = {"subfolder", "variant", "key_mapping", "adapter_kwargs", "use_kernels", "kernel_config", "custom_generate"}
_PLACE_ENDINGS = ("_file", "_files", "_path", "_dir", "_folder")
_PATTERN_SIGNS = set("*+?{}()[]|")
LINKED = "LUSIFER_LINKED_FOLDERS"
_STORES = (".git/annex/objects", ".dvc/cache")  # Of a repository that the folder lies in.


def check_folder(what: str, name: str) -> None:
    """Refuses a model's folder with links out of it, or with a pipe or device in it, where a read may wait for ever.

    Links may lead to the blobs of the same repository in a hub's cache, to the store of the git-annex or DVC repository
    around the folder, and to the folders that ``LUSIFER_LINKED_FOLDERS`` names.

    Args:
        what: What it is, for the message.
        name: The folder; anything else passes.

    Raises:
        LusiferError: If so.
    """
    seen, allowed = set[str](), _allowed(Path(os.path.realpath(name)))
    for folder, folders, files in os.walk(name, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        for entry in (*folders, *files):
            path = os.path.join(folder, entry)
            if os.path.islink(path):
                _check_link(what, path, allowed)
            try:
                mode = os.stat(path).st_mode
            except OSError:  # A link to nothing: whoever needs the file says so.
                continue
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise LusiferError(f"{path!r} of {what} is a pipe, a socket or a device, not a file; remove it")


def _allowed(root: Path) -> list[Path]:
    """Where links of a model's folder may lead."""
    allowed = [root]
    for folder in (root, *root.parents):
        if folder.parent.name == "snapshots":  # Blobs of its repository, and those that repositories share.
            repository = folder.parent.parent
            allowed += [repository / "blobs", repository.parent / "blobs"]
        allowed += [folder / store for store in _STORES]
    allowed += [Path(named) for named in os.environ.get(LINKED, "").split(os.pathsep) if named]
    return [Path(os.path.realpath(folder)) for folder in allowed]


def _check_link(what: str, path: str, allowed: list[Path]) -> None:
    target = Path(os.path.realpath(path))
    if not any(target.is_relative_to(folder) for folder in allowed):
        raise LusiferError(
            f"{path!r} of {what} is a link to {str(target)!r}, outside of its folder; copy the model with its files "
            f"(cp -rL), or name the folder in {LINKED} if you trust the link"
        )


def check_files(what: str, name: str, **hub: Any) -> None:
    """Refuses a model whose own files lead out of its folder, name code, or are no files at all.

    Args:
        what: What it is, for the message.
        name: Its folder or hub id.
        **hub: ``token``, ``revision``, ``subfolder``, ...

    Raises:
        LusiferError: If its configuration names a file of weights or its index one outside of its folder; if an adapter
            there belongs to a model elsewhere on this machine, is a pickle, or names code; or as `check_folder`.
    """
    check_folder(what, name)
    _check_place(what, name, **hub)


def _check_place(what: str, name: str, **hub: Any) -> None:
    """The files of one folder of a model."""
    config, index = (_mapping(name, file, **hub) for file in ("config.json", _INDEX))
    if config.get("transformers_weights"):
        raise LusiferError(f"the configuration of {what} names a file of weights; remove transformers_weights there")
    _check_options(what, config, ("gguf_file", "gguf_files"))
    _check_base(what, config.get("base_model_name_or_path"))
    weight_map = index.get("weight_map")
    for file in set(map(str, weight_map.values())) if isinstance(weight_map, dict) else ():
        if Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise LusiferError(f"the index of {what} names {file!r}, which is not a safetensors file in its folder")
    if adapter := _mapping(name, "adapter_config.json", **hub):
        _check_adapter_files(what, name, adapter, **hub)


def check_modules(what: str, name: str, **hub: Any) -> None:
    """`check_files` of a Sentence Transformers model: of every module of it, and of the options these load with.

    Args:
        what: What it is, for the message.
        name: Its folder or hub id.
        **hub: ``token``, ``revision``, ...

    Raises:
        LusiferError: As `check_files`, or if options of a module name files, folders or code.
    """
    check_files(what, name, **hub)
    for place in _module_places(name, **hub):
        within = {**hub, "subfolder": place}
        if place:
            _check_place(what, name, **within)
        options = (_mapping(name, f"sentence_{family}_config.json", **within) for family in _FAMILIES)
        for key, value in next(filter(None, options), {}).items():
            if key.endswith(("_kwargs", "_args")) and isinstance(value, dict):
                _check_options(f"the {key} of {what}", value)


def check_adapter(what: str, fields: Mapping[str, Any]) -> None:
    """Refuses fields of an adapter that PEFT would import code for, or that are regular expressions.

    PEFT matches these with the names of all layers, and a short one can take longer than anybody lives.

    Args:
        what: The adapter, for the message.
        fields: Fields of ``peft.LoraConfig``.

    Raises:
        LusiferError: If there are any.
    """
    # A name of a module stands in every adapter; PEFT imports it where there is a configuration for it.
    if fields.get("megatron_config"):
        raise LusiferError(f"cannot add {what}: megatron_config names code to import; leave it out")
    for field in ("target_modules", "exclude_modules"):
        if isinstance(value := fields.get(field), str) and value != "all-linear":
            raise LusiferError(f"cannot add {what}: {field} is a pattern, {value!r}; write a list of layers' names")
    for field in ("layers_pattern", "rank_pattern", "alpha_pattern"):
        value = fields.get(field) or ()
        for pattern in [value] if isinstance(value, str) else value if isinstance(value, list | dict | tuple) else ():
            if _PATTERN_SIGNS & set(str(pattern)):
                raise LusiferError(f"cannot add {what}: {field} has a pattern, {pattern!r}; write layers' names")


def _check_options(what: str, options: Mapping[str, Any], places: tuple[str, ...] | None = None) -> None:
    """Refuses options that name files, folders or code, at any depth."""
    for key, value in options.items():
        named = key in places if places is not None else key in _PLACES or key.endswith(_PLACE_ENDINGS)
        if named and value:
            raise LusiferError(f"{what} names files or code; remove {key} there")
        if "attn_implementation" in key and isinstance(value, str) and "/" in value:  # Code of the hub.
            raise LusiferError(f"{what} names code to fetch; remove {key} there")
        if isinstance(value, dict):
            _check_options(what, value, places)


def _check_base(what: str, base: Any) -> None:
    """Refuses a base model that is a folder or file of this machine."""
    if not isinstance(base, str) or not base:
        return
    parts = (*PurePath(base).parts, *PureWindowsPath(base).parts)
    outside = base.startswith(("/", ".", "~")) or "\\" in base or ".." in parts or os.path.exists(base)
    if outside:
        raise LusiferError(
            f"{what} is an adapter of {base!r}, which lies outside of it; merge the two (PEFT: merge_and_unload), "
            "or write a hub id into base_model_name_or_path"
        )


def _check_adapter_files(what: str, name: str, adapter: dict[str, Any], **hub: Any) -> None:
    base = adapter.get("base_model_name_or_path")
    _check_base(what, base)
    check_adapter(f"the adapter of {what}", adapter)
    if _path(name, f"{_ADAPTER}.safetensors", **hub) is None and _path(name, f"{_ADAPTER}.bin", **hub) is not None:
        raise LusiferError(f"{_ADAPTER}.bin of {what} is a pickle and is not opened; save the adapter as safetensors")
    if isinstance(base, str) and base:
        of_base = {key: value for key, value in hub.items() if key not in ("revision", "subfolder")}
        config = _mapping(base, "config.json", **of_base)
        if config.get("transformers_weights"):
            raise LusiferError(f"the configuration of {base!r}, which {what} is an adapter of, names a file of weights")


def _module_places(name: str, **hub: Any) -> Iterator[str]:
    """Sub-folders of a model's modules, those of a router's modules among them; its own folder is ``""``."""
    try:
        path = _path(name, "modules.json", **hub)
        modules = [] if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # Whoever loads it says what is wrong.
        modules = []
    for module in modules if isinstance(modules, list) else []:
        place = module.get("path") if isinstance(module, dict) else None
        if not isinstance(place, str):
            continue
        yield place
        within = {**hub, "subfolder": place}
        if str(module.get("type")).endswith((".Router", ".Asym")):
            router = _mapping(name, "router_config.json", **within) or _mapping(name, "config.json", **within)
            types = router.get("types")
            for inner in types if isinstance(types, dict) else ():
                yield PurePath(place, str(inner)).as_posix()


def _path(name: str, file: str, **hub: Any) -> str | None:
    try:
        return cached_or_none(name, file, **hub)
    except (OSError, ValueError):  # Whoever loads it says what is wrong.
        return None


def _mapping(name: str, file: str, **hub: Any) -> dict[str, Any]:
    try:
        path = _path(name, file, **hub)
        content = {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # Whoever loads it says what is wrong.
        return {}
    return content if isinstance(content, dict) else {}
