"""A recipe for an LLM embedder of one's own, with the reasons for every choice beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from textwrap import indent
from typing import Any

from lusifer.errors import LusiferError, first_line
from lusifer.interop.llm_embedder import LLMEmbedder
from lusifer.model.backbones import load_config
from lusifer.publishing import make_folder, publish_file
from lusifer.recipes.files import load_recipe

# Above it, a laptop's CPU is out of the question.
SMALL = 1_000_000_000
_TEXT, _PAIRS = "starter:english-verses", "starter:english-pairs"


def recipe_path(out: Path) -> Path:
    """Where the recipe goes: ``out`` itself if it ends in .yaml or .yml, else recipe.yaml in that folder."""
    return out if out.suffix in (".yaml", ".yml") else out / "recipe.yaml"


def write_recipe(path: Path, text: str) -> None:
    """Writes a recipe and reads it back, complete or not at all.

    Args:
        path: Where to, a name that ends in .yaml; an older file is replaced.
        text: The recipe as YAML.

    Raises:
        LusiferError: If it cannot be written.
    """
    try:
        make_folder(path.parent)
        with publish_file(path) as staging:
            staging.write_text(text, encoding="utf-8")
            load_recipe(staging)
    except OSError as error:
        raise LusiferError(f"cannot write the recipe {str(path)!r}: {first_line(error)}") from error


def compose(
    encoder: str,
    embedder: LLMEmbedder,
    *,
    pairs: str | None = None,
    text: str | None = None,
    output: str = "runs/mine",
    limits: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """The recipe as YAML, its reasons as comments.

    Args:
        encoder: Hub id, folder or starter name of the multilingual encoder.
        embedder: What `lusifer.interop.llm_embedder.inspect_embedder` read.
        pairs: English query-positive pairs; the starter's when None.
        text: English texts; the starter's when None.
        output: Folder of the run.
        limits: Fields of ``align`` and ``contrast`` with which it fits into a machine.

    Raises:
        LusiferError: If the encoder cannot be read or is a decoder.
    """
    load_config("encoder", encoder)
    small = embedder.parameters < SMALL
    text, pairs = text or _TEXT, pairs or _PAIRS
    notes = (f"- {' '.join(n.what.split())} ({n.where}){': ' + n.so if n.so else ''}" for n in embedder.notes)
    ranks, launch = ("", "lusifer") if small else (" --ranks 8", "torchrun --nproc-per-node 8 -m lusifer")
    usage = [f"  lusifer data check THIS; lusifer train THIS --dry-run{ranks}", f"  {launch} train THIS"]
    prompted = "prompts are prepended wherever the result is used." if embedder.prompts else ""
    limits = limits or {}
    fitted = {
        name: f"{' and '.join(limits[name])}: for this machine's memory." if limits.get(name) else ""
        for name in ("align", "contrast")
    }
    headless = "" if embedder.head else "Stage 1 needs an LM head, and this LLM has none."
    lines = ["Makes an English embedder multilingual. Detected:", *notes, "", *usage]
    parts = [
        *(f"# {line}".rstrip() for line in lines),
        _yaml({"output": output, "seed": 0}),
        _section("model", _model(encoder, embedder, small), prompted),
        _section("warm_start", {"data": text, "texts": 3000 if small else 5000, "spectrum": 0.5, "scale": 5}),
        _section(
            "align", _align(embedder, text, pairs, small) | dict(limits.get("align", {})), headless or fitted["align"]
        ),
        _section("contrast", _contrast(pairs, small) | dict(limits.get("contrast", {})), fitted["contrast"]),
    ]
    if not small:
        parts.append(_section("scale", {"strategy": "fsdp2"}))
    return "\n".join(parts) + "\n"


def _model(encoder: str, embedder: LLMEmbedder, small: bool) -> dict[str, Any]:
    lora = {"r": 16, "alpha": 32, "dropout": 0.0 if small else 0.05}
    fields = {
        "encoder": encoder,
        "llm": embedder.llm,
        "llm_base_adapters": embedder.adapters or None,
        "llm_dtype": "auto" if small and embedder.dtype != "float32" else embedder.dtype,
        "max_seq_length": 128 if small else 512,
        "pooling": embedder.pooling,
        "use_bos": None if embedder.use_bos else False,
        "prompts": embedder.prompts or None,
        "encoder_dtype": None if small else "bfloat16",
        "encoder_lora": None if small else lora,
        "llm_lora": lora,
    }
    return {key: value for key, value in fields.items() if value is not None}


def _align(embedder: LLMEmbedder, text: str, pairs: str, small: bool) -> dict[str, Any]:
    if not embedder.head:
        return {"enabled": False}
    data = [{"source": text, "task": "reconstruct"}, {"source": pairs, "task": "complete", "start": 0.5}]
    if small:
        batch: dict[str, Any] = {"steps": 60, "batch_size": 16, "warmup_steps": 5, "save_steps": 10}
        batch |= {"target_max_seq_length": 64, "max_tokens": 1024}
    else:
        batch = {"train_encoder": "lora", "steps": 2000, "batch_size": 256, "warmup_steps": 200, "save_steps": 200}
        batch |= {"precision": "bfloat16", "gradient_checkpointing": True}
    return {"data": data, "mask_probability": 0.5, **batch}


def _contrast(pairs: str, small: bool) -> dict[str, Any]:
    if small:
        batch: dict[str, Any] = {"symmetric": True, "steps": 150, "batch_size": 64, "learning_rate": 1.0e-3}
        batch |= {"warmup_steps": 10, "save_steps": 25, "max_tokens": 1024}
    else:
        batch = {"train_encoder": "lora", "steps": 4000, "batch_size": 1024, "learning_rate": 1.0e-4}
        batch |= {"connector_learning_rate": 5.0e-4, "warmup_steps": 200, "save_steps": 200}
        batch |= {"precision": "bfloat16", "gradient_checkpointing": True}
    return {"data": [{"source": pairs}], **batch}


def _section(name: str, fields: dict[str, Any], reason: str = "") -> str:
    return "\n" + (f"# {reason}\n" if reason else "") + f"{name}:\n" + indent(_yaml(fields), "  ")


def _yaml(fields: dict[str, Any]) -> str:
    """Fields, a line each; inner values as JSON, which is YAML, but for lists of data sets."""
    lines = []
    for key, value in fields.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lines += [f"{key}:", *(f"  - {_flow(item)}" for item in value)]
        else:
            lines.append(f"{key}: {_flow(value)}")
    return "\n".join(lines)


def _flow(value: Any) -> str:
    if isinstance(value, float) and 0 < value < 1e-3:
        return f"{value:.1e}"
    return json.dumps(value, ensure_ascii=False)
