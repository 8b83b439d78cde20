"""From recipe to checkpoint: stages 0, 1 and 2, each resumable, each leaving a loadable model.

A run writes ``OUTPUT/<stage>/model`` after each stage and ``OUTPUT/model`` at the end. A finished
stage is never repeated; an interrupted one goes on from its last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from sentence_transformers import SentenceTransformer
from transformers import PreTrainedTokenizerBase, set_seed

from lusifer.data.records import read_texts
from lusifer.errors import LusiferError
from lusifer.loading import load_checkpoint
from lusifer.model.backbone_pair import check_window
from lusifer.model.backbones import load_config, load_tokenizer
from lusifer.model.modeling import LusiferModel
from lusifer.model.published_adapters import read_base_adapter
from lusifer.model.sentence_transformer import lusifer_model, save_atomically
from lusifer.publishing import publish_file, write_json
from lusifer.recipes.schema import Recipe
from lusifer.storage import without_paths
from lusifer.training.stages import (
    STAGES,
    build_model,
    prepare_stage,
    run_align,
    run_contrast,
    run_warm_start,
    stage_mixture,
)
from lusifer.training.trainer import load_trained

logger = logging.getLogger(__name__)


def processes() -> PartialState:
    """The processes torchrun started, connected; a single one otherwise."""
    return PartialState(cpu=not torch.accelerator.is_available())


def check_inputs(recipe: Recipe) -> None:
    """Opens every backbone's configuration and checks every data set of a recipe, before any work starts.

    Raises:
        LusiferError: If one is missing, broken or of the wrong kind; see `lusifer.data.records`.
    """
    encoder = load_config("encoder", recipe.model.encoder, revision=recipe.model.encoder_revision)
    llm = load_config("llm", recipe.model.llm, revision=recipe.model.llm_revision)
    lengths = [stage.max_seq_length or 0 for stage in (recipe.align, recipe.contrast) if stage.enabled]
    check_window(recipe.model.encoder, encoder, max(recipe.model.max_seq_length, *lengths, 0))
    for adapter in recipe.model.llm_base_adapters:
        read_base_adapter(adapter)
    depth = recipe.model.llm_layers or llm.num_hidden_layers
    if recipe.contrast.enabled and (recipe.contrast.llm_layers or 0) > depth:
        raise LusiferError(f"contrast.llm_layers is {recipe.contrast.llm_layers}, but the LLM has {depth} layers")
    source = recipe.warm_start_data()
    if recipe.warm_start.enabled and source is not None:
        read_texts(source, 1)
    for name in ("align", "contrast"):
        if getattr(recipe, name).enabled:
            stage_mixture(recipe, name)


# What may change when a run goes on: it decides speed, memory and logs, not the result.
_VOLATILE = {"save_steps", "logging_steps", "eval_steps", "save_total_limit", "report_to", "max_tokens", "graph_tokens"}


def fingerprint(recipe: Recipe, stage: str) -> str:
    """SHA-256 in hex of everything that decides a stage's result: the model and every stage up to it.

    Args:
        recipe: The recipe.
        stage: ``warm_start``, ``align`` or ``contrast``.
    """
    tree = {}
    for name in ("model", *STAGES[: STAGES.index(stage) + 1]):
        section = getattr(recipe, name)
        # By the keys' first names, so that a run begun under them goes on.
        earlier = {today: before for before, today in section.renamed.items()}
        tree[name] = {earlier.get(key, key): value for key, value in section.model_dump(exclude=_VOLATILE).items()}
    return hashlib.sha256(json.dumps([recipe.seed, tree], sort_keys=True).encode()).hexdigest()


def train(recipe: Recipe, *, progress: bool = True) -> Path:
    """Runs a recipe's stages in order.

    Args:
        recipe: The recipe.
        progress: Whether to show progress bars.

    Returns:
        The folder of the final model.

    Raises:
        LusiferError: If the data or a backbone cannot be read, or the output folder holds another recipe's run.
    """
    state = processes()
    with state.main_process_first():  # The others find the data read already.
        check_inputs(recipe)
    output = Path(recipe.output)
    model: SentenceTransformer | None = None
    llm_tokenizer: PreTrainedTokenizerBase | None = None
    previous: Path | None = None
    for number, name in enumerate(STAGES):
        if not getattr(recipe, name).enabled:
            continue
        folder = output / name
        if _finished(folder, fingerprint(recipe, name)):
            logger.info("%s is finished, skipping it", name)
            previous, model = folder / "model", None
            continue
        model_before = partial(_model_before, recipe, previous)
        model = model_before() if model is None else model
        if llm_tokenizer is None:
            llm_tokenizer = load_tokenizer("llm", recipe.model.llm, revision=recipe.model.llm_revision)
        # Again, because a resumed run has drawn other numbers on its way here.
        set_seed(recipe.seed + number)
        model = _run_stage(recipe, name, model, llm_tokenizer, folder, progress, model_before)
        previous = folder / "model"
    assert previous is not None
    if model is None:
        model = load_checkpoint(str(previous))
    final = output / "model"
    if state.is_main_process:
        tokenizer = load_tokenizer("llm", recipe.model.llm, revision=recipe.model.llm_revision)
        save_atomically(model, final, llm_tokenizer=tokenizer)
    state.wait_for_everyone()
    return final


def recipe_for_provenance(recipe: Recipe) -> dict[str, Any]:
    """A recipe as a checkpoint keeps it: what differs from the defaults, paths shortened to file names."""
    return without_paths(recipe.model_dump(mode="json", exclude_defaults=True, exclude={"output"}))


def _model_before(recipe: Recipe, previous: Path | None) -> SentenceTransformer:
    if previous is None:
        set_seed(recipe.seed)
        return build_model(recipe.model)
    chosen = {name: getattr(recipe.model, name) for name in ("attn_implementation", "quantization")}
    return load_checkpoint(str(previous), model_kwargs=chosen)


def _finished(folder: Path, expected: str) -> bool:
    """Whether a stage's folder holds its result; an unfinished one only has the fingerprint it was begun with.

    Raises:
        LusiferError: If it was begun with another recipe.
    """
    report, begun = folder / "stage.json", folder / "fingerprint"
    finished = report.is_file()
    if not finished and not begun.is_file():
        return False
    stored = json.loads(report.read_text(encoding="utf-8"))["fingerprint"] if finished else begun.read_text("utf-8")
    if stored != expected:
        raise LusiferError(
            f"{str(folder)!r} holds a run of another recipe; choose another output, or remove that "
            "folder to start again"
        )
    return finished


def _run_stage(
    recipe: Recipe,
    name: str,
    model: SentenceTransformer,
    llm_tokenizer: Any,
    folder: Path,
    progress: bool,
    model_before: Callable[[], SentenceTransformer],
) -> SentenceTransformer:
    """Runs one stage and writes its model; returns it.

    ``model_before`` makes the model as it was before the stage: a sharded one cannot be put together in place.
    """
    started, state, inputs = time.monotonic(), processes(), fingerprint(recipe, name)
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        with publish_file(folder / "fingerprint") as staging:
            staging.write_text(inputs, encoding="utf-8")
    state.wait_for_everyone()
    if name == "warm_start":
        result = run_warm_start(recipe, model, llm_tokenizer, progress)
    else:
        run = run_align if name == "align" else run_contrast
        result = run(recipe, model, llm_tokenizer, folder / "checkpoints", progress)
        trained, metrics = result.pop("trained"), result.pop("metrics")
        if metrics is not None:
            result["held_out"] = metrics(lusifer_model(model))
        if recipe.scale.strategy == "fsdp2" and state.num_processes > 1:
            model = model_before()
            prepare_stage(recipe, name, lusifer_model(model))
            load_trained(lusifer_model(model), trained)
    seconds = time.monotonic() - started
    _add_provenance(lusifer_model(model), recipe, name, {**result, "seconds": round(seconds, 1)})
    model.eval()
    if state.is_main_process:
        save_atomically(model, folder / "model")
        report = {"stage": name, "fingerprint": inputs, "seconds": seconds, **result}
        write_json(folder / "stage.json", report)
    state.wait_for_everyone()
    return model


def _add_provenance(model: LusiferModel, recipe: Recipe, name: str, result: dict[str, Any]) -> None:
    """Notes in the model's configuration what a stage came to, without its history."""
    earlier = model.config.provenance
    stages = {**earlier.get("stages", {}), name: {key: value for key, value in result.items() if key != "history"}}
    settings = recipe_for_provenance(recipe)
    model.config.provenance = {**earlier, "seed": recipe.seed, "stages": stages, "recipe": settings}
