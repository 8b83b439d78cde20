"""The bundled everyday set as tasks beside the user's own: result files, intervals and a place in the report."""

from __future__ import annotations

from lusifer.data.everyday_set import load_everyday
from lusifer.evaluation.own.content import OwnTask, Search, Subset

NAME = "everyday"
_SOURCE = "64 bundled sentences in 23 languages"


def everyday_tasks() -> list[OwnTask]:
    """Both tasks of `lusifer.evaluation.everyday`, with the same scores.

    Translation retrieval is bitext mining with English, either direction a subset of its own; topic retrieval is
    retrieval among the sentences of one language, whose first other one must be of the same topic.
    """
    data = load_everyday()
    pairs = [pair for code in data.sentences if code != "en" for pair in ((code, "en"), ("en", code))]
    translated: dict[str, Subset] = {
        f"{one}-{other}": {"test": {"sentence1": data.sentences[one], "sentence2": data.sentences[other]}}
        for one, other in pairs
    }
    same = {
        one: {other: 1 for other, t in zip(data.names, data.topics, strict=True) if t == topic and other != one}
        for one, topic in zip(data.names, data.topics, strict=True)
    }
    topical: dict[str, Subset] = {}
    for code, sentences in data.sentences.items():
        columns = {"id": data.names, "text": sentences}
        topical[code] = Search(columns, columns, same)
    return [
        OwnTask(
            f"{NAME}-translation", "bitext", "accuracy", translated, {f"{a}-{b}": (a, b) for a, b in pairs},
            description="Which English sentence says the same, and the other way round?", source=_SOURCE,
        ),
        OwnTask(
            f"{NAME}-topics", "retrieval", "precision_at_1", topical, {code: (code,) for code in topical},
            instruction="Find a sentence about the same topic", source=_SOURCE, ignore_identical_ids=True,
            description="Is the nearest other sentence of the language about the same topic?",
        ),
    ]  # fmt: skip
