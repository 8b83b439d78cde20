"""Zero-shot scores on the bundled everyday set: 64 sentences, 8 topics, 23 languages.

Two tasks, both top-1 accuracy on cosine similarity:

* **translation retrieval**: the English sentence must find its translation among a language's 64 sentences, and each
  of those the English one; the two directions are averaged.
* **topic retrieval**: within one language, the nearest other sentence must be of the same topic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn.functional import normalize

from lusifer.data.everyday_set import load_everyday
from lusifer.errors import LusiferError
from lusifer.model.backbone_alone import Embed
from lusifer.progress import track

Scores = dict[str, dict[str, float]]


def translation_accuracy(english: Tensor, other: Tensor) -> float:
    """Top-1 accuracy of finding row i of one side from row i of the other, both directions averaged.

    Args:
        english: (n, dim) embeddings.
        other: (n, dim) embeddings of the translations.
    """
    similarity = normalize(english.float(), dim=1) @ normalize(other.float(), dim=1).T
    rows = torch.arange(len(similarity), device=similarity.device)
    forward = (similarity.argmax(dim=1) == rows).float().mean()
    backward = (similarity.argmax(dim=0) == rows).float().mean()
    return float(forward + backward) / 2


def topic_accuracy(embeddings: Tensor, topics: Sequence[str]) -> float:
    """Share of n sentences whose nearest other one has the same topic, from (n, dim) embeddings."""
    unit = normalize(embeddings.float(), dim=1)
    nearest = (unit @ unit.T).fill_diagonal_(-2.0).argmax(dim=1).tolist()
    return sum(topics[i] == topics[j] for i, j in enumerate(nearest)) / len(topics)


def score(
    embed: Embed, *, english: Tensor | None = None, languages: Sequence[str] | None = None, progress: bool = True
) -> Scores:
    """Scores a system on the everyday set.

    Args:
        embed: Maps texts to (n, dim) embeddings.
        english: (sentences, dim) embeddings of the English sentences by another model, in the set's order: these are
            the English side of translation retrieval. ``embed`` makes them when None.
        languages: Codes to score; all bundled ones when None. English is always embedded.
        progress: Whether to show a bar.

    Returns:
        ``translation_retrieval`` (without English) and ``topic_retrieval``: accuracies by language, between 0 and 1.

    Raises:
        LusiferError: If a language is not in the set.
    """
    data = load_everyday()
    chosen = list(languages or data.sentences)
    if unknown := [language for language in chosen if language not in data.sentences]:
        raise LusiferError(f"the bundled set has no language {unknown[0]!r}; it has {', '.join(data.sentences)}")
    own = embed(data.sentences["en"])
    found = own if english is None else english.to(own.device)
    scores: Scores = {"translation_retrieval": {}, "topic_retrieval": {}}
    for language in track(chosen, "scoring languages", "language", show=progress):
        vectors = own if language == "en" else embed(data.sentences[language])
        if language != "en":
            scores["translation_retrieval"][language] = translation_accuracy(found, vectors)
        scores["topic_retrieval"][language] = topic_accuracy(vectors, data.topics)
    return scores


def language_bias(vectors: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Whether neighbours share the language rather than the meaning, all languages in one corpus.

    Args:
        vectors: Language to (n, dim), row i of all of them translations of each other; at least two languages.

    Returns:
        By language, English aside: ``same_language``, the share of same-language texts among the ten nearest of all
        languages (0 is best, since every text has a translation in each other language; chance is 1 / languages);
        ``alone``, how often a text finds its English translation among English texts; ``mixed``, how often its nearest
        neighbour among all texts is one of its translations.
    """
    codes = list(vectors)
    every = normalize(torch.cat([vectors[code].float() for code in codes]), dim=1)
    count = len(vectors[codes[0]])
    spoken = torch.arange(len(codes)).repeat_interleave(count)
    meaning = torch.arange(count).repeat(len(codes))
    similarity = (every @ every.T).fill_diagonal_(-2.0)
    nearest = similarity.topk(10, dim=1).indices
    bias = {}
    for number, code in enumerate(codes):
        if code == "en":
            continue
        rows = spoken == number
        english = similarity[rows][:, spoken == codes.index("en")]
        bias[code] = {
            "same_language": float((spoken[nearest[rows]] == number).float().mean()),
            "alone": float((english.argmax(dim=1) == torch.arange(count)).float().mean()),
            "mixed": float((meaning[nearest[rows, 0]] == meaning[rows]).float().mean()),
        }
    return bias


def embedder(model: SentenceTransformer, *, prompt: str | None = None) -> Embed:
    """An `Embed` from a Sentence Transformers model.

    Args:
        model: The model.
        prompt: Put before every sentence; the model's default prompt when None.
    """

    def embed(texts: Sequence[str]) -> Tensor:
        options: Any = {"convert_to_tensor": True, "show_progress_bar": False, "batch_size": 64}
        return model.encode(list(texts), prompt=prompt, **options).float().cpu()

    return embed


def mean_score(by_language: dict[str, float], languages: Sequence[str]) -> float:
    """Mean over those of the languages that are scored, English aside."""
    values = [by_language[language] for language in languages if language in by_language and language != "en"]
    return sum(values) / len(values) if values else float("nan")
