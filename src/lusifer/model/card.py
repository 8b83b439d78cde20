"""The model card: what a model is, of what, how it was trained and how it scores. Imports no torch.

Everything stands in the checkpoint's configuration (backbones, and the recipe and stages in its ``provenance``) or in
the results of `lusifer evaluate`. Nothing is guessed: what is not known is said to be unknown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from lusifer.errors import LusiferError
from lusifer.evaluation.report.results import System

CARD = "README.md"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_PAPER = """@article{lusifer2025,
  title={LUSIFER: Language Universal Space Integration for Enhanced Multilingual Embeddings with Large Language Models},
  author={Hieu Man and Nghia Trung Ngo and Viet Dac Lai and Ryan A. Rossi and Franck Dernoncourt and Thien Huu Nguyen},
  journal={arXiv preprint arXiv:2501.00874},
  year={2025}
}"""


def is_hub_id(name: str | None) -> bool:
    """Whether a name looks like one on the hub, ``owner/name``."""
    return bool(name) and _HUB_ID.fullmatch(str(name)) is not None and not Path(str(name)).exists()


def make_card(
    config: Mapping[str, Any],
    *,
    name: str | None = None,
    licence: str | None = None,
    results: System | None = None,
) -> str:
    """The card of a model as Markdown with metadata in front.

    Args:
        config: The checkpoint's configuration as a mapping.
        name: What the model is called, on a hub ``owner/name``.
        licence: Its licence, as the hub abbreviates it.
        results: Scores of it.
    """
    config = dict(config)
    provenance = config.get("provenance") or {}
    encoder_languages = (config.get("encoder_config") or {}).get("languages") or []
    measured = results.by_language(_cells(results)) if results else {}
    data = ModelCardData(
        language=sorted(encoder_languages or measured) or None,
        license=licence,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "feature-extraction", "lusifer", "multilingual", "zero-shot"],
        base_model=[str(config[part]) for part in ("encoder", "llm") if is_hub_id(config.get(part))] or None,
        datasets=[source for source in _sources(provenance) if is_hub_id(source)] or None,
        model_name=(name or "lusifer").split("/")[-1],
        eval_results=_eval_results(results) if results else None,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name or 'A LUSIFER model'}",
        _what(config),
        _use(name or "FOLDER", config),
        _backbones(config),
        _training(provenance),
        _scores(results, measured),
        _limits(encoder_languages, measured),
        _licence(licence),
        f"## Citation\n\nThe method is that of the paper:\n\n```bibtex\n{_PAPER}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def write_card(folder: Path, **options: Any) -> Path:
    """Writes the card of a checkpoint folder; options as of `make_card`.

    Raises:
        LusiferError: If there is no checkpoint, or the card cannot be written.
    """
    text = make_card(read_config(folder), **options)
    try:
        staging = folder / f".{CARD}"
        staging.write_text(text, encoding="utf-8")
        staging.replace(folder / CARD)
    except OSError as error:
        raise LusiferError(f"cannot write the card into {str(folder)!r}: {error.strerror}") from error
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


def _cells(results: System) -> set[tuple[str, str]]:
    return {(task, subset) for task, subsets in results.scores.items() for subset in subsets}


def _sources(provenance: Mapping[str, Any]) -> list[str]:
    recipe = provenance.get("recipe") or {}
    sets = [item for stage in ("align", "contrast") for item in (recipe.get(stage) or {}).get("data") or []]
    found = [item.get("source") for item in sets if isinstance(item, dict)]
    return list(dict.fromkeys(source for source in found if source))


def _what(config: Mapping[str, Any]) -> str:
    encoder, llm = config.get("encoder") or "an encoder", config.get("llm") or "an LLM"
    width = config.get("head_dim") or (config.get("llm_config") or {}).get("hidden_size", "?")
    return (
        f"Text embeddings of {width} dimensions, normalised, for every language its encoder knows: "
        f"`{encoder}`, a connector, and `{llm}` reading in both directions (LUSIFER, "
        "[arXiv 2501.00874](https://arxiv.org/abs/2501.00874)). Trained on English; other languages are zero-shot. "
        f"Texts up to {config.get('max_seq_length', '?')} tokens of the encoder."
    )


def _use(name: str, config: Mapping[str, Any]) -> str:
    needed = "" if config.get("standalone") else " It fetches the backbones by their names."
    return (
        "## Use\n\n"
        f"`pip install lusifer`, no remote code.{needed}\n\n"
        "```python\nimport lusifer\n\n"
        f'model = lusifer.load("{name}")  # a SentenceTransformer\n'
        'vectors = model.encode(["Where is the station?", "Wo ist der Bahnhof?"])\n'
        "print(model.similarity(vectors, vectors))\n```"
    )


def _backbones(config: Mapping[str, Any]) -> str:
    rows = ["| part | | revision |", "|---|---|---|"]
    for part in ("encoder", "llm"):
        pinned = config.get(f"{part}_revision") or "not pinned"
        rows.append(f"| {part} | `{config.get(part) or 'unknown'}` | {pinned} |")
    rows += [f"| adapter of the llm, folded in | `{name}` | |" for name in config.get("llm_base_adapters") or []]
    layers = (config.get("llm_config") or {}).get("num_hidden_layers", "?")
    inside = "all weights are inside" if config.get("standalone") else "connector, head and adapters are inside"
    told = f"LLM layers used: {layers}. Pooling: {config.get('pooling')}; {inside}."
    return "## Parts\n\n" + "\n".join(rows) + f"\n\n{told}"


def _training(provenance: Mapping[str, Any]) -> str:
    lines = ["## Training"]
    if source := provenance.get("converted_from"):
        lines.append(f"Converted from `{source}`; not trained here.")
    stages = provenance.get("stages") or {}
    recipe = provenance.get("recipe") or {}
    if stages:
        rows = ["| stage | steps | loss | seconds |", "|---|---:|---:|---:|"]
        for name in [name for name in ("warm_start", "align", "contrast") if name in stages]:
            facts = stages[name]
            steps = (recipe.get(name) or {}).get("steps", "") if name != "warm_start" else "closed form"
            loss = f"{facts['loss']:.3f}" if isinstance(facts.get("loss"), float) else ""
            rows.append(f"| {name} | {steps} | {loss} | {facts.get('seconds', '')} |")
        lines.append("\n".join(rows))
    if sources := _sources(provenance):
        lines.append("Data, English: " + ", ".join(f"`{source}`" for source in sources) + ". Look up their licences.")
    if recipe:
        text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
        lines.append(f"<details><summary>The recipe</summary>\n\n```yaml\n{text}```\n\n</details>")
    return "\n\n".join(lines) if len(lines) > 1 else ""


def _scores(results: System | None, measured: Mapping[str, float]) -> str:
    if results is None:
        return "## Scores\n\nNot measured: `lusifer evaluate`, then `lusifer card --results`."
    rows = ["| language | mean main score | tasks |", "|---|---:|---:|"]
    for code, score in measured.items():
        tasks = [task for task, subsets in results.languages.items() if [code] in subsets.values()]
        rows.append(f"| {code} | {score:.1f} | {len(tasks)} |")
    mean = f"\n\nMean over {len(measured)} languages: **{fmean(measured.values()):.1f}**." if measured else ""
    versions = sorted(results.settings.get("version of mteb", set()))
    told = f" mteb {', '.join(versions)}." if versions else ""
    failed = f" Failed: {', '.join(results.failed)}." if results.failed else ""
    return "## Scores\n\n" + "\n".join(rows) + mean + f" Main scores of mteb in per cent, one run.{told}{failed}"


def _eval_results(results: System) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=results.types[task],
            task_name=results.types[task],
            dataset_type=f"mteb/{task}",
            dataset_name=f"{task} ({subset})",
            dataset_config=subset,
            metric_type="main_score",
            metric_name="main score",
            metric_value=round(100 * score, 2),
        )
        for task, subsets in results.scores.items()
        for subset, score in subsets.items()
    ]


def _limits(known: list[str], measured: Mapping[str, float]) -> str:
    lines = ["## Intended use and limits", "Search, clustering and classification of texts, also across languages."]
    if known:
        lines.append(f"The encoder was made for: {', '.join(sorted(known))}. Other languages stay near chance.")
    else:
        lines.append("A language that the encoder does not know stays near chance; the encoder's own card lists them.")
    if measured:
        lines.append(f"Measured in: {', '.join(sorted(measured))}. Everything else is untested.")
    lines.append("What the backbones and the data prefer or leave out, the embeddings do too.")
    return lines[0] + "\n\n" + " ".join(lines[1:])


def _licence(licence: str | None) -> str:
    unknown = "Unknown: it depends on both backbones and the data. Set it with `lusifer card --license`."
    told = f"{licence}." if licence else unknown
    return f"## Licence\n\n{told}"
