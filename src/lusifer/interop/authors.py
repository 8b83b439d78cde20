"""The published checkpoints of LUSIFER's authors, as ours: checked, then converted tensor by tensor.

Adapters are kept beside backbones that hold the same weights, or merged into a standalone checkpoint of several files.
"""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

from lusifer.errors import LusiferError, first_line
from lusifer.hooks.transformers import cached_or_none
from lusifer.interop.authors_format import PARTS, UNUSED, Source, backbone_of, fetch, is_authors_checkpoint, read_source
from lusifer.locks import alone_at, tidy
from lusifer.model.backbones import load_config, load_tokenizer
from lusifer.model.checkpoint import WEIGHTS, check_fit
from lusifer.model.configuration import LusiferConfig
from lusifer.model.fingerprint import weight_files
from lusifer.model.modeling import LusiferModel
from lusifer.model.sentence_transformer import save_around
from lusifer.progress import bar, track
from lusifer.publishing import publish_folder, write_json
from lusifer.starter.fetch import cache_dir
from lusifer.trust import check_folder

logger = logging.getLogger(__name__)

_FILE_BYTES = 512 * 2**20  # Of one file of weights; bounds the memory, since a file is written from memory.
# Prompts of texts without an instruction; with one, it stands in front of the full stop.
_PROMPTS = {"query": ".\n", "document": ". Candidate:\n"}


class OtherBackboneError(LusiferError):
    """A checkpoint's adapters do not fit a backbone by name: only its own weights can stand below them."""


def find_authors(name: str) -> str:
    """Maps a checkpoint of the authors, folder or hub id, to its conversion in the cache, made on first use.

    ``name`` is any model's folder or hub id; what is no checkpoint of the authors is returned unchanged.

    Raises:
        LusiferError: If it is one, and cannot be converted.
    """
    folder = Path(name)
    if not folder.is_dir():
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            return name
        try:
            config = cached_or_none(name, "config.json")
        except (OSError, ValueError):  # Gated, or no such model: whoever loads it says so.
            config = None
        if config is None:
            return name
        folder = Path(config).parent
    check_folder(repr(name), str(folder))
    if not is_authors_checkpoint(folder):
        return name
    digest = hashlib.sha256()
    folder = fetch(name)
    for path in sorted(folder.glob("*.json")) + sorted(folder.glob("*.safetensors")):
        state = path.stat()
        digest.update(f"{path.resolve()} {state.st_size} {state.st_mtime_ns}".encode())
    out = cache_dir() / "models" / f"authors-{digest.hexdigest()[:12]}"
    if (out / "modules.json").is_file():
        tidy(out)
    else:
        with alone_at(out, wait=True):
            if not (out / "modules.json").is_file():
                logger.info("converting %s, once, into %s", name, out)
                try:
                    convert_authors(name, out)
                except OtherBackboneError:
                    convert_authors(name, out, merge=True)
    return str(out)


