"""A recipe for an LLM embedder of one's own, with the reasons for every choice beside it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lusifer.data.reading import fingerprint
from lusifer.errors import LusiferError
from lusifer.interop.llm_embedder import LLMEmbedder, Note
from lusifer.model.backbones import load_config
from lusifer.recipes.files import load_recipe
from lusifer.recipes.schema import DataRecipe

# Above it, a laptop's CPU is out of the question.
SMALL = 1_000_000_000
_TEXT, _PAIRS = "starter:english-verses", "starter:english-pairs"


def recipe_path(out: Path) -> Path:
    """Where the recipe goes: ``out`` itself if it ends in .yaml or .yml, else recipe.yaml in that folder."""
    return out if out.suffix in (".yaml", ".yml") else out / "recipe.yaml"


def write_recipe(path: Path, text: str, *, force: bool = False) -> None:
    """Writes a recipe and reads it back, whole or not at all.

    Raises:
        LusiferError: If there is a file already and not ``force``, or it cannot be written.
    """
    if path.exists() and not force:
        raise LusiferError(f"{str(path)!r} exists; choose another name, or --force to replace it")
    staging = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=f".{path.name}-", suffix=".yaml", delete=False, encoding="utf-8"
        ) as file:
            staging = Path(file.name)
            file.write(text)
        load_recipe(staging)
        os.replace(staging, path)
    except OSError as error:
        raise LusiferError(f"cannot write the recipe {str(path)!r}: {error.strerror}") from error
    finally:
        if staging is not None:
            staging.unlink(missing_ok=True)


def compose(
    encoder: str, embedder: LLMEmbedder, *, pairs: str | None = None, text: str | None = None, output: str = "runs/mine"
) -> str:
    """The recipe as YAML, its reasons as comments.

    Args:
        encoder: Hub id, folder or starter name of the multilingual encoder.
        embedder: What `lusifer.interop.llm_embedder.inspect_embedder` found.
        pairs: English query-positive pairs; the starter's when None.
        text: English texts; where there are pairs only, their queries are not read for stage 0 and 1.
        output: Folder of the run.

    Raises:
        LusiferError: If the encoder cannot be read or is a decoder.
    """
    _check_encoder(encoder)
    small = embedder.parameters < SMALL
    text, pairs = text or _TEXT, pairs or _PAIRS
    parts = [
        _comment(["An English embedder made multilingual. Found:"]),
        _notes(embedder.notes),
        _comment(["", f"  lusifer data check THIS; lusifer train THIS --dry-run{'' if small else ' --ranks 8'}"]),
        _comment([f"  {'lusifer train THIS' if small else 'torchrun --nproc-per-node 8 -m lusifer train THIS'}"]),
        _yaml({"output": output, "seed": 0}),
        _section("model", _model(encoder, embedder, small), _model_reasons(embedder)),
        _section("warm_start", {"data": text, "texts": 3000 if small else 5000, "spectrum": 0.5, "scale": 5}),
        _section("align", _align(embedder, text, pairs, small), _align_reasons(embedder)),
        _section("contrast", _contrast(pairs, small)),
    ]
    if not small:
        parts.append(_section("scale", {"strategy": "fsdp2"}))
    return "\n".join(parts) + "\n"


def _check_encoder(encoder: str) -> None:
    load_config("encoder", encoder)


def _model(encoder: str, found: LLMEmbedder, small: bool) -> dict[str, Any]:
    lora = {"r": 16, "alpha": 32, "dropout": 0.0 if small else 0.05}
    model: dict[str, Any] = {"encoder": encoder, "llm": found.llm}
    if found.adapters:
        model["llm_base_adapters"] = found.adapters
    model |= {"llm_dtype": found.dtype, "max_seq_length": 128 if small else 512, "pooling": found.pooling}
    if not found.use_bos:
        model["use_bos"] = False
    if found.prompts:
        model["prompts"] = found.prompts
    if not small:
        model |= {"encoder_dtype": "bfloat16", "encoder_lora": lora}
    return {**model, "llm_lora": lora}


def _model_reasons(found: LLMEmbedder) -> list[str]:
    return ["prompts stand in front of the texts wherever the result is used."] if found.prompts else []


def _align(found: LLMEmbedder, text: str, pairs: str, small: bool) -> dict[str, Any]:
    if not found.head:
        return {"enabled": False}
    data = [{"source": text, "task": "reconstruct"}, {"source": pairs, "task": "complete", "start": 0.5}]
    shared: dict[str, Any] = {"data": data, "mask_probability": 0.5}
    if small:
        batch: dict[str, Any] = {
            "steps": 60,
            "batch_size": 16,
            "warmup_steps": 5,
            "save_steps": 10,
            "target_max_seq_length": 64,
        }
        return {**shared, **batch, "max_tokens": 1024}
    batch = {"train_encoder": "lora", "steps": 2000, "batch_size": 256, "warmup_steps": 200, "save_steps": 200}
    return {**shared, **batch, "precision": "bfloat16", "gradient_checkpointing": True}


def _align_reasons(found: LLMEmbedder) -> list[str]:
    return [] if found.head else ["Stage 1 needs an LM head, and this LLM has none."]


def _contrast(pairs: str, small: bool) -> dict[str, Any]:
    if small:
        return {
            "data": [{"source": pairs}],
            "symmetric": True,
            "steps": 150,
            "batch_size": 64,
            "learning_rate": 1.0e-3,
            "warmup_steps": 10,
            "save_steps": 25,
            "max_tokens": 1024,
        }
    return {
        "data": [{"source": pairs}],
        "train_encoder": "lora",
        "steps": 4000,
        "batch_size": 1024,
        "learning_rate": 1.0e-4,
        "connector_learning_rate": 5.0e-4,
        "warmup_steps": 200,
        "save_steps": 200,
        "precision": "bfloat16",
        "gradient_checkpointing": True,
    }


def _comment(lines: Iterable[str]) -> str:
    return "\n".join(f"# {line}".rstrip() for line in lines)


def _notes(notes: list[Note]) -> str:
    return _comment(f"- {' '.join(n.what.split())} ({n.where}){': ' + n.so if n.so else ''}" for n in notes)


def _section(name: str, fields: dict[str, Any], reasons: Iterable[str] = ()) -> str:
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
    fingerprint(DataRecipe(source=source))
