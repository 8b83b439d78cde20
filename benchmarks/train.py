"""What a training step costs: both stages against the naive form, with equal losses and gradients.

Random XLM-R (6 x 384) and Llama (12 x 576, vocabulary 32,000), LoRA r 16 on both; random texts of 5 to
300 tokens (median 41). Stage 1: 8 texts to reconstruct. Stage 2: 16 queries, each with a positive and 7
hard negatives. The naive form pads all texts to the batch's longest, applies the LM head to every
position (in stage 2 too, where the result is dropped, as the published code does), keeps full logits
and, in stage 2, runs the gradient cache in chunks of 4 texts, all in float32.

Every variant runs in a process of its own, in turns: ``seconds`` is the median CPU time of a step (of
the naive contrastive one, which is 72 equal passes, a single measurement),
``memory_mb`` the peak above what the process held before its first step. ``ratio`` is the naive form's
time over ours, ``memory_ratio`` our memory over the naive form's, ``max_abs_diff`` the larger of two
differences from the naive form, without dropout, in float32: of the losses, and of any gradient entry
relative to the largest. Rows not named float32 compute in bfloat16 (autocast over frozen bfloat16
weights, eager attention; what learns stays in float32): ``bfloat16_diff`` is their own difference. ``loss at batch
1024 x 7`` is the loss alone, forward and backward down to the embeddings (dim 768). ``ratio_without_head``
compares with a naive form that spares itself the LM head, measured once.

Writes runs/bench/train.json and a Markdown table.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, XLMRobertaConfig

from lusifer import LusiferConfig, LusiferModel
from lusifer.data.collate import text_keys
from lusifer.training.alignment import AlignmentLoss, LMHead
from lusifer.training.contrastive import ContrastiveLoss

OUT = Path("runs/bench")
TURNS, STEPS = 3, 2
PASS_TOKENS = 512  # Small passes are the fastest on a CPU.
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
# Row of the report: its stage, and options of our loss.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "alignment": ("align", {}),
    "contrastive, batch fits": ("contrast", {"graph_tokens": 10**9}),
    "contrastive, gradient cache": ("contrast", {"graph_tokens": 0}),
}
LOSS_ROW = "loss at batch 1024 x 7"


def build() -> tuple[LusiferModel, LMHead]:
    """Model and LM head, float32, no dropout, adapters moved off their start so that all have gradients."""
    torch.manual_seed(0)
    encoder = XLMRobertaConfig(
        vocab_size=32000,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=6,
        intermediate_size=1536,
        max_position_embeddings=514,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    llm = LlamaConfig(
        vocab_size=32000,
        hidden_size=576,
        num_hidden_layers=12,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
    )
    model = LusiferModel(LusiferConfig(encoder_config=encoder, llm_config=llm))
    for part in ("encoder", "llm"):
        model.add_adapter(part, LORA)
    model.set_trainable(encoder="lora", connector=True, llm=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train(), LMHead(torch.randn(32000, 576) / 24, None, llm)


def tokens(lengths: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Right-padded token features of the given lengths."""
    mask = (torch.arange(int(lengths.max())) < lengths.unsqueeze(1)).long()
    ids = torch.randint(5, 32000, mask.shape, generator=generator)
    return {"input_ids": torch.where(mask.bool(), ids, 1), "attention_mask": mask}


def batch(stage: str) -> dict[str, Any]:
    """The batch of a stage, as a collator makes it."""
    generator = torch.Generator().manual_seed(0)
    rows = 8 if stage == "align" else 16
    count = 8 if stage == "align" else rows * 9
    # Stratified, so that a few texts still have the distribution's median and tail.
    normal = torch.special.ndtri((torch.arange(count) + 0.5) / count)[torch.randperm(count, generator=generator)]
    lengths = (normal * 0.8 + 3.71).exp().clamp(5, 300).long()
    shared = {"positions": torch.arange(rows), "dataset": "random"}
    if stage == "align":
        source, target = tokens(lengths, generator), tokens((lengths * 1.2).long(), generator)
        return {**shared, "source": source, "target": target, "task": "reconstruct"}
    features = tokens(lengths, generator)
    shared |= {"columns": 9, "in_batch_negatives": True, "task": "contrast", "keys": text_keys(**features)}
    return {**shared, **features}


