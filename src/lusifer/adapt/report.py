"""What a user may expect: agreement with the teacher in English, and finding its vectors in other languages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lusifer.data.everyday_set import load_everyday
from lusifer.data.vectors.agreement import compare

Encode = Callable[[Sequence[str]], np.ndarray]
MULTILINGUAL = 0.5  # Share of the everyday set beyond which a teacher reads other languages itself.


def everyday_scores(queries: Encode, index: np.ndarray) -> dict[str, float]:
    """Share of the everyday set's sentences whose English translation is the nearest vector of an index, by language.

    Args:
        queries: From texts to (n, dim) unit vectors.
        index: (sentences, dim) unit vectors of the English sentences.
    """
    sentences = load_everyday().sentences
    scores = {}
    for language in sorted(sentences):
        nearest = (queries(sentences[language]) @ index.T).argmax(axis=1)
        scores[language] = float((nearest == np.arange(len(nearest))).mean())
    return scores


def agreement(student: np.ndarray, teacher: np.ndarray) -> dict[str, float]:
    """How a student's vectors of English texts compare with the teacher's of the same texts.

    Args:
        student: (n, dim) unit vectors.
        teacher: (n, dim) unit vectors.
    """
    measured = compare(student, teacher)
    return {
        "texts": measured.texts,
        "cosine": round(measured.mean_cosine, 4),
        "finds_itself": round(measured.found, 4),
    }


def mean_other(scores: dict[str, float]) -> float:
    """Mean over the languages other than English."""
    others = [score for language, score in scores.items() if language != "en"]
    return sum(others) / max(1, len(others))


def summary(report: dict[str, Any]) -> list[str]:
    """The report as lines of text."""
    english = report["english"]
    lines = [
        f"held-out English: cosine {english['cosine']:.2f} with the teacher; {100 * english['finds_itself']:.1f} % of "
        f"{english['texts']:,} texts find their own vector"
    ]
    if everyday := report.get("everyday"):
        before = f" (the teacher reading them itself: {100 * mean_other(report['everyday_teacher']):.0f} %)"
        lines.append(
            f"everyday sentences in {len(everyday) - 1} languages that find their English vector: "
            f"{100 * mean_other(everyday):.0f} %{before}"
        )
    return lines
