"""Bulk encoding at growing sizes: memory, what kills cost, and what processes gain.

Short texts (1 to 15 English words) and a tiny random model (XLM-R 2 x 32, Llama 3 x 48), so that reading, writing and
the order of work count for more than in real life: what is measured is everything but the model. Each row is a process
of its own, from a server that has imported all beforehand, float32, one thread.

memory      peak resident memory of a process that encodes so many texts into shards of 5,000 rows, and its time
kills       the largest input, killed by SIGKILL at random moments and resumed; ``same`` is whether every file of the
            output has the bytes of the undisturbed run, ``made_again`` the shards lost in the middle
processes   the largest input by one and two processes: seconds with their start (importing, loading), and texts a
            second from the first finished shard to the last

Writes runs/bench/bulk.json and bulk.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from lusifer.bulk.job import Settings
from lusifer.bulk.run import encode

OUT = Path("runs/bench")
SHARD = 5_000
SETTINGS = Settings(precision="float32", shard_rows=SHARD)


def save_model(folder: Path) -> Path:
    """A tiny random checkpoint, of the backbones the tests use."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, XLMRobertaConfig, XLMRobertaModel

    from conftest import save_encoder_tokenizer, save_llm_tokenizer
    from lusifer import LusiferModel
    from lusifer.model.backbones import load_tokenizer
    from lusifer.model.sentence_transformer import save_atomically, to_sentence_transformer

    torch.manual_seed(0)
    encoder, llm = folder / "encoder", folder / "llm"
    size = {"num_attention_heads": 4, "max_position_embeddings": 256}
    XLMRobertaModel(
        XLMRobertaConfig(
            vocab_size=save_encoder_tokenizer(encoder), hidden_size=32, num_hidden_layers=2, intermediate_size=48,
            pad_token_id=1, bos_token_id=0, eos_token_id=2, **size,
        ),
        add_pooling_layer=False,
    ).save_pretrained(encoder)  # fmt: skip
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=save_llm_tokenizer(llm), hidden_size=48, num_hidden_layers=3, intermediate_size=64,
            num_key_value_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=2, **size,
        )
    ).save_pretrained(llm)  # fmt: skip
    model = LusiferModel.from_backbones(str(encoder), str(llm), max_seq_length=64)
    save_atomically(to_sentence_transformer(model, load_tokenizer("encoder", str(encoder))), folder / "model")
    return folder / "model"


def write_texts(path: Path, count: int) -> Path:
    """A file of so many texts, the same ones in every run."""
    from conftest import CORPUS

    words, rng = " ".join(CORPUS).split(), random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            file.write(" ".join(rng.choices(words, k=rng.randint(1, 15))) + f" {number}\n")
    return path


def work(results: Any, model: Path, source: Path, out: Path, processes: int) -> None:
    """Encodes, and tells seconds and peak memory."""
    begin = time.perf_counter()
    encode(str(model), str(source), str(out), SETTINGS, processes=processes, threads=1)
    seconds = time.perf_counter() - begin
    # Not getrusage: what it tells begins with the memory of the process this one was forked from.
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert peak is not None
    results.put((seconds, int(peak[1]) / 1024))


def content(folder: Path) -> dict[str, bytes]:
    """Files of an output by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} if folder.exists() else {}


def steady(folder: Path) -> float:
    """Texts a second between the first shard and the last."""
    times = sorted(path.stat().st_mtime for path in folder.glob("part-*"))
    return SHARD * (len(times) - 1) / (times[-1] - times[0])


class Bench:
    """Runs processes that have imported everything already."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["lusifer.bulk.local_engine", "lusifer.bulk.run"])
        self.run(write_texts(model.parent / "first.txt", 10), model.parent / "first")

    def start(self, source: Path, out: Path, processes: int = 1) -> tuple[Any, Any]:
        """A running process and where its result will be."""
        results = self.context.SimpleQueue()
        process = self.context.Process(target=work, args=(results, self.model, source, out, processes))
        process.start()
        return process, results

    def run(self, source: Path, out: Path, processes: int = 1) -> tuple[float, float]:
        """Seconds and peak megabytes of one undisturbed run."""
        process, results = self.start(source, out, processes)
        seconds, megabytes = results.get()
        process.join()
        return seconds, megabytes

    def killed(self, source: Path, out: Path, kills: int, seconds: float) -> dict[str, Any]:
        """Kills runs at random moments until there were so many, then lets one finish."""
        rng, begin, lost, done = random.Random(1), time.perf_counter(), 0, 0
        for _ in range(kills):
            process, _results = self.start(source, out)
            process.join(rng.uniform(0, 1.6 * seconds / kills))
            lost += process.is_alive() and len(list(out.glob(".staging/.part-*")))
            done += not process.is_alive()
            process.kill()
            process.join()
        self.run(source, out)
        return {"kills": kills - done, "made_again": lost, "seconds": time.perf_counter() - begin}


def main() -> None:
    """Measures and writes the report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--texts", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=10)
    options = parser.parse_args()
    report: dict[str, Any] = {"texts": options.texts, "shard_rows": SHARD, "cores": os.cpu_count(), "memory": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        bench = Bench(save_model(folder))
        for count in (options.texts // 10, options.texts // 2, options.texts):
            source = write_texts(folder / f"{count}.txt", count)
            seconds, megabytes = bench.run(source, folder / f"out{count}")
            report["memory"][count] = {"peak_mb": megabytes, "seconds": seconds, "texts_per_second": count / seconds}
        expected = content(folder / f"out{options.texts}")
        report["kills"] = bench.killed(source, folder / "killed", options.kills, seconds)
        report["kills"]["same"] = content(folder / "killed") == expected
        report["processes"] = {}
        for processes in (1, 2):
            shutil.rmtree(folder / "many", ignore_errors=True)
            seconds, _ = bench.run(source, folder / "many", processes)
            same = content(folder / "many") == expected
            report["processes"][processes] = {
                "seconds": seconds, "texts_per_second": steady(folder / "many"), "same": same,
            }  # fmt: skip
        begin = time.perf_counter()
        encode(str(bench.model), str(source), str(folder / "many"), SETTINGS)
        report["finished_again_seconds"] = time.perf_counter() - begin
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "bulk.json").write_text(json.dumps(report, indent=1) + "\n")
    text = markdown(report)
    (OUT / "bulk.md").write_text(text)
    print(text)


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    lines = ["| texts | peak memory, MB | seconds | texts/s |", "|---|---|---|---|"]
    for count, row in report["memory"].items():
        lines.append(f"| {count:,} | {row['peak_mb']:.0f} | {row['seconds']:.1f} | {row['texts_per_second']:.0f} |")
    kills = report["kills"]
    lines += [
        "",
        f"{kills['kills']} kills: {kills['made_again']} shards lost in the middle and made again, "
        f"{kills['seconds']:.1f} s in all, output {'the same bytes' if kills['same'] else 'DIFFERS'}.",
        "",
        "| processes | seconds in all | texts/s after the first shard | same bytes |",
        "|---|---|---|---|",
    ]
    for count, row in report["processes"].items():
        lines.append(f"| {count} | {row['seconds']:.1f} | {row['texts_per_second']:.0f} | {row['same']} |")
    lines += ["", f"The finished output again: {report['finished_again_seconds']:.2f} s."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
