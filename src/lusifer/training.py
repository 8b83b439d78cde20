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
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from transformers import PreTrainedTokenizerBase, set_seed

from lusifer import warmstart
from lusifer.backbones import load_config, load_lm_head, load_tokenizer
from lusifer.data import (
    AlignmentCollator,
    alignment_dataset,
    contrastive_dataset,
    llm_preprocess,
    read_records,
    read_texts,
)
from lusifer.encoding import load_checkpoint, lusifer_model, save_atomically, to_sentence_transformer
from lusifer.errors import LusiferError
from lusifer.losses import AlignmentLoss, ContrastiveLoss
from lusifer.modeling import LusiferModel
from lusifer.recipes import AlignRecipe, ContrastRecipe, ModelRecipe, Recipe
from lusifer.trainer import optimise

logger = logging.getLogger(__name__)

STAGES = ("warm_start", "align", "contrast")
_HELD_OUT = 64


def build_model(recipe: ModelRecipe) -> tuple[SentenceTransformer, PreTrainedTokenizerBase]:
    """The untrained model of a recipe, and its LLM's tokenizer.

    Raises:
        LusiferError: If a backbone cannot be loaded.
    """
    fields = recipe.model_dump(exclude={"encoder", "llm", "encoder_lora", "llm_lora"})
    model = LusiferModel.from_backbones(recipe.encoder, recipe.llm, **fields)
    if recipe.encoder_lora is not None:
        model.add_adapter("encoder", recipe.encoder_lora.fields())
    tokenizer = load_tokenizer("encoder", recipe.encoder, revision=recipe.encoder_revision)
    llm_tokenizer = load_tokenizer("llm", recipe.llm, revision=recipe.llm_revision)
    return to_sentence_transformer(model, tokenizer), llm_tokenizer


def run_warm_start(recipe: Recipe, model: SentenceTransformer, llm_tokenizer: Any, progress: bool) -> dict[str, Any]:
    """Stage 0; returns what it found."""
    source = recipe.warm_start.data or recipe.align.reconstruct
    assert source is not None
    texts = read_texts(source)[: recipe.warm_start.texts]
    inner = lusifer_model(model)
    start = warmstart.fit(
        inner,
        model.tokenizer,
        llm_tokenizer,
        texts,
        ridge=recipe.warm_start.ridge,
        spectrum=recipe.warm_start.spectrum,
        progress=progress,
    )
    warmstart.apply(inner, start, scale=recipe.warm_start.scale)
    logger.info("stage 0: %.1f%% of held-out variance explained, %d words", 100 * start.explained, start.words)
    return {"explained": start.explained, "words": start.words, "held_out_words": start.held_out_words}


def run_align(
    recipe: Recipe,
    stage: AlignRecipe,
    model: SentenceTransformer,
    llm_tokenizer: Any,
    folder: Path,
    progress: bool,
) -> dict[str, Any]:
    """Stage 1; returns losses, also those of held-out records with the right and with shuffled sources."""
    inner = lusifer_model(model)
    inner.set_trainable(encoder=stage.encoder, connector=stage.connector, llm=False)
    head = load_lm_head(recipe.model.llm, inner.llm, revision=recipe.model.llm_revision)
    loss = AlignmentLoss(model, head, mask_probability=stage.mask_probability, max_tokens=stage.max_tokens)
    rows = stage.steps * stage.batch_size + _HELD_OUT
    dataset = alignment_dataset(
        stage.reconstruct,
        stage.complete,
        completion_ratio=stage.completion_ratio,
        rows=rows,
        seed=recipe.seed,
    )
    held_out, dataset = dataset.select(range(_HELD_OUT)), dataset.select(range(_HELD_OUT, rows))
    collator = AlignmentCollator(
        preprocess_fn=model.preprocess,
        target_preprocess=llm_preprocess(llm_tokenizer, stage.target_max_seq_length),
    )
    before = held_out_losses(loss, collator, held_out)
    result = optimise(model, loss, dataset, stage, folder, seed=recipe.seed + 1, collator=collator, progress=progress)
    return {**result, "held_out_before": before, "held_out": held_out_losses(loss, collator, held_out)}


@torch.no_grad()
def held_out_losses(loss: AlignmentLoss, collator: AlignmentCollator, records: Dataset) -> dict[str, float]:
    """Cross-entropy per target token with the right sources, and with each row reading its neighbour's.

    The target's inputs are all masked, so only the soft tokens can help: the gap between the two
    figures is what they carry.
    """
    batch = collator(list(records))
    source = {"input_ids": batch["source_input_ids"], "attention_mask": batch["source_attention_mask"]}
    target = {"input_ids": batch["target_input_ids"], "attention_mask": batch["target_attention_mask"]}
    other = {name: tensor.roll(1, dims=0) for name, tensor in source.items()}
    device = loss.lm_head.weight.device
    mode, probability = loss.training, loss.mask_probability
    loss.eval()
    # The flag of the loss alone masks targets; the model below it stays in evaluation mode.
    loss.training, loss.mask_probability = True, 1.0
    losses = {}
    for name, columns in (("right", source), ("shuffled", other)):
        moved = [{k: v.to(device) for k, v in part.items()} for part in (columns, target)]
        losses[name] = float(loss(moved))
    loss.mask_probability = probability
    loss.train(mode)
    return losses


