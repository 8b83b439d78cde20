"""Packs an adapted model for the package: ``python benchmarks/adapt/release.py RUN/model``.

Writes src/lusifer/resources/starter: configuration, card and, in 4 bits, what training changed. The encoder must be
``starter:multilingual-e5-small``.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from lusifer.publishing import publish_folder
from lusifer.starter.fetch import starter_path
from lusifer.starter.packed import pack
from lusifer.starter.released import BASE, CHANGES, WEIGHTS, changes_of

TARGET = Path(__file__).parents[2] / "src/lusifer/resources/starter"
LEFT_OUT = ("*.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def main() -> None:
    """Reads the command line and writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    args = parser.parse_args()
    changes = changes_of(load_file(starter_path(BASE) / WEIGHTS), load_file(args.model / WEIGHTS))
    with publish_folder(TARGET, "release") as folder:
        shutil.copytree(args.model, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
        save_file(pack(changes, whole="head.linear.weight"), folder / CHANGES, metadata={"format": "pt"})
    size = sum(path.stat().st_size for path in TARGET.rglob("*") if path.is_file())
    print(f"{len(changes)} tensors, {size:,} bytes in {TARGET}")


if __name__ == "__main__":
    main()
