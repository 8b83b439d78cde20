"""What a GPU has to show, in one command without network: ``python tools/gpu_proof.py [--tiny] [--out FOLDER]``.

Models are random, built from configurations: small ones for whether the results are right, XLM-R-large in front of
Mistral-7B for memory and speed (``--tiny`` leaves these sizes out, for a CPU). Every row of the table passes, fails, or
says why it is not possible here. Writes gpu_proof.json and gpu_proof.md, and exits with 1 if a row fails.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpu_models import WORDS, Bench, NotHere, large_pair, padded, recipe_of, small_backbones, texts
from transformers import LlamaConfig

import lusifer
from lusifer.training import train
from lusifer.training.alignment import AlignmentLoss, LMHead, token_cross_entropy
from lusifer.training.contrastive import ContrastiveLoss
from lusifer.training.planning.cards import find_card
from lusifer.training.planning.costs import load_of, operations
from lusifer.training.planning.dry_run import needed_gb
from lusifer.training.stages import build_model


@dataclass
class Row:
    """One line of the table; ``outcome`` is ``pass``, ``fail`` or ``not possible here``."""

    name: str
    outcome: str
    figures: dict[str, Any] = field(default_factory=dict)
    why: str = ""
    seconds: float = 0.0


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Greatest difference, in units of the greatest value."""
    return float((one.float().cpu() - other.float().cpu()).abs().max() / other.float().abs().max().cpu())


def before_step_1(bench: Bench) -> dict[str, Any]:
    """The model is on the device before anything is computed with it."""
    built = build_model(recipe_of(bench, "unused").model, device=bench.device)[0].auto_model
    places = {str(tensor.device) for tensor in [*built.parameters(), *built.buffers()]}
    assert places == {str(bench.device)}, places
    return {"devices": sorted(places)}


def losses_as_on_the_cpu(bench: Bench) -> dict[str, Any]:
    """Both stages' losses and gradients in float32, against the same on the CPU."""
    bench.needs_gpu()
    figures = {}
    for stage in ("align", "contrast"):
        values = [_loss_and_gradient(bench, stage, device) for device in (torch.device("cpu"), bench.device)]
        figures[f"{stage} loss"] = apart(values[1][0], values[0][0])
        figures[f"{stage} gradient"] = apart(values[1][1], values[0][1])
    assert max(figures.values()) < 1e-3, figures
    return figures


