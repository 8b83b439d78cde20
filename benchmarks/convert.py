"""Memory and time of converting a large checkpoint of the authors' format, adapters kept and merged.

Makes XLM-R (12 x 1024) and Mistral (24 x 1536) with random weights, LoRA on both, in bfloat16: about 2 GB. Each
conversion runs in a process of its own; ``peak_mb`` is the most memory it held, ``import`` what one holds that has
only imported lusifer. Writes runs/bench/convert.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

OUT = Path("runs/bench")
CODE = """
import re, sys
import lusifer
from lusifer.interop.authors import convert_authors
from pathlib import Path
if len(sys.argv) > 1:
    convert_authors(sys.argv[1], Path(sys.argv[2]), merge=sys.argv[3] == "merge")
# Not getrusage: what it tells begins with the memory of the process this one was forked from.
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024)
"""


def make(folder: Path) -> Path:
    """Backbones, and a checkpoint that holds their weights with adapters."""
    torch.set_default_dtype(torch.bfloat16)
    encoder = XLMRobertaModel(
        XLMRobertaConfig(vocab_size=150_000, hidden_size=1024, num_hidden_layers=12, num_attention_heads=16,
                         intermediate_size=4096, max_position_embeddings=514)
    )  # fmt: skip
    llm = AutoModelForCausalLM.from_config(
        MistralConfig(vocab_size=32_000, hidden_size=1536, num_hidden_layers=24, num_attention_heads=16,
                      num_key_value_heads=4, intermediate_size=4096, sliding_window=None)
    )  # fmt: skip
    torch.set_default_dtype(torch.float32)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, "<pad>")))
    state = {"connection_module.added_tokens": torch.zeros(1, 1536)}
    for index, (width, depth) in {0: (1536, 1024), 2: (1536, 1536)}.items():
        state[f"connection_module.ff.{index}.weight"] = torch.randn(width, depth)
        state[f"connection_module.ff.{index}.bias"] = torch.zeros(width)
        state[f"output_projection.{index}.weight"] = torch.randn(1536, 1536)
        state[f"output_projection.{index}.bias"] = torch.zeros(1536)
    for name, model, prefix, adapter in (
        ("encoder", encoder, "universal_learner", "universal_lora"),
        ("llm", llm, "encoder", "encoder_lora"),
    ):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        linear = {n for n, layer in model.named_modules() if isinstance(layer, torch.nn.Linear) and n != "lm_head"}
        for key, tensor in model.state_dict().items():
            layer, _, kind = key.rpartition(".")
            where = f"{prefix}.base_model.model.{layer}"
            if layer not in linear:
                state[f"{where}.{kind}"] = tensor
                continue
            state[f"{where}.base_layer.{kind}"] = tensor
            if kind == "weight":
                state[f"{where}.lora_A.{adapter}.weight"] = torch.randn(16, tensor.shape[1])
                state[f"{where}.lora_B.{adapter}.weight"] = torch.randn(tensor.shape[0], 16)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / "model.safetensors")
    config = {
        "universal_learner_name_or_path": "encoder", "encoder_name_or_path": "llm", "loar_r": 16, "lora_alpha": 32,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def main() -> None:
    """Measures and writes."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = make(Path(scratch))
        size = (folder / "model.safetensors").stat().st_size / 2**20
        results: dict[str, dict[str, float]] = {"checkpoint": {"mb": round(size)}}
        for how in ("import", "keep", "merge"):
            words = [] if how == "import" else [str(folder), str(folder / f"ours-{how}"), how]
            begin = time.monotonic()
            done = subprocess.run([sys.executable, "-c", CODE, *words], capture_output=True, check=True, text=True)
            results[how] = {
                "peak_mb": round(float(done.stdout.split()[-1])),
                "seconds": round(time.monotonic() - begin),
            }
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "convert.json").write_text(json.dumps(results, indent=1))
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
