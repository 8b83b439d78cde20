"""From recipe to checkpoint: ``OUTPUT/<stage>/model`` after each stage and ``OUTPUT/model`` at the end.

A finished stage is never repeated; an interrupted one goes on from its last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from transformers import set_seed

from lusifer.data.content import check_inputs_unchanged, inputs_of, keep_inputs
from lusifer.data.records import read_texts
from lusifer.errors import LusiferError
from lusifer.loading import load_checkpoint
from lusifer.model.backbones import load_tokenizer
from lusifer.model.fingerprint import files_fingerprint
from lusifer.model.published_adapters import read_base_adapter
from lusifer.model.sentence_transformer import lusifer_model, save_atomically
from lusifer.publishing import make_folder, publish_file, sweep_folder, write_json
from lusifer.recipes.schema import DataRecipe, GradientStage, Recipe
from lusifer.storage import without_paths
from lusifer.training.checks import check_model
from lusifer.training.outcome import everyday_embeddings, moved
from lusifer.training.precision import data_types, restore_data_types, settle
from lusifer.training.processes import (
    alone_in,
    check_output,
    first_process_first,
    first_process_says,
    processes,
    wait_for_all,
)
from lusifer.training.sharding import is_sharded
from lusifer.training.stages import (
    STAGES,
    build_model,
    prepare_stage,
    run_align,
    run_contrast,
    run_warm_start,
    stage_mixture,
)
from lusifer.training.teaching import check_teacher
from lusifer.training.trainer import load_trained

logger = logging.getLogger(__name__)


def check_inputs(recipe: Recipe) -> None:
    """Opens every backbone's configuration and checks every data set of a recipe, before any work starts.

    Raises:
        LusiferError: If one is missing, broken or of the wrong kind.
    """
    encoder, llm = check_model(recipe)
    for adapter in recipe.model.llm_base_adapters:
        read_base_adapter(adapter)
    source = recipe.warm_start_data()
    if recipe.warm_start.enabled and source is not None:
        read_texts(source, 1)
    for name in ("align", "contrast"):
        if not getattr(recipe, name).enabled:
            continue
        _check_held_out(name, getattr(recipe, name), stage_mixture(recipe, name).held_out_rows)
        check_teacher(recipe, name, encoder, llm)


def _check_held_out(name: str, stage: GradientStage, rows: int) -> None:
    """Says what the measurements of a stage rest on; refuses a best metric that rests on nothing."""
    if stage.best_metric is not None and not rows:
        what = f"{name}.best_metric: no rows can be held out to measure it on"
        raise LusiferError(f"{what}; leave it out, or give sets of at least 20 rows that are not streamed")
    if stage.eval_steps is not None:
        chosen = f", and {stage.best_metric} on them chooses the best checkpoint" if stage.best_metric else ""
        tell = logger.warning if stage.best_metric and rows < _FEW else logger.info
        tell("%s: %d rows are held out and measured%s", name, rows, chosen)


_DAMAGED = "damaged"
_HASH = re.compile("[0-9a-f]{64}")
_FEW = 32  # Held-out rows, below which a choice among checkpoints is mostly chance.
# Fields that earlier versions had not, of a stage and of its sets.
_LATER = {"teacher", "teacher_weight", "infonce_weight", "warmup_share", "schedule"}
_LATER_OF_SETS = ("document_instruction", "positives")
# What may change when a run goes on: it decides speed, memory and logs, not the result.
_VOLATILE = {"save_steps", "logging_steps", "eval_steps", "save_total_limit", "report_to", "max_tokens", "graph_tokens"}
# So do these, which earlier versions took for the result's: at their defaults they give the fingerprints of before.
_SINCE_VOLATILE = {"gradient_checkpointing", "best_metric", "max_loss", "attn_implementation"}


def _deciding(section: Any) -> Any:
    """A section with the defaults in place of what decides nothing; of a disabled stage, its data alone are read."""
    if not getattr(section, "enabled", True):
        return type(section)(enabled=False, data=section.data)
    fields = type(section).model_fields
    return section.model_copy(update={name: fields[name].default for name in _SINCE_VOLATILE & fields.keys()})


def fingerprint(recipe: Recipe, stage: str, *, earlier: bool = False) -> str:
    """SHA-256 in hex of all that decides the result of a stage of `STAGES`: the model and every stage up to it.

    Args:
        recipe: The recipe.
        stage: The stage.
        earlier: Whether to count also what earlier versions counted, whose runs are known by it.
    """
    tree = {}
    for name in ("model", *STAGES[: STAGES.index(stage) + 1]):
        section = getattr(recipe, name) if earlier else _deciding(getattr(recipe, name))
        tree[name] = section.model_dump(exclude=_VOLATILE)
        for former, today in section.renamed.items():  # A run begun under the earlier names goes on.
            tree[name][former] = tree[name].pop(today)
        for field in _LATER & section.model_fields.keys():  # And one begun before there were these.
            if getattr(section, field) == type(section).model_fields[field].default:
                del tree[name][field]
        data = tree[name].get("data")
        for item in data if isinstance(data, list) else ():
            for field in _LATER_OF_SETS:
                if item[field] == DataRecipe.model_fields[field].default:
                    del item[field]
    return hashlib.sha256(json.dumps([recipe.seed, tree], sort_keys=True).encode()).hexdigest()


def train(recipe: Recipe, *, progress: bool = True) -> Path:
    """Runs a recipe's stages in order; returns the folder of the final model.

    Args:
        recipe: The recipe.
        progress: Whether to show progress bars.

    Raises:
        LusiferError: If the data or a backbone cannot be read, the output folder holds a run of another
            recipe or of data that have changed since, or another process is at work there.
    """
    processes()
    with first_process_first():
        check_inputs(recipe)
    with alone_in(Path(recipe.output)):
        check_output(Path(recipe.output))
        if processes().is_main_process:
            for folder in (Path(recipe.output), *(Path(recipe.output) / name for name in STAGES)):
                sweep_folder(folder)
        return _train(settle(recipe), progress)


def _train(recipe: Recipe, progress: bool) -> Path:
    output, model, previous = Path(recipe.output), None, None
    for number, name in enumerate(STAGES):
        if not getattr(recipe, name).enabled:
            continue
        first_process_says(partial(_check_content, recipe, name))
        if _finished(recipe, name):
            logger.info("%s is finished, skipping it", name)
            model = None
        else:
            model = _model_before(recipe, previous) if model is None else model
            # Again, because a resumed run has drawn other numbers on its way here.
            set_seed(recipe.seed + number)
            model = _run_stage(recipe, name, model, previous, progress)
        previous = output / name / "model"
    if model is None and previous is not None and first_process_says(partial(_is_final, output / "model", previous)):
        return output / "model"
    model = _model_before(recipe, previous) if model is None else model
    if processes().is_main_process:
        tokenizer = load_tokenizer("llm", recipe.model.llm, revision=recipe.model.llm_revision)
        save_atomically(model, output / "model", llm_tokenizer=tokenizer)
    wait_for_all()
    return output / "model"


def _is_final(model: Path, last: Path) -> bool:
    """Whether the final model is there and is the last stage's: who reads it shall not find it gone meanwhile."""
    if not (model / "llm_tokenizer").is_dir() or not {path.name for path in last.iterdir()} <= set(os.listdir(model)):
        return False
    weights = files_fingerprint(str(model))
    return weights is not None and weights == files_fingerprint(str(last))