def _loss_and_gradient(bench: Bench, stage: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    model = bench.model(device=device)
    model.set_trainable(encoder="frozen", connector=True, llm=False)
    rows = padded(texts(8, 24), device)
    if stage == "align":
        table: Any = model.llm.get_input_embeddings()
        loss_of: Any = AlignmentLoss(LMHead(table.weight.detach(), None, model.llm.config), table.weight.mean(0))
        batch: dict[str, Any] = {"source": rows, "target": padded(texts(8, 12, seed=1), device)}
        batch["positions"] = torch.arange(8)
    else:
        loss_of = ContrastiveLoss()
        keys = torch.arange(8, device=device)
        batch = {**rows, "keys": keys, "columns": 2, "in_batch_negatives": True}
    loss = loss_of.to(device).eval()(model.eval(), batch)
    loss.backward()
    return loss.detach(), model.connector.up.weight.grad


def attention_kinds(bench: Bench) -> dict[str, Any]:
    """SDPA and FlashAttention against eager attention, in bfloat16 on a GPU."""
    kinds = ["sdpa"] + ["flash_attention_2"] * (importlib.util.find_spec("flash_attn") is not None)
    dtype = "bfloat16" if bench.device.type == "cuda" else "float32"
    batch, vectors = padded(texts(8, 40), bench.device), {}
    for kind in ("eager", *kinds):
        model = bench.model(encoder_dtype=dtype, llm_dtype=dtype, attn_implementation=kind)
        with torch.no_grad():
            vectors[kind] = model(**batch).pooler_output
    figures = {kind: apart(vectors[kind], vectors["eager"]) for kind in kinds}
    assert max(figures.values()) < (0.05 if dtype == "bfloat16" else 1e-4), figures
    return figures


def alone_and_in_a_batch(bench: Bench) -> dict[str, Any]:
    """No embedding depends on the texts beside it, padded or packed."""
    rows, figures = texts(8, 40), {}
    kinds = ["sdpa"] + ["flash_attention_2"] * (importlib.util.find_spec("flash_attn") is not None)
    for kind in kinds:
        flash = kind != "sdpa"
        dtype = "bfloat16" if flash else "float32"
        model = bench.model(encoder_dtype=dtype, llm_dtype=dtype, attn_implementation=kind)
        with torch.no_grad():
            together = model(**padded(rows, bench.device)).pooler_output
            alone = torch.cat([model(**padded([row], bench.device)).pooler_output for row in rows])
        figures[kind] = apart(together, alone)
        assert figures[kind] < (0.05 if flash else 1e-3), figures
    return figures


def no_leak(bench: Bench) -> dict[str, Any]:
    """In stage 1 no state sees a token that comes later."""
    model, source = bench.model(), padded(texts(2, 10), bench.device)
    target = padded([row[:8] for row in texts(2, 16, seed=2)], bench.device)
    changed = {**target, "input_ids": target["input_ids"].clone()}
    changed["input_ids"][:, 5] = 7
    with torch.no_grad():
        states = [
            model(**source, target_ids=one["input_ids"], target_mask=one["attention_mask"]).last_hidden_state
            for one in (target, changed)
        ]
    first, second = (one.unflatten(0, (2, -1)) for one in states)
    before, behind = apart(second[:, :6], first[:, :6]), apart(second[:, 6:], first[:, 6:])
    assert before < 1e-5 < behind, (before, behind)
    return {"states before": before, "states behind": behind}


def quantised(bench: Bench) -> dict[str, Any]:
    """An LLM in 8 and 4 bits: built, trained, interrupted, resumed; every adapter moves."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise NotHere("needs bitsandbytes")
    bench.needs_gpu()
    figures = {}
    for kind in ("8bit", "4bit"):
        recipe = recipe_of(bench, kind, quantization=kind, llm_dtype="bfloat16")
        half = recipe.model_copy(update={"contrast": recipe.contrast.model_copy(update={"max_loss": 1e-9})})
        with contextlib.suppress(lusifer.LusiferError):  # Stops in the first step of stage 2.
            train(half, progress=False)
        model = lusifer.load(str(train(recipe, progress=False)))[0].auto_model
        moved = {n: bool(p.abs().max() > 0) for n, p in model.named_parameters() if "lora_B" in n}
        assert moved and all(moved.values()), [name for name, value in moved.items() if not value]
        figures[kind] = f"{len(moved)} adapters"
    return figures


def both_stages(bench: Bench) -> dict[str, Any]:
    """Stages 0 to 2 as `lusifer train` runs them, and the model encodes."""
    model = lusifer.load(str(train(recipe_of(bench, "run"), progress=False)))
    vectors = model.encode(["w5 w6 w7", "w8"])
    assert vectors.shape[0] == 2 and bool(torch.isfinite(torch.as_tensor(vectors)).all())
    return {"embedding": vectors.shape[1]}


def cross_entropies(bench: Bench) -> dict[str, Any]:
    """liger-kernel's fused cross-entropy against ours in slices."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise NotHere("needs liger-kernel")
    bench.needs_gpu()
    torch.manual_seed(0)
    head = LMHead(torch.randn(WORDS, 256, device=bench.device), None, LlamaConfig())
    wanted, results = torch.randint(0, WORDS, (600,), device=bench.device), []
    for scale in (1.0, 1.0 + 1e-12):  # Another scale than 1 takes ours.
        head.scale = scale
        states = torch.randn(600, 256, device=bench.device, generator=torch.Generator(bench.device).manual_seed(1))
        loss = token_cross_entropy(states.requires_grad_(), wanted, head)
        loss.backward()
        results.append((loss.detach(), states.grad))
    figures = {"loss": apart(results[0][0], results[1][0]), "gradient": apart(results[0][1], results[1][1])}
    assert max(figures.values()) < 1e-3, figures
    return figures


def _clock(bench: Bench, work: Callable[[], object], times: int = 3) -> float:
    def wait() -> None:
        if bench.device.type == "cuda":
            torch.cuda.synchronize()

    work()
    seconds = []
    for _ in range(times):
        wait()
        begun = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - begun)
    return sorted(seconds)[len(seconds) // 2]


def memory_and_speed(bench: Bench) -> dict[str, Any]:
    """A step of stage 2 at 512 tokens a text: memory against the dry run's, share of peak; then encoding."""
    recipe, model = large_pair(bench)
    length, rows = (512, 16) if bench.full else (32, 4)
    recipe.contrast.batch_size, recipe.model.max_seq_length = rows, length
    model.gradient_checkpointing_enable()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    ids = torch.randint(4, WORDS, (3 * rows, length), device=bench.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "columns": 3, "in_batch_negatives": True}
    batch["keys"] = torch.arange(len(ids), device=bench.device)
    loss = ContrastiveLoss(max_tokens=recipe.contrast.max_tokens, graph_tokens=recipe.contrast.graph_tokens)

    def step() -> None:
        with torch.autocast(bench.device.type, torch.bfloat16):
            loss.step(model, batch, backward=torch.Tensor.backward, no_sync=contextlib.nullcontext)
        optimizer.step()
        optimizer.zero_grad()

    model.train()
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = _clock(bench, step)
    figures: dict[str, Any] = {"tokens/s, training": round(ids.numel() / seconds)}
    load = load_of(recipe, "contrast", model, 1)
    if (card := find_card(None)) is not None:
        used = torch.cuda.max_memory_allocated() / 1e9
        planned, parts = needed_gb(recipe, "contrast", model, 1, gpu=False)
        figures |= {
            "GB used": round(used, 2),
            "GB planned": round(planned, 2),
            "parts": {k: round(v, 2) for k, v in parts.items()},
        }
        if card.peak:
            figures["share of peak, training"] = round(
                operations(recipe, "contrast", model, load) / seconds / card.peak, 3
            )
    optimizer.zero_grad()
    model.eval()
    with torch.inference_mode(), torch.autocast(bench.device.type, torch.bfloat16):
        mask = torch.ones_like(ids)
        ours = _clock(bench, lambda: model(ids[: 2 * rows], mask[: 2 * rows]))
        alone = _clock(
            bench, lambda: model.llm(input_ids=ids[: 2 * rows], attention_mask=mask[: 2 * rows], use_cache=False)
        )
    figures |= {"tokens/s, encoding": round(2 * rows * length / ours), "of the LLM alone": round(alone / ours, 3)}
    if "GB used" in figures and bench.full:
        assert abs(figures["GB used"] / figures["GB planned"] - 1) < 0.2, figures
    return figures


def two_cards(bench: Bench) -> dict[str, Any]:
    """FSDP2 and DDP on two cards end where one card does."""
    if torch.cuda.device_count() < 2:
        raise NotHere("needs two GPUs")
    recipe = recipe_of(bench, "one")
    recipe.warm_start.enabled = False
    path = bench.folder / "two.yaml"
    path.write_text(recipe.model_dump_json(exclude_none=True))
    losses = {}
    for name, ranks, strategy in (("one", 1, "ddp"), ("ddp", 2, "ddp"), ("fsdp2", 2, "fsdp2")):
        output = bench.folder / f"cards-{name}"
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "-m", "lusifer", "train", str(path)]
        options = ["-q", "--output", str(output), "--scale.strategy", strategy]
        subprocess.run([sys.executable, *launch, *options], check=True, env={**os.environ}, timeout=120)
        losses[name] = json.loads((output / "contrast" / "stage.json").read_text())["loss"]
    assert max(abs(value - losses["one"]) for value in losses.values()) < 1e-2, losses
    return losses


