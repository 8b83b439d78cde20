"""Zero-shot scores on the bundled everyday set: 64 sentences, 8 topics, 23 languages.

Two tasks, both top-1 accuracy on cosine similarity:

* **translation retrieval**: the English sentence must find its translation among a language's 64
  sentences, and each of those the English one; the two directions are averaged.
* **topic retrieval**: within one language, the nearest other sentence must be of the same topic.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn.functional import normalize
from tqdm.auto import tqdm

from lusifer.errors import LusiferError

Embed = Callable[[Sequence[str]], Tensor]
Scores = dict[str, dict[str, float]]


@dataclass(frozen=True)
class EverydaySet:
    """The bundled parallel sentences.

    Attributes:
        names: Name of each sentence (``id`` is taken: it is Indonesian).
        topics: Topic of each sentence.
        sentences: Language code to sentences, all in the order of ``names``.
    """

    names: list[str]
    topics: list[str]
    sentences: dict[str, list[str]]


def load_everyday() -> EverydaySet:
    """Reads the bundled set."""
    text = (files("lusifer") / "resources" / "everyday.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    languages = [key for key in rows[0] if key not in ("name", "topic")]
    return EverydaySet(
        [row["name"] for row in rows],
        [row["topic"] for row in rows],
        {language: [row[language] for row in rows] for language in languages},
    )


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
    """Share of sentences whose nearest other sentence has the same topic.

    Args:
        embeddings: (n, dim).
        topics: n topics.
    """
    unit = normalize(embeddings.float(), dim=1)
    nearest = (unit @ unit.T).fill_diagonal_(-2.0).argmax(dim=1).tolist()
    return sum(topics[i] == topics[j] for i, j in enumerate(nearest)) / len(topics)


def score(embed: Embed, *, languages: Sequence[str] | None = None, progress: bool = True) -> Scores:
    """Scores a system on the everyday set.

    Args:
        embed: Maps texts to (n, dim) embeddings.
        languages: Codes to score; all bundled ones when None. English is always embedded.
        progress: Whether to show a progress bar.

    Returns:
        ``{"translation_retrieval": {lang: accuracy}, "topic_retrieval": {lang: accuracy}}``,
        accuracies between 0 and 1; English has no translation score.

    Raises:
        LusiferError: If a language is not in the set.
    """
    data = load_everyday()
    chosen = list(languages or data.sentences)
    if unknown := [language for language in chosen if language not in data.sentences]:
        raise LusiferError(f"the bundled set has no language {unknown[0]!r}; it has {', '.join(data.sentences)}")
    english = embed(data.sentences["en"])
    scores: Scores = {"translation_retrieval": {}, "topic_retrieval": {}}
    for language in tqdm(chosen, desc="scoring languages", disable=not progress, leave=False):
        vectors = english if language == "en" else embed(data.sentences[language])
        if language != "en":
            scores["translation_retrieval"][language] = translation_accuracy(english, vectors)
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
    found = {}
    for number, code in enumerate(codes):
        if code == "en":
            continue
        rows = spoken == number
        english = similarity[rows][:, spoken == codes.index("en")]
        found[code] = {
            "same_language": float((spoken[nearest[rows]] == number).float().mean()),
            "alone": float((english.argmax(dim=1) == torch.arange(count)).float().mean()),
            "mixed": float((meaning[nearest[rows, 0]] == meaning[rows]).float().mean()),
        }
    return found


def embedder(model: SentenceTransformer) -> Embed:
    """An `Embed` from a Sentence Transformers model."""

    def embed(texts: Sequence[str]) -> Tensor:
        found: Any = model.encode(list(texts), convert_to_tensor=True, show_progress_bar=False, batch_size=64)
        return found.float().cpu()

    return embed


def encoder_alone(name: str, *, device: str = "cpu") -> tuple[Embed, int | None]:
    """The multilingual encoder by itself: its own sentence embedding if it has one, else the mean of its states.

    Args:
        name: Hub id, local folder or starter name.
        device: Torch device.

    Returns:
        From texts to (n, dim), and how many tokens it reads of a text, if there is a limit.

    Raises:
        LusiferError: If it cannot be loaded.
    """
    from lusifer.backbones import load_config, load_encoder, load_tokenizer

    config: Any = load_config("encoder", name)
    encoder = load_encoder(name, config).eval().to(torch.device(device))
    tokenizer = load_tokenizer("encoder", name)
    limits = [tokenizer.model_max_length]
    if (positions := getattr(config, "max_position_embeddings", None)) is not None:
        # RoBERTa and its kin count positions from behind the padding index.
        embeddings: Any = getattr(encoder, "embeddings", None)
        shifted = hasattr(embeddings, "create_position_ids_from_input_ids")
        limits.append(positions - (embeddings.padding_idx + 1 if shifted else 0))
    limit = min(limits) if min(limits) < 1_000_000 else None

    @torch.inference_mode()
    def embed(texts: Sequence[str]) -> Tensor:
        cut: dict[str, Any] = {} if limit is None else {"truncation": True, "max_length": limit}
        batch = tokenizer(list(texts), padding=True, return_tensors="pt", **cut).to(device)
        mask = batch["attention_mask"]
        output = encoder(input_ids=batch["input_ids"], attention_mask=mask)
        own = getattr(output, "pooler_output", None)
        if own is not None:
            return own
        weights = mask.unsqueeze(-1).to(output.last_hidden_state.dtype)
        return (output.last_hidden_state * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)

    return embed, limit


def mean_score(by_language: dict[str, float], languages: Sequence[str]) -> float:
    """Mean over those of the languages that are scored, English aside."""
    values = [by_language[language] for language in languages if language in by_language and language != "en"]
    return sum(values) / len(values) if values else float("nan")
