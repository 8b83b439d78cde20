"""ONNX Runtime against torch on this machine's CPU: speed by shape, size on disk.

Usage: python benchmarks/onnx.py MODEL EXPORTED [--threads 1] [--rounds 7]

MODEL is a checkpoint, EXPORTED what ``lusifer export onnx MODEL EXPORTED`` made of it. Both get the same token ids in
the same batches, in turns, with as many threads; a shape's ratio is the median of its rounds' ratios, so that what else
the machine does counts for both. Writes runs/bench/onnx.json and onnx.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from lusifer.export.onnx import OUTPUT, Embedder, OnnxEmbedder
from lusifer.loading import load_for_inference, resolve

OUT = Path("runs/bench")
SHAPES = ((1, 16), (1, 128), (8, 16), (8, 128), (32, 32))


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def megabytes(folder: str) -> float:
    """Size of all files below a folder."""
    return round(sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) / 1e6, 1)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("exported")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = Embedder(load_for_inference(given.model, device="cpu", precision="float32")).eval()
    exported = OnnxEmbedder(Path(given.exported), given.threads)
    generator, rows = np.random.default_rng(0), []
    for batch, length in SHAPES:
        ids = generator.integers(1000, 20_000, (batch, length), dtype=np.int64)
        mask = np.ones_like(ids)
        tensors = torch.from_numpy(ids), torch.from_numpy(mask)

        def by_torch(tensors: tuple[torch.Tensor, torch.Tensor] = tensors) -> torch.Tensor:
            with torch.inference_mode():
                return model(*tensors)

        def by_onnx(ids: np.ndarray = ids, mask: np.ndarray = mask) -> np.ndarray:
            return exported.session.run([OUTPUT], {"input_ids": ids, "attention_mask": mask})[0]

        difference = float(np.abs(by_onnx() - by_torch().numpy()).max())  # The first call of each is a warm-up.
        pairs = [(seconds(by_torch), seconds(by_onnx)) for _ in range(given.rounds)]
        ratios = sorted(one / other for one, other in pairs)
        rows.append(
            {
                "batch": batch,
                "tokens": length,
                "torch_ms": round(1e3 * statistics.median(one for one, _ in pairs), 1),
                "onnx_ms": round(1e3 * statistics.median(other for _, other in pairs), 1),
                "torch_by_onnx": round(statistics.median(ratios), 2),
                "least_and_most": [round(ratios[0], 2), round(ratios[-1], 2)],
                "difference": difference,
            }
        )
    facts = {
        "threads": given.threads,
        "model_mb": megabytes(resolve(given.model)),
        "onnx_mb": megabytes(given.exported),
    }
    lines = ["| batch x tokens | torch, ms | ONNX Runtime, ms | times as fast |", "|---|---:|---:|---:|"]
    lines += [
        f"| {row['batch']} x {row['tokens']} | {row['torch_ms']} | {row['onnx_ms']} | {row['torch_by_onnx']} |"
        for row in rows
    ]
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "onnx.json").write_text(json.dumps({**facts, "shapes": rows}, indent=1) + "\n", encoding="utf-8")
    (OUT / "onnx.md").write_text("\n".join([*lines, "", json.dumps(facts), ""]), encoding="utf-8")
    print("\n".join([*lines, json.dumps(facts)]))


if __name__ == "__main__":
    main()
