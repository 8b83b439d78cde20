"""What a recipe's data hold, before anyone spends GPU hours: sizes, lengths, duplicates, leaks from evaluation data."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lusifer.data.everyday_set import load_everyday
from lusifer.data.mixture import Stratum, open_strata, steps_of_sets
from lusifer.data.prompts import with_instruction
from lusifer.data.reading import Block, read_blocks
from lusifer.data.records import Records, Rows, copies_left_out, left_out, open_set
from lusifer.data.sources import find_files
from lusifer.errors import LusiferError
from lusifer.model.backbone_pair import check_window
from lusifer.model.backbones import load_config, load_tokenizer
from lusifer.progress import track
from lusifer.recipes.schema import AlignRecipe, ContrastRecipe, DataRecipe, Recipe
from lusifer.storage import is_remote
from lusifer.terminal import without_secrets

SAMPLE = 5_000
_EXAMPLES = 5
# Columns of evaluation data that hold no text of their own: a category such as "sports" leaks nothing.
_NO_TEXT = re.compile(r"(.*[-_])?(id|guid|labels?|lang|language|category|topic|name|title|score|split)", re.IGNORECASE)

_NUMBER = re.compile(r"[-+]?[\d.]+")  # In CSV all cells are text.


class _Spaces(dict[int, int]):
    """Maps punctuation and symbols to a space, code by code as they are met: `str.translate` reads it."""

    def __missing__(self, code: int) -> int:
        self[code] = 0x20 if unicodedata.category(chr(code))[0] in "PS" else code
        return self[code]


_SPACES = _Spaces()


def normalise(text: str) -> str:
    """A text for comparison: lower case, punctuation and symbols as spaces, single spaces."""
    plain = unicodedata.normalize("NFKC", text).casefold().translate(_SPACES)
    return " ".join(plain.split()) or text.strip()


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(normalise(text).encode(), digest_size=8).digest())


def evaluation_texts(folders: Sequence[str | Path], *, progress: bool = False) -> dict[int, str]:
    """Digests of all normalised texts of evaluation data, each with the name of a file that holds it.

    Args:
        folders: Files, folders or globs; the bundled everyday set always is among the data.
        progress: Whether to show a progress bar.

    Raises:
        LusiferError: If there is no such folder, no data in it, or a file cannot be read.
    """
    names = {_digest(text): "the everyday set" for texts in load_everyday().sentences.values() for text in texts}
    for folder in map(str, folders):
        files = find_files(folder)
        for file in track(files, "reading evaluation data", "file", show=progress):
            shown = file.url if is_remote(folder) else os.path.relpath(file.url, Path(folder).expanduser())
            for block in read_blocks([file]):
                names |= {_digest(text): file.url if shown == "." else shown for text in _texts_of(block)}
    return names


def _texts_of(block: Block) -> Iterator[str]:
    block.refuse_problems()
    cells = block.header is not None and isinstance(block.data, list)
    for name in block.names():
        values = [] if _NO_TEXT.fullmatch(name) else block.values(name)
        block.refuse_problems()  # Parquet shows only now what is not valid UTF-8.
        yield from (text for text in _strings(values) if not (cells and _NUMBER.fullmatch(text)))


def _strings(values: Any) -> Iterator[str]:
    if isinstance(values, str):
        yield values
    elif isinstance(values, list):
        for value in values:
            yield from _strings(value)


def _texts_by_column(record: dict[str, Any]) -> dict[str, list[str]]:
    return {name: [value] if isinstance(value, str) else value for name, value in record.items()}


def scan(rows: Rows, against: dict[int, str], *, progress: bool = False) -> dict[str, Any]:
    """Reads a whole set for duplicates and leaks.

    Args:
        rows: The opened set.
        against: Digests of evaluation data, see `evaluation_texts`.
        progress: Whether to show a progress bar.

    Returns:
        ``duplicates`` (rows that repeat an earlier one), ``negatives_per_row``, ``copies`` (negatives left out because
        they are the query or a positive of their row), ``leaks`` (rows with a text of the evaluation data) and up to
        five ``leak_examples``.
    """
    seen: set[int] = set()
    duplicates = negatives = leaks = 0
    examples: list[str] = []
    title = f"checking {without_secrets(rows.item.source)}"
    for row in track(range(len(rows)), title, "row", show=progress):
        texts = _texts_by_column(rows[row])
        negatives += len(texts.get("negative", []))
        digests = {name: [_digest(text) for text in several] for name, several in texts.items()}
        key = hash(tuple(digests.get("text") or [*digests["query"], *sorted(digests["positive"])]))
        duplicates += key in seen
        seen.add(key)
        leaked = [(name, against[d]) for name, several in digests.items() for d in several if d in against]
        leaks += bool(leaked)
        if leaked and len(examples) < _EXAMPLES:
            examples.append(f"{rows.where(row)}: {leaked[0][0]!r} is a text of {leaked[0][1]}")
    facts: dict[str, Any] = {"duplicates": duplicates, "negatives_per_row": negatives / len(rows)}
    facts["copies"] = rows.copies
    return {**facts, "leaks": leaks, "leak_examples": without_secrets(examples)}


def lengths(rows: Rows, tokenizers: dict[str, Any], limits: dict[str, int], *, seed: int) -> dict[str, Any]:
    """Tokens per text on a seeded sample of at most `SAMPLE` rows.

    Args:
        rows: The opened set.
        tokenizers: ``encoder`` and ``llm``.
        limits: ``encoder`` and, in stage 1, ``llm``: tokens after which a text (a target) is truncated.
        seed: Seed of the sample.

    Returns:
        ``sampled_rows``; ``encoder_tokens`` and ``llm_tokens``, each with ``mean``, ``p95`` and ``max``;
        ``truncated`` and, in stage 1, ``targets_truncated``: shares of the texts that are truncated.
    """
    count = min(SAMPLE, len(rows))
    chosen = np.sort(np.random.default_rng([seed, len(rows)]).choice(len(rows), count, replace=False))
    texts: list[str] = []
    for row in chosen.tolist():
        columns = _texts_by_column(rows[row])
        columns["query"] = [with_instruction(rows.item.instruction, query) for query in columns.get("query", [])]
        texts += [text for several in columns.values() for text in several]
    facts: dict[str, Any] = {"sampled_rows": count}
    for name, tokenizer in tokenizers.items():
        options = {"add_special_tokens": name == "encoder", "return_attention_mask": False}
        parts = (tokenizer(texts[first : first + 1000], **options) for first in range(0, len(texts), 1000))
        counts = np.array([len(ids) for part in parts for ids in part["input_ids"]])
        mean, p95 = float(counts.mean()), float(np.percentile(counts, 95))
        facts[f"{name}_tokens"] = {"mean": mean, "p95": p95, "max": int(counts.max())}
        if name in limits:
            facts["truncated" if name == "encoder" else "targets_truncated"] = float((counts > limits[name]).mean())
    return facts


def check(recipe: Recipe, *, against: Sequence[str | Path] = (), progress: bool = False) -> dict[str, Any]:
    """Checks every set of a recipe.

    Args:
        recipe: The recipe.
        against: Folders of evaluation data; the bundled everyday set is always among them.
        progress: Whether to show progress bars.

    Returns:
        ``sets`` (one mapping each, see `scan` and `lengths`, with ``stage``, ``dataset``, ``task``, ``rows``,
        ``clusters``, ``share`` of the stage's steps and ``epochs``), ``errors`` (unusable sets and leaks),
        ``warnings``, ``evaluation_texts`` and ``ok``, true without errors.

    Raises:
        LusiferError: If a tokenizer or the evaluation data cannot be read.
    """
    model = recipe.model
    tokenizers = {
        "encoder": load_tokenizer("encoder", model.encoder, revision=model.encoder_revision),
        "llm": load_tokenizer("llm", model.llm, revision=model.llm_revision),
    }
    encoder = load_config("encoder", model.encoder, revision=model.encoder_revision)
    check_window(model.encoder, encoder, model.max_seq_length)
    texts = evaluation_texts(against, progress=progress)
    report: dict[str, Any] = {"sets": [], "errors": [], "warnings": [], "evaluation_texts": len(texts)}
    if recipe.warm_start.enabled and recipe.warm_start.data:
        try:
            open_set(DataRecipe(source=recipe.warm_start.data, task="reconstruct"))
        except LusiferError as error:
            report["errors"].append(f"warm_start: {error}")
    for name in ("align", "contrast"):
        if getattr(recipe, name).enabled:
            _check_stage(recipe, name, tokenizers, texts, report, progress)
    report["ok"] = not report["errors"]
    return report


def _check_stage(
    recipe: Recipe,
    name: str,
    tokenizers: dict[str, Any],
    against: dict[int, str],
    report: dict[str, Any],
    progress: bool,
) -> None:
    stage: AlignRecipe | ContrastRecipe = getattr(recipe, name)
    strata: list[list[Stratum]] = []
    limits = {"encoder": recipe.model.max_seq_length}
    if isinstance(stage, AlignRecipe):
        limits["llm"] = stage.target_max_seq_length
    facts: list[dict[str, Any]] = []
    for number, item in enumerate(stage.data):
        try:
            opened = open_strata([item], batch_size=stage.batch_size, seed=recipe.seed)
            rows = opened[0].records
            content = scan(rows, against, progress=progress) | lengths(rows, tokenizers, limits, seed=recipe.seed)
        except LusiferError as error:
            report["errors"].append(f"{name}.data.{number}: {error}")
            continue
        strata.append(opened)
        clusters = sum(stratum.cluster_count for stratum in opened) or None
        head = {"stage": name, "number": number, "task": item.task, "rows": len(rows)}
        head["dataset"] = without_secrets(item.source)
        head["left_out"] = rows.left_out if isinstance(rows, Records) else 0
        facts.append({**head, "clusters": clusters, **content})
    if facts:
        _draws(facts, strata, stage, recipe.seed)
    for fact in facts:
        _judge(fact, stage.data[fact["number"]], report, whole=len(facts) == len(stage.data))
    report["sets"] += facts


def _draws(facts: list[dict[str, Any]], strata: list[list[Stratum]], stage: Any, seed: int) -> None:
    """Share of the steps and epochs of every set, from the plan that training will follow."""
    for fact, count in zip(facts, steps_of_sets(strata, steps=stage.steps, seed=seed), strict=True):
        fact["share"] = count / stage.steps
        drawn_rows = -(-stage.batch_size // stage.data[fact["number"]].positives)
        fact["epochs"] = count * drawn_rows / fact["rows"]


def _judge(fact: dict[str, Any], item: DataRecipe, report: dict[str, Any], *, whole: bool) -> None:
    where = f"{fact['stage']}.data.{fact['number']} ({fact['dataset']})"
    if fact["leaks"]:
        examples = "; ".join(fact["leak_examples"])
        problem = f"{fact['leaks']:,} rows hold a text of the evaluation data; remove them: {examples}"
        report["errors"].append(f"{where}: {problem}")
    warnings = []
    if fact["duplicates"]:
        warnings.append(f"{fact['duplicates']:,} rows repeat an earlier row")
    if whole and fact["share"] == 0:
        warnings.append("never sampled in so few steps; raise its weight or the steps")
    for key, limit in (("truncated", "model.max_seq_length"), ("targets_truncated", "align.target_max_seq_length")):
        if fact.get(key, 0) > 0.1:
            warnings.append(f"{fact[key]:.0%} of the texts are truncated; raise {limit}?")
    if fact["copies"]:
        warnings.append(copies_left_out(fact["copies"]))
    if fact["left_out"]:
        warnings.append(left_out(fact["left_out"], item.hard_negatives))
    if item.hard_negatives > (rows := fact["negatives_per_row"]):
        warnings.append(f"hard_negatives is {item.hard_negatives}, rows have {rows:.1f}: some repeat")
    report["warnings"] += [f"{where}: {warning}" for warning in warnings]
