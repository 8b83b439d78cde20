"""What the quickstart says of its encoder's languages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from lusifer.data.everyday_set import load_everyday
from lusifer.quickstart.run import seen_languages


def test_languages_are_those_the_encoder_names(tiny_encoder: str, tmp_path: Path) -> None:
    every = list(load_everyday().sentences)
    assert seen_languages(tiny_encoder) == every
    folder = Path(shutil.copytree(tiny_encoder, tmp_path / "encoder"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "languages": ["xx", "te", "fr", "en"]}))
    assert seen_languages(str(folder)) == [code for code in every if code in ("te", "fr", "en")]
