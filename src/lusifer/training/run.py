"""From recipe to checkpoint: stages 0, 1 and 2, each resumable, each leaving a loadable model.

A run writes ``OUTPUT/<stage>/model`` after each stage and ``OUTPUT/model`` at the end. A finished
stage is never repeated; an interrupted one goes on from its last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import PreTrainedTokenizerBase, set_seed

from lusifer.data.collate import AlignCollator, ContrastCollator, llm_preprocess
from lusifer.data.mixture import Mixture
from lusifer.data.records import read_texts
from lusifer.errors import LusiferError
from lusifer.loading import load_checkpoint
from lusifer.model.backbone_alone import EncoderAlone
from lusifer.model.backbone_pair import check_window
from lusifer.model.backbones import keep_layers, load_config, load_tokenizer, truncate_llm
from lusifer.model.modeling import LusiferModel
from lusifer.model.published_adapters import read_base_adapter
from lusifer.model.sentence_transformer import lusifer_model, save_atomically, to_sentence_transformer
from lusifer.recipes.schema import AlignRecipe, ContrastRecipe, ModelRecipe, Optimisation, Recipe
from lusifer.storage import without_paths
from lusifer.training import warm_start as warmstart
from lusifer.training.alignment import AlignmentLoss, held_out_metrics
from lusifer.training.contrastive import ContrastiveLoss
from lusifer.training.gradient_stage import optimise
from lusifer.training.lm_head import load_lm_head
from lusifer.training.trainer import load_learning

logger = logging.getLogger(__name__)

STAGES = ("warm_start", "align", "contrast")
_HELD_OUT = 32


def processes() -> PartialState:
    """The processes torchrun started, connected; a single one otherwise."""
    return PartialState(cpu=not torch.accelerator.is_available())


def build_model(recipe: ModelRecipe) -> tuple[SentenceTransformer, PreTrainedTokenizerBase]:
    """The untrained model of a recipe, and its LLM's tokenizer.

    Raises:
        LusiferError: If a backbone cannot be loaded.
    """
    fields = recipe.model_dump(exclude={"encoder", "llm", "encoder_lora", "llm_lora", "prompts"})
    model = LusiferModel.from_backbones(recipe.encoder, recipe.llm, **fields)
    if recipe.encoder_lora is not None:
        model.add_adapter("encoder", recipe.encoder_lora.fields())
    tokenizer = load_tokenizer("encoder", recipe.encoder, revision=recipe.encoder_revision)
    llm_tokenizer = load_tokenizer("llm", recipe.llm, revision=recipe.llm_revision)
    wrapped = to_sentence_transformer(model, tokenizer)
    wrapped.prompts.update(recipe.prompts)
    return wrapped, llm_tokenizer


def run_warm_start(recipe: Recipe, model: SentenceTransformer, llm_tokenizer: Any, progress: bool) -> dict[str, Any]:
    """Stage 0; returns what it found."""
    source = recipe.warm_start_data()
    assert source is not None
    inner = lusifer_model(model)
    start = warmstart.fit(
        inner,
        model.tokenizer,
        llm_tokenizer,
        read_texts(source, recipe.warm_start.texts),
        ridge=recipe.warm_start.ridge,
        spectrum=recipe.warm_start.spectrum,
        progress=progress,
    )
    warmstart.apply(inner, start, scale=recipe.warm_start.scale)
    logger.info("stage 0: %.1f%% of held-out variance explained, %d words", 100 * start.explained, start.words)
    return {"explained": start.explained, "words": start.words, "held_out_words": start.held_out_words}


def prepare(recipe: Recipe, name: str, model: LusiferModel) -> None:
    """Gives a model the adapters and the depth of a stage, and chooses what learns in it."""
    lora = recipe.model.llm_lora
    if name == "contrast":
        depth = recipe.contrast.llm_layers
        if depth is not None and depth != model.config.llm_config.num_hidden_layers:
            truncate_llm(model.llm, depth)
            if model.llm.config is not model.config.llm_config:
                keep_layers(model.config.llm_config, depth)
        if lora is not None and not model.config.llm_adapter:
            model.add_adapter("llm", lora.fields())
    stage = recipe.align if name == "align" else recipe.contrast
    model.set_trainable(encoder=stage.encoder, connector=stage.connector, llm=name == "contrast" and lora is not None)


def stage_mixture(recipe: Recipe, name: str) -> Mixture:
    """The examples of a gradient stage, with some rows kept out of training."""
    stage: Optimisation = getattr(recipe, name)
    seed = recipe.seed + STAGES.index(name)
    return Mixture(stage.data, steps=stage.steps, batch_size=stage.batch_size, seed=seed, held_out=_HELD_OUT)


def run_align(
    recipe: Recipe, model: SentenceTransformer, llm_tokenizer: Any, folder: Path, progress: bool
) -> dict[str, Any]:
    """Stage 1; returns losses, and what held-out texts show before and after."""
    stage: AlignRecipe = recipe.align
    inner = lusifer_model(model)
    prepare(recipe, "align", inner)
    seed = recipe.seed + STAGES.index("align")
    loss = AlignmentLoss(
        load_lm_head(recipe.model.llm, inner.llm, revision=recipe.model.llm_revision),
        inner.llm_embeddings().float().mean(dim=0),
        mask_probability=stage.mask_probability,
        max_tokens=stage.max_tokens,
        seed=seed,
    )
    collator = AlignCollator(
        model.tokenizer,
        stage.max_seq_length or recipe.model.max_seq_length,
        llm_preprocess(llm_tokenizer, stage.target_max_seq_length),
    )
    mixture = stage_mixture(recipe, "align")
    examples = [example for several in mixture.held_out_examples() for example in several]
    batch = collator(examples) if len(examples) > 1 else None

    def metrics(wrapped: Any) -> dict[str, float]:
        assert batch is not None
        device = loss.lm_head.weight.device
        moved = {key: _to(value, device) for key, value in batch.items()}
        return held_out_metrics(loss, wrapped, moved)

    before = metrics(inner) if batch else {}
    result = optimise(
        inner, loss, mixture, collator, stage, folder, seed=seed, scale=recipe.scale,
        evaluator=metrics if batch else None, progress=progress,
    )  # fmt: skip
    return {**result, "held_out_before": before, "metrics": metrics if batch else None}


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return {key: _to(part, device) for key, part in value.items()} if isinstance(value, dict) else value


def run_contrast(
    recipe: Recipe, model: SentenceTransformer, llm_tokenizer: Any, folder: Path, progress: bool
) -> dict[str, Any]:
    """Stage 2; returns losses."""
    inner = lusifer_model(model)
    prepare(recipe, "contrast", inner)
    limit = recipe.contrast.max_seq_length or recipe.model.max_seq_length
    return contrast(recipe, inner, model.tokenizer, limit, folder, progress)


def _guide(recipe: Recipe) -> EncoderAlone | SentenceTransformer | None:
    name, chosen = recipe.contrast.guide, recipe.model
    if name == "encoder":
        limit = recipe.contrast.max_seq_length or chosen.max_seq_length
        return EncoderAlone.from_name(chosen.encoder, revision=chosen.encoder_revision, max_seq_length=limit)
    return load_checkpoint(name) if name else None


def contrast(
    recipe: Recipe,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    folder: Path,
    progress: bool,
) -> dict[str, Any]:
    """Contrastive training of a model whose forward gives ``pooler_output``, also of a baseline.

    Args:
        recipe: Its stage 2 says data, steps and loss.
        model: The model; what learns has been chosen already.
        tokenizer: Its tokenizer.
        max_seq_length: Tokens of a text.
        folder: Where checkpoints go.
        progress: Whether to show a progress bar.
    """
    stage: ContrastRecipe = recipe.contrast
    seed = recipe.seed + STAGES.index("contrast")
    guide = _guide(recipe)
    loss = ContrastiveLoss(
        temperature=stage.temperature,
        symmetric=stage.symmetric,
        matryoshka_dims=stage.matryoshka_dims,
        guide=guide,
        guide_margin=stage.guide_margin,
        distill=stage.distill,
        distill_temperature=stage.distill_temperature,
        max_tokens=stage.max_tokens,
        graph_tokens=stage.graph_tokens,
    )
    collator = ContrastCollator(tokenizer, max_seq_length, guide.preprocess if guide else None)
    mixture = stage_mixture(recipe, "contrast")
    batches = [collator(examples) for examples in mixture.held_out_examples()]

    def metrics(wrapped: Any) -> dict[str, float]:
        device = next(model.parameters()).device
        mode = wrapped.training
        wrapped.eval()
        with torch.no_grad():
            losses = [float(loss(wrapped, {k: _to(v, device) for k, v in batch.items()})) for batch in batches]
        wrapped.train(mode)
        return {"loss": sum(losses) / len(losses)}

    result = optimise(
        model, loss, mixture, collator, stage, folder, seed=seed, scale=recipe.scale,
        evaluator=metrics if batches else None, progress=progress,
    )  # fmt: skip
    return {**result, "metrics": metrics if batches else None}


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


def fingerprint(recipe: Recipe, stage: str) -> str:
    """Hash of everything that decides a stage's result: the model and every stage up to it."""
    upto = STAGES[: STAGES.index(stage) + 1]
    volatile = {
        "save_steps",
        "logging_steps",
        "eval_steps",
        "save_total_limit",
        "report_to",
        "max_tokens",
        "graph_tokens",
    }
    tree = {name: getattr(recipe, name).model_dump(exclude=volatile) for name in ("model", *upto)}
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
        make = partial(_model_before, recipe, previous)
        model = make() if model is None else model
        if llm_tokenizer is None:
            llm_tokenizer = load_tokenizer("llm", recipe.model.llm, revision=recipe.model.llm_revision)
        # Again, because a resumed run has drawn other numbers on its way here.
        set_seed(recipe.seed + number)
        model = _run_stage(recipe, name, model, llm_tokenizer, folder, progress, make)
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