ROWS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "model on the device before step 1": before_step_1,
    "losses and gradients as on a CPU, float32": losses_as_on_the_cpu,
    "SDPA and FlashAttention as eager": attention_kinds,
    "a text alone as in a batch": alone_and_in_a_batch,
    "no causal leak in stage 1": no_leak,
    "stages 0 to 2": both_stages,
    "8 and 4 bits: step, stop, resume": quantised,
    "fused cross-entropy as in slices": cross_entropies,
    "memory and speed of a step": memory_and_speed,
    "two cards as one": two_cards,
}


def prove(bench: Bench) -> list[Row]:
    """Runs every row."""
    rows = []
    for name, attempt in ROWS.items():
        begun, row = time.monotonic(), Row(name, "pass")
        try:
            row.figures = attempt(bench)
        except NotHere as reason:
            row.outcome, row.why = "not possible here", str(reason)
        except Exception as error:  # A row must not take the others with it.
            row.outcome, row.why = "fail", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        row.seconds = round(time.monotonic() - begun, 1)
        print(f"{row.outcome:18} {name} {row.figures or row.why}", file=sys.stderr, flush=True)
        rows.append(row)
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def table(rows: list[Row], machine: str) -> str:
    """The rows as Markdown."""
    lines = [f"{machine}, torch {torch.__version__}", "", "| what | outcome | figures |", "|---|---|---|"]
    for row in rows:
        shown = "; ".join(
            f"{key} {value:.2g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.figures.items()
        )
        lines.append(f"| {row.name} | {row.outcome} | {shown or row.why} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Reads the command line, runs the rows and writes both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="tiny models in place of XLM-R-large and Mistral-7B")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of gpu_proof.json and gpu_proof.md")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LUSIFER_CACHE"] = str(Path(folder) / "cache")
        bench = Bench(device, cuda and not arguments.tiny, Path(folder))
        small_backbones(bench)
        rows = prove(bench)
    machine = torch.cuda.get_device_name(0) if cuda else "CPU"
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "gpu_proof.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    (arguments.out / "gpu_proof.md").write_text(table(rows, machine))
    return 1 if any(row.outcome == "fail" for row in rows) else 0


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    sys.exit(main())
