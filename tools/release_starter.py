"""Turns a finished run of recipes/starter.yaml into the release inside the package.

Usage: python tools/release_starter.py runs/starter/model

Keeps what training changed, in float16, and the configuration files; leaves out the tokenizers, which
`lusifer fetch` brings. Refuses a release above 16 MB. The model card beside it is written by hand.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

LIMIT = 16_000_000
FILES = (
    "config.json",
    "config_sentence_transformers.json",
    "modules.json",
    "sentence_bert_config.json",
    "tokenizer_config.json",
    "1_Normalize/config.json",
)


def main() -> None:
    run = Path(sys.argv[1])
    target = Path(__file__).parent.parent / "src" / "lusifer" / "resources" / "starter"
    weights = {name: tensor.to(torch.float16) for name, tensor in load_file(run / "model.safetensors").items()}
    if bad := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise SystemExit(f"{bad[0]} does not fit float16")
    for name in FILES:
        if (run / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(run / name, target / name)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    if size > LIMIT:
        raise SystemExit(f"the release has {size} bytes, more than {LIMIT}")
    print(f"{target}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
