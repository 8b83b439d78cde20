"""A recipe for an LLM embedder of one's own, with the reasons for every choice beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lusifer.data.records import look_up
from lusifer.errors import LusiferError, first_line
from lusifer.interop.llm_embedder import LLMEmbedder, Note
from lusifer.model.backbones import load_config
from lusifer.publishing import publish_file
from lusifer.recipes.files import load_recipe
from lusifer.recipes.schema import DataRecipe

# Above it, a laptop's CPU is out of the question.
SMALL = 1_000_000_000
_TEXT, _PAIRS = "starter:english-verses", "starter:english-pairs"


def recipe_path(out: Path) -> Path:
    """Where the recipe goes: ``out`` itself if it ends in .yaml or .yml, else recipe.yaml in that folder."""
    return out if out.suffix in (".yaml", ".yml") else out / "recipe.yaml"


def write_recipe(path: Path, text: str, *, force: bool = False) -> None:
    """Writes a recipe and reads it back, complete or not at all.

    Args:
        path: Where to, a name that ends in .yaml.
        text: The recipe as YAML.
        force: Replace a file that is there.

    Raises:
        LusiferError: If there is a file already and not ``force``, or it cannot be written.
    """
    if path.exists() and not force:
        raise LusiferError(f"{str(path)!r} exists; choose another name, or --force to replace it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with publish_file(path) as staging:
            staging.write_text(text, encoding="utf-8")
            load_recipe(staging)
    except OSError as error:
        raise LusiferError(f"cannot write the recipe {str(path)!r}: {first_line(error)}") from error


def compose(
    encoder: str, embedder: LLMEmbedder, *, pairs: str | None = None, text: str | None = None, output: str = "runs/mine"
) -> str:
    """The recipe as YAML, its reasons as comments.

    Args:
        encoder: Hub id, folder or starter name of the multilingual encoder.
        embedder: What `lusifer.interop.llm_embedder.inspect_embedder` read.
        pairs: English query-positive pairs; the starter's when None.
        text: English texts; where there are pairs only, their queries are not read for stage 0 and 1.
        output: Folder of the run.

    Raises:
        LusiferError: If the encoder cannot be read or is a decoder.
    """
    load_config("encoder", encoder)
    small = embedder.parameters < SMALL
    text, pairs = text or _TEXT, pairs or _PAIRS
    parts = [
        _comment(["An English embedder made multilingual. Found:"]),
        _notes(embedder.notes),
        _comment(["", f"  lusifer data check THIS; lusifer train THIS --dry-run{'' if small else ' --ranks 8'}"]),
        _comment([f"  {'lusifer train THIS' if small else 'torchrun --nproc-per-node 8 -m lusifer train THIS'}"]),
        _yaml({"output": output, "seed": 0}),
        _section("model", _model(encoder, embedder, small), *_model_reasons(embedder)),
        _section("warm_start", {"data": text, "texts": 3000 if small else 5000, "spectrum": 0.5, "scale": 5}),
        _section("align", _align(embedder, text, pairs, small), *_align_reasons(embedder)),
        _section("contrast", _contrast(pairs, small)),
    ]
    if not small:
        parts.append(_section("scale", {"strategy": "fsdp2"}))
    return "\n".join(parts) + "\n"


def _model(encoder: str, embedder: LLMEmbedder, small: bool) -> dict[str, Any]:
    lora = {"r": 16, "alpha": 32, "dropout": 0.0 if small else 0.05}
    model: dict[str, Any] = {"encoder": encoder, "llm": embedder.llm}
    if embedder.adapters:
        model["llm_base_adapters"] = embedder.adapters
    model |= {"llm_dtype": embedder.dtype, "max_seq_length": 128 if small else 512, "pooling": embedder.pooling}
    if not embedder.use_bos:
        model["use_bos"] = False
    if embedder.prompts:
        model["prompts"] = embedder.prompts
    if not small:
        model |= {"encoder_dtype": "bfloat16", "encoder_lora": lora}
    return {**model, "llm_lora": lora}


def _model_reasons(embedder: LLMEmbedder) -> list[str]:
    return ["prompts stand in front of the texts wherever the result is used."] if embedder.prompts else []


def _align(embedder: LLMEmbedder, text: str, pairs: str, small: bool) -> dict[str, Any]:
    if not embedder.head:
        return {"enabled": False}
    data = [{"source": text, "task": "reconstruct"}, {"source": pairs, "task": "complete", "start": 0.5}]
    shared: dict[str, Any] = {"data": data, "mask_probability": 0.5}
    if small:
        batch: dict[str, Any] = {"steps": 60, "batch_size": 16, "warmup_steps": 5, "save_steps": 10}
        return {**shared, **batch, "target_max_seq_length": 64, "max_tokens": 1024}
    batch = {"train_encoder": "lora", "steps": 2000, "batch_size": 256, "warmup_steps": 200, "save_steps": 200}
    return {**shared, **batch, "precision": "bfloat16", "gradient_checkpointing": True}


def _align_reasons(embedder: LLMEmbedder) -> list[str]:
    return [] if embedder.head else ["Stage 1 needs an LM head, and this LLM has none."]


def _contrast(pairs: str, small: bool) -> dict[str, Any]:
    data: dict[str, Any] = {"data": [{"source": pairs}]}
    batch: dict[str, Any]
    if small:
        batch = {"steps": 150, "batch_size": 64, "learning_rate": 1.0e-3, "warmup_steps": 10, "save_steps": 25}
        return {**data, "symmetric": True, **batch, "max_tokens": 1024}
    rates = {"learning_rate": 1.0e-4, "connector_learning_rate": 5.0e-4, "warmup_steps": 200, "save_steps": 200}
    batch = {"train_encoder": "lora", "steps": 4000, "batch_size": 1024}
    return {**data, **batch, **rates, "precision": "bfloat16", "gradient_checkpointing": True}


def _comment(lines: Iterable[str]) -> str:
    return "\n".join(f"# {line}".rstrip() for line in lines)


def _notes(notes: list[Note]) -> str:
    return _comment(f"- {' '.join(n.what.split())} ({n.where}){': ' + n.so if n.so else ''}" for n in notes)


def _section(name: str, fields: dict[str, Any], *reasons: str) -> str:
    body = "\n".join("  " + line for line in _yaml(fields).splitlines())
    return "\n".join(["", *(f"# {reason}" for reason in reasons), f"{name}:", body])


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


def check_data(source: str) -> None:
    """Looks whether a data set that a recipe would name is there.

    Raises:
        LusiferError: If not.
    """
    look_up(DataRecipe(source=source))
