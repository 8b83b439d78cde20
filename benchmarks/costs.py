"""How the cost of encoding grows: with length, tokens of a pass, number of texts and language; and its memory.

Length, pass and number: the random XLM-R (6 x 384) and Llama (12 x 576) of benchmarks/encode.py, CPU time, best data
type of this machine, median of three turns. Language: mean tokens of the bundled parallel sentences by the tokenizers
of two backbones (the starter's unless told otherwise), and what reading them costs in products with those backbones'
weights, LUSIFER's two against the LLM alone. Writes runs/bench/costs.json, costs.md and costs.png.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lusifer
from encode import alone, make_texts, save_backbones, save_model, words
from lusifer.data.everyday_set import load_everyday
from lusifer.model.backbones import build_encoder, build_llm, load_config, load_tokenizer
from lusifer.model.text_encoder import TextEncoder, set_precision

OUT = Path("runs/bench")
LENGTHS = (8, 16, 32, 64, 128, 256, 510)
BUDGETS = (128, 256, 512, 1024, 2048, 4096, 8192)
COUNTS = (64, 128, 256, 512)
TURNS = 3


def cpu_seconds(work: Callable[[], Any]) -> float:
    """CPU time of one call."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def of_length(count: int, length: int) -> list[str]:
    """Texts of so many tokens, special ones included."""
    random = np.random.default_rng(length)
    vocabulary = words()
    return [" ".join(vocabulary[i] for i in random.integers(len(vocabulary), size=length - 2)) for _ in range(count)]


def growth(folder: str) -> dict[str, dict[int, float]]:
    """CPU seconds by length, tokens of a pass and number of texts; the kinds of turns alternate."""
    model = lusifer.load(folder, device="cpu")
    set_precision(model, "auto")
    mix = make_texts(max(COUNTS))
    jobs: dict[str, dict[int, Callable[[], Any]]] = {"length": {}, "pass": {}, "texts": {}}
    plain = TextEncoder(model)
    for length in LENGTHS:
        texts = of_length(max(8, 4096 // length), length)
        jobs["length"][length] = lambda texts=texts: plain.encode(texts)
    for budget in BUDGETS:
        encoder = TextEncoder(model, token_budget=budget)
        jobs["pass"][budget] = lambda encoder=encoder: encoder.encode(mix[:150])
    for count in COUNTS:
        jobs["texts"][count] = lambda count=count: plain.encode(mix[:count])
    plain.encode(mix[:50])
    seconds: dict[str, dict[int, list[float]]] = {kind: {x: [] for x in of} for kind, of in jobs.items()}
    for _ in range(TURNS):
        for kind, of in jobs.items():
            for x, work in of.items():
                seconds[kind][x].append(cpu_seconds(work))
    return {kind: {x: statistics.median(times) for x, times in of.items()} for kind, of in seconds.items()}


def peak_memory(folder: str, what: str) -> float:
    """Peak memory, MB, of a process that loads a model and encodes the mix; ``import`` loads nothing."""
    done = subprocess.run([sys.executable, __file__, "--memory", what, folder], capture_output=True, check=True)
    return float(done.stdout)


def _memory(what: str, folder: str) -> None:
    texts = make_texts(300)
    if what == "LUSIFER":
        model = lusifer.load(folder, device="cpu")
        set_precision(model, "auto")
        model.encode(texts)
    elif what == "LLM alone":
        alone(Path(folder).parent / "llm", torch.bfloat16).encode(texts)
    # Not getrusage: what it tells begins with the memory of the process this one was forked from.
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert peak is not None
    print(int(peak[1]) / 1024)


def products(model: torch.nn.Module) -> int:
    """Weights a token is multiplied with."""
    return sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Linear))


def by_language(encoder: str, llm: str) -> dict[str, dict[str, float]]:
    """Mean tokens of a sentence by language and tokenizer, and the cost of LUSIFER over that of the LLM alone."""
    tokenizers = {"encoder": load_tokenizer("encoder", encoder), "llm": load_tokenizer("llm", llm)}
    with torch.device("meta"):
        first = products(build_encoder(load_config("encoder", encoder)))
        second = products(build_llm(load_config("llm", llm)))
    found = {}
    for code, texts in load_everyday().sentences.items():
        mean = {part: statistics.fmean(map(len, of(texts)["input_ids"])) for part, of in tokenizers.items()}
        cost = (mean["encoder"] * first + (mean["encoder"] + 2) * second) / (mean["llm"] * second)
        found[code] = {part: round(value, 1) for part, value in mean.items()} | {"cost": round(cost, 2)}
    return found


def plot(results: dict[str, Any], path: Path) -> None:
    """Four panels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    (length, budget), (texts, language) = panels
    for axes, kind, label in (
        (length, "per_token_by_length", "tokens of a text"),
        (budget, "relative_by_pass", "padded tokens of a pass"),
        (texts, "per_text_by_texts", "texts in one call"),
    ):
        axes.plot(list(map(int, results[kind])), list(results[kind].values()), "o-", color="#0072b2")
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(map(int, results[kind])), list(map(str, results[kind])), minor=False)
        axes.set_xlabel(label)
        axes.set_ylabel("cost, relative to the least")
        axes.set_ylim(0)
    rows = results["languages"]
    order = sorted(rows, key=lambda code: rows[code]["llm"])
    for part, colour in (("llm", "#e69f00"), ("encoder", "#0072b2")):
        language.plot(order, [rows[code][part] for code in order], "o", color=colour, label=f"{part} tokenizer")
    language.set_ylabel("tokens of a sentence")
    language.set_ylim(0)
    language.tick_params(axis="x", labelsize=7)
    language.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="starter:multilingual-e5-small")
    parser.add_argument("--llm", default="starter:smollm2-135m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        _memory(*options.memory)
        return
    with tempfile.TemporaryDirectory() as scratch:
        encoder, llm = save_backbones(Path(scratch))
        folder = str(Path(scratch) / "model")
        save_model(encoder, llm, Path(folder))
        seconds = growth(folder)
        memory = {what: round(peak_memory(folder, what)) for what in ("import", "LUSIFER", "LLM alone")}
    per_token = {x: s / (max(8, 4096 // x) * x) for x, s in seconds["length"].items()}
    per_text = {x: s / x for x, s in seconds["texts"].items()}

    def relative(costs: dict[int, float]) -> dict[int, float]:
        return {x: round(cost / min(costs.values()), 3) for x, cost in costs.items()}

    results = {
        "per_token_by_length": relative(per_token),
        "relative_by_pass": relative(seconds["pass"]),
        "per_text_by_texts": relative(per_text),
        "peak_memory_mb": memory,
        "languages": by_language(options.encoder, options.llm),
    }
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "costs.json").write_text(json.dumps(results, indent=1))
    lines = []
    for kind in ("per_token_by_length", "relative_by_pass", "per_text_by_texts", "peak_memory_mb"):
        row = results[kind]
        lines += [f"| {kind} | {' | '.join(map(str, row))} |", "|---|" + "---:|" * len(row)]
        lines += [f"| | {' | '.join(map(str, row.values()))} |", ""]
    lines += [
        "| language | encoder's tokens | LLM's tokens | LUSIFER's cost over the LLM's alone |",
        "|---|---:|---:|---:|",
    ]
    lines += [f"| {c} | {r['encoder']} | {r['llm']} | {r['cost']} |" for c, r in results["languages"].items()]
    (OUT / "costs.md").write_text("\n".join(lines) + "\n")
    plot(results, OUT / "costs.png")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