def _check_content(recipe: Recipe, name: str) -> None:
    folder = Path(recipe.output) / name
    if folder.is_dir():
        check_inputs_unchanged(folder, inputs_of(recipe, name))


def recipe_for_provenance(recipe: Recipe) -> dict[str, Any]:
    """A recipe as a checkpoint keeps it: what differs from the defaults, paths shortened to file names."""
    return without_paths(recipe.model_dump(mode="json", exclude_defaults=True, exclude={"output"}))


def _model_before(recipe: Recipe, previous: Path | None) -> SentenceTransformer:
    device = processes().device
    if previous is None:
        set_seed(recipe.seed)
        return build_model(recipe.model, device=device)
    # As `build_model` loads it: a run that goes on computes in the same data types as one that never stopped.
    kept = ("attn_implementation", "quantization", "encoder_dtype", "llm_dtype")
    chosen = {name: getattr(recipe.model, name) for name in kept}
    return load_checkpoint(str(previous), device=str(device), model_kwargs={**chosen, "device_map": device})


def _finished(recipe: Recipe, name: str) -> bool:
    """Whether a stage's folder holds its result; an unfinished one only has the fingerprint it was begun with.

    Raises:
        LusiferError: If it was begun with another recipe, or nothing says with which.
    """
    folder = Path(recipe.output) / name
    known = [fingerprint(recipe, name, earlier=earlier) for earlier in (False, True)]
    begun = _stored(folder / "fingerprint", lambda text: text)
    ended = _stored(folder / "stage.json", lambda text: json.loads(text)["fingerprint"])
    remedy = f"remove the folder {str(folder)!r} to run the stage again"
    if ended == _DAMAGED and begun in known:  # Known as this recipe's, it may be written again.
        if processes().is_main_process:
            logger.warning("%s is damaged; its model is written again from its last checkpoint", folder / "stage.json")
        return False
    for stored, file in ((ended, "stage.json"), (begun, "fingerprint")):
        if stored == _DAMAGED:
            raise LusiferError(f"{str(folder / file)!r} is damaged; {remedy}")
        if stored is not None:
            break
    if stored is not None and stored not in known:
        refusal = "contains a run of another recipe; choose another output, or remove that folder to start over"
        raise LusiferError(f"{str(folder)!r} {refusal}")
    return ended is not None


