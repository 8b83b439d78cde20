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
from torch import Tensor
from transformers import PreTrainedTokenizerBase, set_seed

from lusifer.data.collate import AlignCollator, ContrastCollator, llm_preprocess
from lusifer.data.mixture import Mixture
from lusifer.data.records import read_texts
from lusifer.errors import LusiferError
from lusifer.loading import load_checkpoint
from lusifer.model.backbone_alone import EncoderGuide
from lusifer.model.backbones import keep_layers, load_config, load_tokenizer, truncate_llm
from lusifer.model.lm_head import load_lm_head
from lusifer.model.modeling import LusiferModel
from lusifer.model.published_adapters import read_base_adapter
from lusifer.model.sentence_transformer import lusifer_model, save_atomically, to_sentence_transformer
from lusifer.publishing import publish_file, write_json
from lusifer.recipes.schema import AlignRecipe, ContrastRecipe, GradientStage, ModelRecipe, Recipe
from lusifer.storage import without_paths
from lusifer.training.alignment import AlignmentLoss, held_out_metrics
from lusifer.training.contrastive import ContrastiveLoss
from lusifer.training.gradient_stage import run_gradient_stage
from lusifer.training.trainer import load_trained
from lusifer.training.warm_start import fit_connector, start_connector

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
    model = LusiferModel.from_backbones(**recipe.architecture())
    if recipe.encoder_lora is not None:
        model.add_adapter("encoder", recipe.encoder_lora.fields())
    tokenizer = load_tokenizer("encoder", recipe.encoder, revision=recipe.encoder_revision)
    llm_tokenizer = load_tokenizer("llm", recipe.llm, revision=recipe.llm_revision)
    wrapped = to_sentence_transformer(model, tokenizer)
    wrapped.prompts.update(recipe.prompts)
    return wrapped, llm_tokenizer


def run_warm_start(recipe: Recipe, model: SentenceTransformer, llm_tokenizer: Any, progress: bool) -> dict[str, Any]:
    """Stage 0.

    Args:
        recipe: The recipe.
        model: The untrained model; its connector is changed in place.
        llm_tokenizer: The LLM's tokenizer.
        progress: Whether to show a progress bar.

    Returns:
        ``explained``, the share of held-out variance that the map explains, and the numbers of ``words``.
    """
    settings, source = recipe.warm_start, recipe.warm_start_data()
    assert source is not None
    inner = lusifer_model(model)
    texts = read_texts(source, settings.texts)
    options: dict[str, Any] = {"ridge": settings.ridge, "spectrum": settings.spectrum, "progress": progress}
    start = fit_connector(inner, model.tokenizer, llm_tokenizer, texts, **options)
    start_connector(inner, start, scale=settings.scale)
    logger.info("stage 0: %.1f%% of held-out variance explained, %d words", 100 * start.explained, start.words)
    return {"explained": start.explained, "words": start.words, "held_out_words": start.held_out_words}


def prepare_stage(recipe: Recipe, name: str, model: LusiferModel) -> None:
    """Gives a model the adapters and the depth of a stage, and chooses its trainable parameters.

    Args:
        recipe: The recipe.
        name: ``align`` or ``contrast``.
        model: The model as the stage before left it; changed in place.
    """
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
    train_llm = name == "contrast" and lora is not None
    model.set_trainable(encoder=stage.train_encoder, connector=stage.train_connector, llm=train_llm)


def stage_mixture(recipe: Recipe, name: str) -> Mixture:
    """The examples of the stage ``align`` or ``contrast``, with some rows held out of training."""
    stage: GradientStage = getattr(recipe, name)
    seed = recipe.seed + STAGES.index(name)
    return Mixture(stage.data, steps=stage.steps, batch_size=stage.batch_size, seed=seed, held_out=_HELD_OUT)


def run_align(
    recipe: Recipe, model: SentenceTransformer, llm_tokenizer: Any, folder: Path, progress: bool
) -> dict[str, Any]:
    """Stage 1; returns losses, and metrics of held-out texts before and after."""
    stage: AlignRecipe = recipe.align
    inner = lusifer_model(model)
    prepare_stage(recipe, "align", inner)
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
        return held_out_metrics(loss, wrapped, _to(batch, loss.lm_head.weight.device))

    before = metrics(inner) if batch else {}
    result = run_gradient_stage(
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
    prepare_stage(recipe, "contrast", inner)
    limit = recipe.contrast.max_seq_length or recipe.model.max_seq_length
    return contrast(recipe, inner, model.tokenizer, limit, folder, progress)


def _guide(recipe: Recipe) -> EncoderGuide | SentenceTransformer | None:
    name, chosen = recipe.contrast.guide, recipe.model
    if name == "encoder":
        limit = recipe.contrast.max_seq_length or chosen.max_seq_length
        return EncoderGuide.from_name(chosen.encoder, revision=chosen.encoder_revision, max_seq_length=limit)
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
        model: The model; its trainable parameters have been chosen.
        tokenizer: Its tokenizer.
        max_seq_length: Tokens of a text.
        folder: Where checkpoints go.
        progress: Whether to show a progress bar.

    Returns:
        What `run_gradient_stage` does, and ``metrics``, a function of a model, or None without held-out rows.
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
            losses = [float(loss(wrapped, _to(batch, device))) for batch in batches]
        wrapped.train(mode)
        return {"loss": sum(losses) / len(losses)}

    result = run_gradient_stage(
        model, loss, mixture, collator, stage, folder, seed=seed, scale=recipe.scale,
        evaluator=metrics if batches else None, progress=progress,
    )  # fmt: skip
    return {**result, "metrics": metrics if batches else None}


def check_inputs(recipe: Recipe) -> None:
    """Opens every backbone's configuration and checks every data set of a recipe, before any work starts.

    Raises:
        LusiferError: If one is missing, broken or of the wrong kind; see `lusifer.data.records`.
    """
    load_config("encoder", recipe.model.encoder, revision=recipe.model.encoder_revision)
    llm = load_config("llm", recipe.model.llm, revision=recipe.model.llm_revision)
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
        return build_model(recipe.model)[0]
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
