"""The model card: what a model is, of what, how it was trained and how it scores. Imports no torch.

All of it comes from the checkpoint's configuration and the scores given; what is not known is said to be unknown. The
text is ``resources/card.md.jinja``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import metadata
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from lusifer.errors import LusiferError, first_line
from lusifer.publishing import publish_file
from lusifer.terminal import without_secrets

CARD = "README.md"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_STAGES = ("warm_start", "align", "contrast")


@dataclass
class CardScores:
    """Measured scores of a model.

    Attributes:
        languages: Language to its mean main score, per cent, and the number of tasks.
        results: One per task and subset, as hubs show them.
        versions: Versions of mteb.
        failed: Names of tasks that failed.
    """

    languages: Mapping[str, tuple[float, int]]
    results: list[EvalResult] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Mean over the languages, per cent."""
        return fmean(mean for mean, _ in self.languages.values())


def is_hub_id(name: str | None) -> bool:
    """Whether a name looks like one on the hub, ``owner/name``."""
    return bool(name) and _HUB_ID.fullmatch(str(name)) is not None and not Path(str(name)).exists()


def make_card(
    config: Mapping[str, Any], *, name: str | None = None, licence: str | None = None, scores: CardScores | None = None
) -> str:
    """The card of a model as Markdown with metadata in front.

    Args:
        config: The checkpoint's configuration as a mapping.
        name: What the model is called, on a hub ``owner/name``.
        licence: Its licence, as the hub abbreviates it.
        scores: Its scores; "not measured" when None.
    """
    provenance = config.get("provenance") or {}
    recipe = provenance.get("recipe") or {}
    encoder = config.get("encoder_config") or {}
    known = sorted((encoder.get("encoder_config") or encoder).get("languages") or [])
    llm_config = config.get("llm_config") or {}
    sources = _sources(recipe)
    data = ModelCardData(
        language=known or sorted(scores.languages if scores else []) or None,
        license=licence,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "feature-extraction", "lusifer", "multilingual", "zero-shot"],
        base_model=[str(config[part]) for part in ("encoder", "llm") if is_hub_id(config.get(part))] or None,
        datasets=[source for source in sources if is_hub_id(source)] or None,
        model_name=" ".join((name or "lusifer").split()).split("/")[-1],
        eval_results=(scores.results if scores else None) or None,
    )
    recipe_yaml = yaml.safe_dump(recipe, sort_keys=True, allow_unicode=True) if recipe else ""
    values = {
        "source": _source(),
        "title": _line(name or "A LUSIFER model"),
        "load_name": json.dumps(name or "FOLDER", ensure_ascii=False),
        "dimensions": config.get("head_dim") or llm_config.get("hidden_size", "?"),
        "max_seq_length": config.get("max_seq_length", "?"),
        "encoder": _code(config.get("encoder")),
        "llm": _code(config.get("llm")),
        "encoder_revision": _line(config.get("encoder_revision")),
        "llm_revision": _line(config.get("llm_revision")),
        "adapters": [_code(adapter) for adapter in config.get("llm_base_adapters") or []],
        "llm_layers": llm_config.get("num_hidden_layers", "?"),
        "pooling": config.get("pooling"),
        "standalone": config.get("standalone"),
        "converted_from": _code(provenance.get("converted_from")),
        "stages": list(_stage_rows(provenance.get("stages") or {}, recipe)),
        "sources": [_code(source) for source in sources],
        "recipe": recipe_yaml,
        # Longer than any run of backticks in the recipe, so that none of its prompts ends the block.
        "fence": "`" * max(3, 1 + max(map(len, re.findall("`+", recipe_yaml)), default=0)),
        "scores": scores,
        "known": known,
        "licence": _line(licence),
    }
    template = (files("lusifer") / "resources" / "card.md.jinja").read_text(encoding="utf-8")
    return ModelCard.from_template(data, template_str=template, **values).content + "\n"


def _source() -> str:
    """What pip installs lusifer from: its repository, or a clone where nobody has published one."""
    for url in metadata("lusifer").get_all("Project-URL") or []:
        label, _, address = url.partition(", ")
        if label == "Repository" and "/OWNER/" not in address:
            return f"git+{address}"
    return "."


def write_card(folder: Path, **options: Any) -> Path:
    """Writes the card of a checkpoint folder.

    Args:
        folder: The checkpoint; an older card is replaced.
        **options: As of `make_card`.

    Raises:
        LusiferError: If there is no checkpoint, or the card cannot be written.
    """
    text = make_card(read_config(folder), **options)
    try:
        with publish_file(folder / CARD) as staging:
            staging.write_text(text, encoding="utf-8")
    except OSError as error:
        raise LusiferError(f"cannot write the card into {str(folder)!r}: {first_line(error)}") from error
    return folder / CARD


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a checkpoint folder as it is written.

    Raises:
        LusiferError: If there is none, or it is of another kind of model.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LusiferError(f"no checkpoint at {str(folder)!r}: its config.json cannot be read ({error})") from error
    if not isinstance(config, dict) or config.get("model_type") != "lusifer":
        raise LusiferError(f"{str(folder)!r} is not a LUSIFER checkpoint: its config.json is of another model")
    return config


def _sources(recipe: Mapping[str, Any]) -> list[str]:
    sets = [item for stage in ("align", "contrast") for item in (recipe.get(stage) or {}).get("data") or []]
    sources = [item.get("source") for item in sets if isinstance(item, dict)]
    return list(dict.fromkeys(without_secrets(source) for source in sources if source))


def _stage_rows(stages: Mapping[str, Any], recipe: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    for name in (name for name in _STAGES if name in stages):
        result = stages[name]
        steps = "closed form" if name == "warm_start" else (recipe.get(name) or {}).get("steps", "")
        loss = f"{result['loss']:.3f}" if isinstance(result.get("loss"), float) else ""
        yield {"name": name, "steps": steps, "loss": loss, "seconds": result.get("seconds", "")}


def _line(text: Any) -> str:
    """Text on one line of a table: no line breaks, no column marks, no HTML."""
    words = " ".join(str(text).split()) if text else ""
    return words.replace("|", "\\|").replace("<", "&lt;")


def _code(text: Any) -> str:
    """Text in code marks on one line of a table; empty for nothing."""
    words = " ".join(str(text).replace("`", "'").split()).replace("|", "\\|") if text else ""
    return f"`{words}`" if words else ""
