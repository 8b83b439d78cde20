"""What sorting a batch by length in tokens is worth: CPU time against one padded pass, with equal results.

Random XLM-R (6 x 384) and Llama (12 x 576), texts of 5 to 300 tokens (median about 40). Every row is
the median of five runs, interleaved with the baseline in one process, and carries the largest
difference of its embeddings from the baseline's. Writes runs/bench/padding.json and a Markdown table.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, XLMRobertaConfig

from lusifer import LusiferConfig, LusiferModel
from lusifer.microbatches import micro_batches, trim

OUT = Path("runs/bench")
TEXTS, BATCH, REPEATS = 64, 32, 5


def padded(model: LusiferModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Embeddings of a batch in one pass as wide as its longest text."""
    return model(**batch).pooler_output


def in_order(model: LusiferModel, batch: dict[str, torch.Tensor], max_tokens: int) -> torch.Tensor:
    """The same in passes sorted by length."""
    groups = micro_batches(batch["attention_mask"].sum(dim=1), max_tokens)
    parts = [model(**trim(batch, rows)).pooler_output for rows in groups]
    return torch.cat(parts)[torch.argsort(torch.cat(groups))]


def build() -> LusiferModel:
    """The model both rows share, float32, random weights."""
    torch.manual_seed(0)
    encoder = XLMRobertaConfig(
        vocab_size=1000,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=6,
        intermediate_size=1536,
        max_position_embeddings=514,
    )
    llm = LlamaConfig(
        vocab_size=1000,
        hidden_size=576,
        num_hidden_layers=12,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
    )
    return LusiferModel(LusiferConfig(encoder_config=encoder, llm_config=llm)).eval()


def batches() -> list[dict[str, torch.Tensor]]:
    """Unsorted batches padded to their longest text."""
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(TEXTS, generator=generator) * 0.8 + 3.7).exp().clamp(5, 300).long()
    made = []
    for part in lengths.split(BATCH):
        mask = (torch.arange(int(part.max())) < part.unsqueeze(1)).long()
        ids = torch.randint(5, 1000, mask.shape, generator=generator)
        made.append({"input_ids": torch.where(mask.bool(), ids, 1), "attention_mask": mask})
    return made


@torch.inference_mode()
def main() -> None:
    """Runs the benchmark."""
    model, data = build(), batches()
    computed = sum(batch["input_ids"].numel() for batch in data)
    real = sum(int(batch["attention_mask"].sum()) for batch in data)
    rows: dict[str, Callable[[], torch.Tensor]] = {
        "padded to the batch's longest": lambda: torch.cat([padded(model, b) for b in data]),
        "sorted by tokens, 2,048 a pass": lambda: torch.cat([in_order(model, b, 2048) for b in data]),
        "sorted by tokens, 512 a pass": lambda: torch.cat([in_order(model, b, 512) for b in data]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    vectors: dict[str, torch.Tensor] = {}
    for _ in range(REPEATS):
        for name, run in rows.items():
            start = time.process_time()
            vectors[name] = run()
            seconds[name].append(time.process_time() - start)
    baseline = next(iter(rows))
    report: dict[str, Any] = {}
    lines = ["| pass | CPU seconds | speed-up | largest difference |", "|---|---:|---:|---:|"]
    for name in rows:
        median = statistics.median(seconds[name])
        ratio = statistics.median(seconds[baseline]) / median
        difference = float((vectors[name] - vectors[baseline]).abs().max())
        report[name] = {"cpu_seconds": median, "ratio": ratio, "max_abs_diff": difference}
        lines.append(f"| {name} | {median:.2f} | {ratio:.2f} | {difference:.1e} |")
    lines.append(
        f"\n{TEXTS} texts, {real} real tokens, {computed} with padding ({100 * (1 - real / computed):.0f}% padding)"
    )
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "padding.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    (OUT / "padding.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