def _stored(path: Path, read: Callable[[str], Any]) -> str | None:
    """The fingerprint in a file, `_DAMAGED`, or None where there is no file."""
    try:
        stored = read(path.read_text(encoding="utf-8"))
        return stored if _HASH.fullmatch(stored) else _DAMAGED
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return _DAMAGED


def _run_stage(
    recipe: Recipe, name: str, model: SentenceTransformer, previous: Path | None, progress: bool
) -> SentenceTransformer:
    """Runs one stage on the model of the folder before, and writes and returns its own."""
    folder = Path(recipe.output) / name
    started, state, inputs = time.monotonic(), processes(), fingerprint(recipe, name)
    types = data_types(lusifer_model(model))
    if state.is_main_process:
        make_folder(folder)
        keep_inputs(folder, inputs_of(recipe, name), begun=(folder / "fingerprint").is_file())
        with publish_file(folder / "fingerprint") as staging:
            staging.write_text(inputs, encoding="utf-8")
    wait_for_all()
    if name == "warm_start":
        result = run_warm_start(recipe, model, progress)
    else:
        run, before = run_align if name == "align" else run_contrast, everyday_embeddings(model)
        result = run(recipe, model, folder / "checkpoints", progress)
        trained, metrics = result.pop("trained"), result.pop("metrics")
        if metrics is not None:
            result["held_out"] = metrics(lusifer_model(model))
        if is_sharded(lusifer_model(model)):  # It cannot be put together in place.
            model = _model_before(recipe, previous)
            prepare_stage(recipe, name, lusifer_model(model))
            load_trained(lusifer_model(model), trained)
        restore_data_types(lusifer_model(model), types)
        result["moved"] = moved(before, everyday_embeddings(model))._asdict()
    seconds = time.monotonic() - started
    config = lusifer_model(model).config
    outcome = {**{key: value for key, value in result.items() if key != "history"}, "seconds": round(seconds, 1)}
    stages = {**config.provenance.get("stages", {}), name: outcome}
    known = {"seed": recipe.seed, "stages": stages, "recipe": recipe_for_provenance(recipe)}
    config.provenance = {**config.provenance, **known}
    model.eval()
    if state.is_main_process:
        save_atomically(model, folder / "model")
        write_json(folder / "stage.json", {"stage": name, "fingerprint": inputs, "seconds": seconds, **result})
    wait_for_all()
    return model