def told(recipe: Recipe) -> dict[str, Any]:
    """A recipe's settings for the checkpoint: what differs from the defaults, without paths of this machine."""
    return without_paths(recipe.model_dump(mode="json", exclude_defaults=True, exclude={"output"}))


def _model_before(recipe: Recipe, previous: Path | None) -> SentenceTransformer:
    if previous is None:
        set_seed(recipe.seed)
        return build_model(recipe.model)[0]
    chosen = {name: getattr(recipe.model, name) for name in ("attn_implementation", "quantization")}
    return load_checkpoint(str(previous), model_kwargs=chosen)


def _finished(folder: Path, expected: str) -> bool:
    try:
        found = json.loads((folder / "stage.json").read_text(encoding="utf-8"))["fingerprint"]
    except FileNotFoundError:
        try:
            found = (folder / "fingerprint").read_text(encoding="utf-8")
        except FileNotFoundError:
            return False
        if found != expected:
            raise _other_recipe(folder) from None
        return False
    if found != expected:
        raise _other_recipe(folder)
    return True


def _other_recipe(folder: Path) -> LusiferError:
    return LusiferError(
        f"{str(folder)!r} holds a run of another recipe; choose another output, or remove that folder to start again"
    )


def _run_stage(
    recipe: Recipe,
    name: str,
    model: SentenceTransformer,
    llm_tokenizer: Any,
    folder: Path,
    progress: bool,
    again: Callable[[], SentenceTransformer],
) -> SentenceTransformer:
    """Runs one stage and writes its model; returns it.

    ``again`` makes the model as it was before the stage: a sharded one cannot be put together in place.
    """
    started = time.monotonic()
    state = processes()
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "fingerprint").write_text(fingerprint(recipe, name), encoding="utf-8")
    state.wait_for_everyone()
    if name == "warm_start":
        result = run_warm_start(recipe, model, llm_tokenizer, progress)
    else:
        run = run_align if name == "align" else run_contrast
        result = run(recipe, model, llm_tokenizer, folder / "checkpoints", progress)
        learned, metrics = result.pop("learned"), result.pop("metrics")
        if metrics is not None:
            result["held_out"] = metrics(lusifer_model(model))
        if recipe.scale.strategy == "fsdp2" and state.num_processes > 1:
            model = again()
            prepare(recipe, name, lusifer_model(model))
            load_learning(lusifer_model(model), learned)
    seconds = time.monotonic() - started
    inner = lusifer_model(model)
    facts = {key: value for key, value in result.items() if key != "history"}
    done = {**inner.config.provenance.get("stages", {}), name: {**facts, "seconds": round(seconds, 1)}}
    inner.config.provenance = {**inner.config.provenance, "seed": recipe.seed, "stages": done, "recipe": told(recipe)}
    model.eval()
    if state.is_main_process:
        save_atomically(model, folder / "model")
        report = {"stage": name, "fingerprint": fingerprint(recipe, name), "seconds": seconds, **result}
        staging = folder / ".stage.json"
        staging.write_text(json.dumps(report, indent=1), encoding="utf-8")
        os.replace(staging, folder / "stage.json")
    state.wait_for_everyone()
    return model