def convert_authors(
    source: str,
    out: Path,
    *,
    merge: bool = False,
    encoder: str | None = None,
    llm: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Converts a checkpoint of the authors.

    Args:
        source: Folder or hub id.
        out: Where ours goes; an older checkpoint there is replaced.
        merge: Merge the adapters and store every weight; else adapters stay, and the backbones are named, once their
            weights have been compared with the checkpoint's.
        encoder: Folder or hub id of the encoder; what the checkpoint names when None.
        llm: The same of the LLM.
        progress: Whether to show a bar.

    Returns:
        ``checkpoint``, the number of ``tensors`` written and of theirs left ``unused``, and the ``backbones``.

    Raises:
        LusiferError: If it is of another format, damaged, does not fit its backbones, or cannot be written.
    """
    with alone_at(out):
        return _convert(source, out, {"encoder": encoder, "llm": llm}, merge, progress)


def _convert(source: str, out: Path, chosen: dict[str, str | None], merge: bool, progress: bool) -> dict[str, Any]:
    folder = fetch(source)
    theirs = read_source(folder)
    names = {
        "encoder": chosen["encoder"] or backbone_of(folder, theirs.config["universal_learner_name_or_path"]),
        "llm": chosen["llm"] or backbone_of(folder, theirs.config["encoder_name_or_path"]),
    }
    config = _our_config(theirs, names, merge, {"converted_from": source, "format": "authors"})
    with torch.device("meta"):
        model = LusiferModel(config)
        model.put_adapters()
    _check_names(theirs, model, str(folder))
    if not merge:
        for part in ("encoder", "llm"):
            _check_backbone(theirs, part, names[part], progress)
    with publish_folder(out, "checkpoint") as staging:
        tokenizer = load_tokenizer("encoder", names["encoder"])
        save_around(staging, config, tokenizer, prompts=_PROMPTS, default_prompt="query")
        count = _write_weights(staging, theirs, model, progress)
    unused = sum(UNUSED.match(name) is not None for name in theirs.files)
    return {"checkpoint": str(out), "tensors": count, "unused": unused, "backbones": names}


def _our_config(source: Source, names: dict[str, str], merge: bool, provenance: dict[str, Any]) -> LusiferConfig:
    configs: dict[str, PretrainedConfig] = {part: load_config(part, names[part]) for part in names}
    for name in ("connector.added_tokens", "connector.up.weight", "connector.down.weight"):
        if name not in source.files:
            raise LusiferError(f"the checkpoint has no {name}: is it complete?")
    for part, first in (("encoder", "embeddings.word_embeddings.weight"), ("llm", "embed_tokens.weight")):
        if f"{part}.{first}" in source.files:
            path, theirs = source.files[f"{part}.{first}"]
            with safe_open(path, "pt") as file:
                configs[part].dtype = file.get_tensor(theirs)[:0].dtype
    return LusiferConfig(
        **names,
        **{f"{part}_config": config for part, config in configs.items()},
        **{f"{part}_adapter": None if merge else _adapter(source, part) for part in configs},
        connector_dim=source.shape("connector.up.weight")[0],
        connector_residual=False,
        num_added_tokens=source.shape("connector.added_tokens")[0],
        use_bos=False,
        head_dim=source.shape("head.2.weight")[0] if "head.2.weight" in source.files else None,
        standalone=merge,
        provenance=provenance,
    )


def _adapter(source: Source, part: str) -> dict[str, Any] | None:
    """PEFT's fields; their configuration misspells the rank."""
    if not source.adapted[part]:
        return None
    layers = sorted(layer for layer in source.adapted[part] if not UNUSED.match(f"{part}.{layer}."))
    rank = source.shape(f"{part}.{layers[0]}.lora_A.default.weight")[0]
    if (stated := source.config.get("loar_r", rank)) != rank:
        raise LusiferError(f"the {part}'s adapter has rank {rank}, but config.json says {stated}")
    dropout = source.config.get("dropout", 0.0)
    return {"r": rank, "lora_alpha": _alpha(source), "lora_dropout": dropout, "target_modules": layers}


def _alpha(source: Source) -> float:
    alpha = source.config.get("lora_alpha")
    if not isinstance(alpha, int | float):
        raise LusiferError("config.json has no lora_alpha, without which the adapters' scale is unknown")
    return alpha


def _plain(name: str) -> str:
    return name.replace(".base_layer.", ".")


def _check_names(source: Source, model: LusiferModel, folder: str) -> None:
    """Every tensor of ours is there in its shape, and nothing else is."""
    expected = {_plain(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    used = {name for name in source.files if not UNUSED.match(name)}
    lora = {name for name in used if ".lora_" in name} if model.config.standalone else set()
    for name in sorted(lora):
        layer, side = re.sub(r"\.lora_[AB]\.default\.weight$", "", name), int(".lora_A." in name)
        weight = expected.get(f"{layer}.weight")
        if weight is None or source.shape(name)[side] != weight[side]:
            raise LusiferError(f"the checkpoint {folder!r} has an adapter for {layer} that does not fit")
    shapes = [name for name in used & expected.keys() if source.shape(name) != expected[name]]
    check_fit(folder, missing=expected.keys() - used, extra=used - lora - expected.keys(), shapes=shapes)


def _check_backbone(source: Source, part: str, backbone: str, progress: bool) -> None:
    """Adapters may only be kept where the backbone's own files hold the checkpoint's weights."""
    try:
        files = weight_files(backbone)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise LusiferError(f"cannot read the backbone {backbone!r}: {first_line(error)}") from error
    if not files:
        raise OtherBackboneError(f"the backbone {backbone!r} has no safetensors to compare with; convert with --merge")
    names = [n for n in source.files if n.startswith(f"{part}.") and ".lora_" not in n and not UNUSED.match(n)]
    for name in track(names, f"comparing with {backbone}", "tensor", show=progress):
        inner = name.removeprefix(f"{part}.")
        stored = next((prefix + inner for prefix in PARTS[part][1] if prefix + inner in files), None)
        if stored is None:
            raise OtherBackboneError(f"the {part} {backbone!r} has no tensor {inner}; convert with --merge")
        with safe_open(files[stored], "pt") as file:
            theirs: Tensor = file.get_tensor(stored)
            ours = source.read(name)
            if theirs.shape != ours.shape or not torch.equal(theirs.to(ours.dtype), ours):
                raise OtherBackboneError(
                    f"the checkpoint's {part} is not {backbone!r}: {inner} differs, so its adapter does not "
                    "apply to it; convert with --merge, which stores all weights"
                )


def _is_trained(name: str) -> bool:
    return name.startswith(("connector.", "head.")) or "lora_" in name


def _read_tensor(source: Source, name: str, standalone: bool) -> Tensor:
    """One tensor of our checkpoint; its adapter is merged into it where the checkpoint is standalone."""
    plain = _plain(name)
    tensor = source.read(plain)
    layer = plain.removesuffix(".weight")
    if standalone and f"{layer}.lora_A.default.weight" in source.files:
        down, up = (source.read(f"{layer}.lora_{side}.default.weight").float() for side in "AB")
        scale = _alpha(source) / down.shape[0]
        tensor = torch.addmm(tensor.float(), up, down, alpha=scale).to(tensor.dtype)
    return (tensor.float() if _is_trained(name) else tensor).contiguous()


def _write_weights(folder: Path, source: Source, model: LusiferModel, progress: bool) -> int:
    """Writes our tensors, one file of bounded size in memory at a time; returns their number."""
    standalone = model.config.standalone
    state = {name: tensor for name, tensor in model.state_dict().items() if standalone or _is_trained(name)}
    plan = split_torch_state_dict_into_shards(state, max_shard_size=_FILE_BYTES)
    with bar(len(state), "converting", "tensor", show=progress) as shown:
        for file, tensors in plan.filename_to_tensors.items():
            shard = {}
            for name in tensors:
                shard[name] = _read_tensor(source, name, standalone)
                shown.update()
            try:
                save_file(shard, folder / file, metadata={"format": "pt"})
            except SafetensorError as error:
                raise LusiferError(f"cannot write {str(folder / file)!r}: {first_line(error)}") from error
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / f"{WEIGHTS}.index.json", index)
    return len(state)