def naive_states(
    model: LusiferModel, ids: Tensor, mask: Tensor, target: Tensor | None, target_mask: Tensor | None
) -> Any:
    """LLM states over ``[bos] soft [added] target`` as wide as the padding makes it, and the mask."""
    table: Any = model.llm.get_input_embeddings()
    soft = model.connector(model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state)
    bos = table(torch.ones(len(ids), 1, dtype=torch.long))
    added = model.connector.added_tokens.expand(len(ids), -1, -1)
    one = torch.ones(len(ids), 1, dtype=mask.dtype)
    parts, masks = [bos, soft, added], [one, mask, one]
    if target is not None and target_mask is not None:
        parts.append(target)
        masks.append(target_mask)
    real = torch.cat(masks, dim=1)
    states = model.llm(
        inputs_embeds=torch.cat(parts, dim=1),
        attention_mask=real,
        position_ids=(real.cumsum(dim=1) - 1).clamp(min=0),
        is_causal=target is not None,
        use_cache=False,
    ).last_hidden_state
    return states, real


def naive_align(model: LusiferModel, loss: AlignmentLoss, data: dict[str, Any]) -> float:
    """One pass over all rows, full logits of all positions."""
    source, target = data["source"], data["target"]
    hidden = loss.choose_masked(target["attention_mask"], data["positions"], 0.0)
    mask_embedding: Any = loss.mask_embedding
    inputs = torch.where(hidden.unsqueeze(-1), mask_embedding, model.llm.get_input_embeddings()(target["input_ids"]))
    states, _ = naive_states(model, source["input_ids"], source["attention_mask"], inputs, target["attention_mask"])
    labels = torch.where(target["attention_mask"].bool(), target["input_ids"], -100)
    labels = torch.nn.functional.pad(labels, (states.shape[1] - labels.shape[1], 0), value=-100)
    value = cross_entropy(
        loss.lm_head(states.flatten(0, 1)).unflatten(0, labels.shape)[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    value.backward()
    return float(value.detach())


def naive_contrast(model: LusiferModel, head: LMHead | None, data: dict[str, Any]) -> float:
    """Gradient cache in chunks of 4 texts, each as wide as the longest of the batch."""
    chunks = list(zip(data["input_ids"].split(4), data["attention_mask"].split(4), strict=True))

    def embed(ids: Tensor, mask: Tensor) -> Tensor:
        states, real = naive_states(model, ids, mask, None, None)
        if head is not None:
            head(states)
        real = real[:, 1:].unsqueeze(-1)
        return (states[:, 1:] * real).sum(dim=1) / real.sum(dim=1)

    with torch.no_grad():
        vectors = torch.cat([embed(*chunk) for chunk in chunks])
    vectors.requires_grad_()
    columns = torch.nn.functional.normalize(vectors, dim=-1).unflatten(0, (data["columns"], -1))
    value = cross_entropy(columns[0] @ columns[1:].flatten(0, 1).T / 0.05, torch.arange(columns.shape[1]))
    value.backward()
    assert vectors.grad is not None
    for chunk, gradient in zip(chunks, vectors.grad.split(4), strict=True):
        (embed(*chunk) * gradient).sum().backward()
    return float(value.detach())


def steps(variant: str) -> tuple[Callable[[], float], LusiferModel]:
    """A variant's step, which returns the loss and leaves gradients, and its model."""
    row, _, form = variant.partition("/")
    stage, options = ROWS[row]
    model, head = build()
    data = batch(stage)
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    embedding = model.llm_embeddings().mean(dim=0)
    if form == "bfloat16":
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad and not name.startswith("connector"):
                parameter.data = parameter.data.bfloat16()
        head = head.bfloat16()
        # On CPUs the backward pass of fused attention in bfloat16 is slower than the plain one at these lengths.
        for part in (model.encoder, model.llm):
            part.set_attn_implementation("eager")
        context = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    align = AlignmentLoss(head, embedding, max_tokens=PASS_TOKENS)
    if form.startswith("naive"):
        if stage == "align":
            return lambda: naive_align(model, align, data), model
        return lambda: naive_contrast(model, head if form == "naive" else None, data), model
    loss = align if stage == "align" else ContrastiveLoss(max_tokens=PASS_TOKENS, **options)

    def step() -> float:
        with context():
            found = loss.step(model, data, backward=lambda value: value.backward(), no_sync=nullcontext, progress=0.0)
        return found["loss"]

    return step, model


def resident(field: str) -> float:
    """A figure of /proc/self/status in MB: ``VmRSS`` now, or ``VmHWM``, the most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def measure(variant: str, file: str) -> None:
    """Runs one variant in this process; its figures and first gradients go to a file."""
    step, model = large_loss() if variant == LOSS_ROW else steps(variant)
    Path("/proc/self/clear_refs").write_text("5")  # Forgets the peak of building the model.
    before = resident("VmRSS")
    # The first step also loads kernels; a step of half a minute does not notice.
    count, warm = (1, False) if variant.startswith("contrastive") else (STEPS, True)
    seconds, wall, value = [], [], 0.0
    found: dict[str, Tensor] = {}
    for index in range(count + warm):
        model.zero_grad()
        start, tick = time.process_time(), time.perf_counter()
        value = step()
        if index >= warm:
            seconds.append(time.process_time() - start)
            wall.append(time.perf_counter() - tick)
        if not found:
            found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    memory = resident("VmHWM") - before
    figures = {"seconds": seconds, "wall": min(wall), "memory": memory, "loss": value, "gradients": found}
    torch.save(figures, file)


def large_loss() -> tuple[Callable[[], float], torch.nn.Module]:
    """The loss alone on 1,024 queries, their positives and 7 negatives each."""
    torch.manual_seed(0)
    vectors = torch.nn.ParameterList([torch.randn(9, 1024, 768)])
    texts = tokens(torch.full((9 * 1024,), 8), torch.Generator().manual_seed(0))
    keys = text_keys(**texts).unflatten(0, (9, -1))
    loss = ContrastiveLoss()

    def step() -> float:
        value = loss.of_embeddings(vectors[0], keys)
        value.backward()
        return float(value.detach())

    return step, vectors


def run(variant: str) -> dict[str, Any]:
    """One turn of a variant, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/figures.pt"
        environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
        subprocess.run([sys.executable, __file__, variant, file], check=True, env=environment)
        return torch.load(file)


def difference(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """The larger of the losses' difference and the gradients', relative to the largest gradient entry."""
    gradients = expected["gradients"]
    assert found["gradients"].keys() == gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    worst = max(float((found["gradients"][name] - gradients[name]).abs().max()) for name in gradients)
    return max(abs(found["loss"] - expected["loss"]), worst / largest)


def middle(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """The last turn, its seconds and memory the medians of all."""
    seconds = statistics.median(second for turn in turns for second in turn["seconds"])
    return {**turns[-1], "seconds": seconds, "memory": statistics.median(turn["memory"] for turn in turns)}


def main() -> None:
    """Runs all variants in turns, and reports."""
    # Both contrastive rows have the same naive form.
    naive = {row: f"{'alignment' if row == 'alignment' else 'contrastive, gradient cache'}/naive" for row in ROWS}
    variants = [*dict.fromkeys(naive.values()), *(f"{row}/{form}" for row in ROWS for form in ("float32", "bfloat16"))]
    turns: dict[str, list[dict[str, Any]]] = {variant: [] for variant in [*variants, LOSS_ROW]}
    for turn in range(TURNS):
        for variant, found in turns.items():
            # A naive contrastive step is 72 equal passes, minutes long: one is enough.
            if turn == 0 or not variant.startswith("contrastive") or "naive" not in variant:
                found.append(run(variant))
    figures = {variant: middle(found) for variant, found in turns.items()}
    report: dict[str, Any] = {}
    lines = ["| step | CPU seconds | memory, MB | speed-up | memory | difference |", "|---|---:|---:|---:|---:|---:|"]
    for row in ROWS:
        base, single = figures[naive[row]], figures[f"{row}/float32"]
        lines.append(f"| {row}, naive | {base['seconds']:.2f} | {base['memory']:.0f} | 1 | 1 | |")
        for form in ("float32", "bfloat16"):
            ours = figures[f"{row}/{form}"]
            entry = {
                "ratio": base["seconds"] / ours["seconds"],
                "memory_ratio": ours["memory"] / base["memory"],
                "max_abs_diff": difference(single, base),
                "seconds": ours["seconds"],
                "memory_mb": ours["memory"],
            }
            if form == "bfloat16":
                entry["bfloat16_diff"] = difference(ours, base)
            report[row if form == "bfloat16" else f"{row}, float32"] = entry
            lines.append(
                f"| {row}, {form} | {ours['seconds']:.2f} | {ours['memory']:.0f} | {entry['ratio']:.2f} "
                f"| {entry['memory_ratio']:.2f} | {difference(ours, base):.1e} |"
            )
    bare = run("contrastive, gradient cache/naive without head")
    for row in list(ROWS)[1:]:
        report[row]["ratio_without_head"] = bare["seconds"][0] / report[row]["seconds"]
    lines.append(f"| contrastive, naive without LM head | {bare['seconds'][0]:.2f} | {bare['memory']:.0f} | | | |")
    loss = figures[LOSS_ROW]
    report[LOSS_ROW] = {"seconds": loss["seconds"], "memory_mb": loss["memory"], "wall_seconds": loss["wall"]}
    lines.append(f"| {LOSS_ROW} | {loss['seconds']:.2f} (wall {loss['wall']:.2f}) | {loss['memory']:.0f} | | | |")
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "train.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    (OUT / "train.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    if len(sys.argv) == 3:
        measure(*sys.argv[1:])
    else:
        main()
