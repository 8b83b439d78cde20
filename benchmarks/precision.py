"""What `precision: auto` chooses, and what it saves: passes of an LLM in float32 and in bfloat16.

For the processor as it is, and as one without bfloat16 instructions (oneDNN told to use AVX-512 alone): the starter's
LLM, 4 layers as in the quickstart, LoRA r 16, soft tokens of 32 texts of 32 tokens in, a sum of states out. ``weights``
is the LLM in that type (``llm_dtype``), ``autocast`` its passes over float32 weights (``precision``). Every row is a
process of its own; seconds are the least of 5 passes forward, and forward and backward. Needs `lusifer fetch`.

Writes runs/bench/precision.json and a Markdown table.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from lusifer.model.adapters import add_lora
from lusifer.model.backbones import load_config, load_llm
from lusifer.model.packing import run_llm
from lusifer.model.text_encoder import choose_dtype

OUT = Path("runs/bench")
NAME = "starter:smollm2-135m"
PROCESSORS: dict[str, dict[str, str]] = {"as it is": {}, "no bfloat16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}}
FORMS = {"float32": ("float32", False), "weights": ("bfloat16", False), "autocast": ("float32", True)}
FORMS["both"] = ("bfloat16", True)


def measure(form: str) -> dict[str, Any]:
    """Seconds of one form, and what `choose_dtype` says, in this process."""
    dtype, autocast = FORMS[form]
    config = load_config("llm", NAME)
    config.num_hidden_layers = 4
    torch.manual_seed(0)
    llm = load_llm(NAME, config, dtype=dtype).requires_grad_(False)
    add_lora(llm, {"r": 16, "lora_alpha": 32})
    for name, parameter in llm.named_parameters():
        parameter.requires_grad_("lora_" in name)
    soft, mask = torch.randn(32, 32, config.hidden_size) / 8, torch.ones(32, 32, dtype=torch.bool)
    shape = (config.intermediate_size, config.hidden_size)
    row: dict[str, Any] = {"auto": choose_dtype(torch.device("cpu"), shape, training=True)}
    for name in ("forward", "forward and backward"):
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
            with context, torch.set_grad_enabled(name != "forward"):
                states = run_llm(llm, soft, mask, is_causal=False)
            if name != "forward":
                states.float().sum().backward()
            times.append(time.perf_counter() - begin)
        row[name] = round(min(times), 4)
    return row


def main() -> None:
    """Runs every row in a process of its own and writes the table."""
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
        return
    results: dict[str, Any] = {"threads": torch.get_num_threads()}
    lines = ["| processor | passes in | forward, s | forward and backward, s | auto |", "|---|---|---:|---:|---|"]
    for processor, environment in PROCESSORS.items():
        for form in FORMS:
            command, options = [sys.executable, __file__, form], {"capture_output": True, "text": True, "check": True}
            done = subprocess.run(command, env={**os.environ, **environment}, **options)
            row = results.setdefault(processor, {})[form] = json.loads(done.stdout.splitlines()[-1])
            figures = f"{row['forward']:.3f} | {row['forward and backward']:.3f}"
            lines.append(f"| {processor} | {form} | {figures} | {': '.join(row['auto'])} |")
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "precision.json").write_text(json.dumps(results, indent=1))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