def run_contrast(
    recipe: Recipe, stage: ContrastRecipe, model: SentenceTransformer, folder: Path, progress: bool
) -> dict[str, Any]:
    """Stage 2; returns losses."""
    inner = lusifer_model(model)
    if recipe.model.llm_lora is not None and not inner.config.llm_adapter:
        inner.add_adapter("llm", recipe.model.llm_lora.fields())
    inner.set_trainable(encoder=stage.encoder, connector=stage.connector, llm=recipe.model.llm_lora is not None)
    loss = ContrastiveLoss(
        model,
        temperature=stage.temperature,
        in_batch_negatives=stage.in_batch_negatives,
        symmetric=stage.symmetric,
        max_tokens=stage.max_tokens,
    )
    assert stage.data is not None
    dataset = contrastive_dataset(
        stage.data, instruction=stage.instruction, hard_negatives=stage.hard_negatives, seed=recipe.seed
    )
    return optimise(model, loss, dataset, stage, folder, seed=recipe.seed + 2, progress=progress)


def check_inputs(recipe: Recipe) -> None:
    """Opens every backbone's configuration and every data set of a recipe, before any work starts.

    Raises:
        LusiferError: If one is missing, empty or of the wrong kind.
    """
    load_config("encoder", recipe.model.encoder, revision=recipe.model.encoder_revision)
    load_config("llm", recipe.model.llm, revision=recipe.model.llm_revision)
    sources = [recipe.warm_start.data if recipe.warm_start.enabled else None]
    sources += [recipe.align.reconstruct, recipe.align.complete] if recipe.align.enabled else []
    sources += [recipe.contrast.data] if recipe.contrast.enabled else []
    for source in {source for source in sources if source}:
        read_records(source)


def fingerprint(recipe: Recipe, stage: str) -> str:
    """Hash of everything that decides a stage's result: the model and every stage up to it."""
    upto = STAGES[: STAGES.index(stage) + 1]
    volatile = {"save_steps", "logging_steps"}
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
        if previous is None:
            set_seed(recipe.seed)
            model, llm_tokenizer = build_model(recipe.model)
        elif model is None:
            model = load_checkpoint(
                str(previous), model_kwargs={"attn_implementation": recipe.model.attn_implementation}
            )
        if llm_tokenizer is None:
            llm_tokenizer = load_tokenizer("llm", recipe.model.llm, revision=recipe.model.llm_revision)
        # Again, because a resumed run has drawn other numbers on its way here.
        set_seed(recipe.seed + number)
        _run_stage(recipe, name, model, llm_tokenizer, folder, progress)
        previous = folder / "model"
    assert previous is not None
    if model is None:
        model = load_checkpoint(str(previous))
    final = output / "model"
    save_atomically(
        model,
        final,
        llm_tokenizer=load_tokenizer("llm", recipe.model.llm, revision=recipe.model.llm_revision),
    )
    return final


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
    recipe: Recipe, name: str, model: SentenceTransformer, llm_tokenizer: Any, folder: Path, progress: bool
) -> None:
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "fingerprint").write_text(fingerprint(recipe, name), encoding="utf-8")
    checkpoints = folder / "checkpoints"
    runs: dict[str, Callable[[], dict[str, Any]]] = {
        "warm_start": lambda: run_warm_start(recipe, model, llm_tokenizer, progress),
        "align": lambda: run_align(recipe, recipe.align, model, llm_tokenizer, checkpoints, progress),
        "contrast": lambda: run_contrast(recipe, recipe.contrast, model, checkpoints, progress),
    }
    result = runs[name]()
    seconds = time.monotonic() - started
    inner = lusifer_model(model)
    facts = {key: value for key, value in result.items() if key != "history"}
    done = {**inner.config.provenance.get("stages", {}), name: {**facts, "seconds": round(seconds, 1)}}
    inner.config.provenance = {**inner.config.provenance, "seed": recipe.seed, "stages": done}
    save_atomically(model.eval(), folder / "model")
    report = {"stage": name, "fingerprint": fingerprint(recipe, name), "seconds": seconds, **result}
    staging = folder / ".stage.json"
    staging.write_text(json.dumps(report, indent=1), encoding="utf-8")
    os.replace(staging, folder / "stage.json")
