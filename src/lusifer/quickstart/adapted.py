"""The quickstart's first half: an English embedder fills an index, and an adapted model searches it in any language."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lusifer.adapt import Options
from lusifer.data.everyday_set import load_everyday
from lusifer.data.prompts import prompt_for
from lusifer.errors import LusiferError
from lusifer.loading import load_for_inference
from lusifer.model.fingerprint import weights_hash
from lusifer.model.text_encoder import TextEncoder
from lusifer.search.indexing import add
from lusifer.search.locations import create_store, open_store, store_exists
from lusifer.search.page import find
from lusifer.search.store import Entry, IndexInfo, Store

TEACHER = "starter:all-minilm-l6-v2"
# Counts and no clock: the result does not depend on how fast a machine is. They take 3 to 4 minutes on two CPU cores.
_TEXTS = 5_000
COUNTS = Options(
    minutes=None, most_texts=_TEXTS, most_stored=_TEXTS, most_pieces=20_000, head_epochs=4, encoder_steps=0
)
ASKED_IN = ("de", "ru", "hi", "te", "sw", "ja")
ASKED = ("travel-7", "health-8", "home-1")  # Names of sentences of the everyday set.


def fill_index(folder: Path, *, progress: bool) -> dict[str, Any]:
    """Embeds the everyday set's English sentences with the teacher, into an index that nothing changes afterwards.

    Args:
        folder: The index; a complete one is left as it is.
        progress: Whether to show a bar.

    Returns:
        How many ``texts`` it holds, and the ``model`` that made it.

    Raises:
        LusiferError: If the teacher cannot be loaded, or the index cannot be written or is another model's.
    """
    data = load_everyday()
    rows = zip(data.names, data.sentences["en"], data.topics, strict=True)
    entries = [Entry(name, text, "en", {"topic": topic}) for name, text, topic in rows]
    encoder = TextEncoder(load_for_inference(TEACHER))
    made_by = (TEACHER, weights_hash(encoder.model), encoder.dimension)
    if store_exists(str(folder)):
        store = open_store(str(folder))
        store.check_model(*made_by)
    else:
        store = create_store(
            str(folder), IndexInfo(*made_by, {"topic": "string"}, prompt_for(encoder.model, "document"))
        )
    add(store, encoder, entries, progress=progress)
    return {"texts": store.count(), "model": TEACHER}


def english_vectors(folder: Path) -> Tensor:
    """The index's vectors, (sentences, dim) float32 in the order of the everyday set.

    Raises:
        LusiferError: If the index cannot be read, or a sentence is not in it.
    """
    names = load_everyday().names
    rows = open_store(str(folder)).fetch(names)
    if missing := [name for name in names if name not in rows]:
        raise LusiferError(f"the index {str(folder)!r} no longer has the text {missing[0]!r}; choose another --output")
    return torch.from_numpy(np.stack([rows[name][1] for name in names]).astype(np.float32))


def ask(folder: Path, model: Path) -> list[dict[str, str]]:
    """Asks the index in several languages.

    Args:
        folder: The index.
        model: The adapted model.

    Returns:
        For each query ``language``, ``query``, ``found`` (the English text found first), ``wanted`` (its translation).

    Raises:
        LusiferError: If index or model cannot be read.
    """
    data = load_everyday()
    store: Store = open_store(str(folder))
    encoder = TextEncoder(load_for_inference(str(model)))
    answers = []
    for name in ASKED:
        place = data.names.index(name)
        for language in ASKED_IN:
            query = data.sentences[language][place]
            hit = find(store, encoder, query, k=1)[0]
            wanted = data.sentences["en"][place]
            answers.append({"language": language, "query": query, "found": hit.entry.text, "wanted": wanted})
    return answers
