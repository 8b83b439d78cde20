"""Why a language fails: encoder, connector or LLM, from parallel sentences and the tokenizers.

At each point of the model (encoder states, connector, every LLM layer, embedding) a sentence is the mean of its states:

* **accuracy**: a sentence finds its English translation and is found by it, hubness corrected (CSLS, arXiv 1710.04087).
* **CKA**: linear centred kernel alignment with English (arXiv 1905.00414), 1 for the same geometry.
* **anisotropy**: mean cosine of two different sentences; near 1, all directions are alike.

The tokenizers tell how many pieces a sentence has against English, and how many are unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn.functional import normalize

from lusifer.data.everyday_set import load_everyday
from lusifer.errors import LusiferError
from lusifer.model.sentence_transformer import lusifer_model

_NEIGHBOURS = 5
_KNOWN, _LOSS = 0.5, 0.15  # Accuracy of an encoder that knows the language; a drop that matters.


@dataclass(frozen=True)
class Point:
    """What is measured at one point of the model: ``encoder``, ``connector``, ``LLM layer N`` or ``embedding``.

    Attributes:
        accuracy: CSLS accuracy against English, both directions averaged, between 0 and 1.
        cka: Linear CKA with English, between 0 and 1.
        anisotropy: Mean cosine of two different sentences of the language.
    """

    name: str
    accuracy: float
    cka: float
    anisotropy: float


def csls_accuracy(ours: Tensor, theirs: Tensor) -> float:
    """Share of rows whose counterpart is the nearest under CSLS, both directions averaged.

    Args:
        ours: (n, dim).
        theirs: (n, dim), row i the translation of row i.
    """
    cosine = normalize(ours.float(), dim=1) @ normalize(theirs.float(), dim=1).T
    count = min(_NEIGHBOURS, len(cosine))
    # A text near everything is nobody's translation.
    scores = (
        2 * cosine
        - cosine.topk(count, dim=1).values.mean(dim=1, keepdim=True)
        - cosine.topk(count, dim=0).values.mean(dim=0, keepdim=True)
    )
    rows = torch.arange(len(scores))
    hits = (scores.argmax(dim=1) == rows).float().mean() + (scores.argmax(dim=0) == rows).float().mean()
    return float(hits) / 2


def linear_cka(ours: Tensor, theirs: Tensor) -> float:
    """Linear centred kernel alignment of the same n rows, as (n, dim) and as (n, other_dim)."""
    x, y = (t.double() - t.double().mean(dim=0) for t in (ours, theirs))
    shared = (x.T @ y).square().sum()
    return float(shared / ((x.T @ x).norm() * (y.T @ y).norm()).clamp(min=1e-12))


def anisotropy(vectors: Tensor) -> float:
    """Mean cosine of two different rows of (n, dim)."""
    unit = normalize(vectors.float(), dim=1)
    count = len(unit)
    return float(((unit @ unit.T).sum() - count) / (count * (count - 1)))


@torch.inference_mode()
def mean_states(model: SentenceTransformer, texts: Sequence[str]) -> dict[str, Tensor]:
    """The mean state of each text at every point, as point to (n, width) float32.

    Args:
        model: A LUSIFER model.
        texts: n texts; each runs alone, so that no padding is in the way.
    """
    inner: Any = lusifer_model(model)
    means: dict[str, list[Tensor]] = {}

    def keep(name: str, module: Any, inputs: Any, output: Any) -> None:
        value = output if torch.is_tensor(output) else getattr(output, "last_hidden_state", None)
        means.setdefault(name, []).append((output[0] if value is None else value).float().mean(dim=1))

    parts = {"encoder": inner.encoder, "connector": inner.connector}
    parts |= {f"LLM layer {n}": layer for n, layer in enumerate(inner.llm.layers, 1)}
    hooks = [part.register_forward_hook(partial(keep, name)) for name, part in parts.items()]
    try:
        for text in texts:
            vector: Any = model.encode([text], convert_to_tensor=True, show_progress_bar=False)
            means.setdefault("embedding", []).append(vector.float())
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(means[name]).cpu() for name in (*parts, "embedding")}


def pieces(tokenizer: Any, texts: Sequence[str]) -> tuple[float, float]:
    """Mean number of tokens of a text, and the share of unknown ones."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    total = sum(len(row) for row in ids)
    unknown = sum(row.count(tokenizer.unk_token_id) for row in ids) if tokenizer.unk_token_id is not None else 0
    return total / len(texts), unknown / max(total, 1)


def verdict(points: Sequence[Point], unknown: float) -> tuple[str, str]:
    """The weak part and why, in words: ``encoder``, ``connector``, ``llm`` or ``none``."""
    by_name = {point.name: point for point in points}
    encoder, connector, end = (by_name[name].accuracy for name in ("encoder", "connector", "embedding"))
    if encoder < _KNOWN:
        why = f"its states find {100 * encoder:.0f} % of the translations"
        if unknown > 0.1:
            why += f", and {100 * unknown:.0f} % of its tokens are unknown"
        return "encoder", f"the encoder does not know this language: {why}. Choose another encoder"
    drops = {"connector": encoder - connector, "llm": connector - end}
    worst = max(drops, key=lambda part: drops[part])
    if drops[worst] < _LOSS:
        return "none", "no part loses much: what is missing, the encoder does not have"
    if worst == "connector":
        return "connector", (
            f"the connector loses {100 * drops[worst]:.0f} points: a flatter warm_start.spectrum, or distill in stage 2"
        )
    layers = [point for point in points if point.name.startswith("LLM layer")]
    steps = zip([by_name["connector"], *layers], layers, strict=False)
    at = max(steps, key=lambda pair: pair[0].accuracy - pair[1].accuracy)[1].name
    return "llm", f"the LLM loses {100 * drops[worst]:.0f} points, most at {at}: train stage 2 longer, or distill"


def diagnose(model: SentenceTransformer, language: str, llm_tokenizer: Any = None) -> dict[str, Any]:
    """What fails for a language, on the bundled everyday sentences.

    Args:
        model: A LUSIFER model.
        language: Code of a bundled language other than English.
        llm_tokenizer: The LLM's tokenizer, to say what the language would cost there.

    Returns:
        ``points`` in order, ``tokens`` by tokenizer (mean per sentence, ratio to English, share unknown), ``weak`` and
        ``why``.

    Raises:
        LusiferError: If the language is not bundled, or the model is no LUSIFER model.
    """
    sentences = load_everyday().sentences
    if language not in sentences or language == "en":
        others = ", ".join(code for code in sentences if code != "en")
        raise LusiferError(f"no sentences in {language!r}; there are {others}")
    english, ours = (mean_states(model, sentences[code]) for code in ("en", language))
    points = [
        Point(name, csls_accuracy(ours[name], states), linear_cka(ours[name], states), anisotropy(ours[name]))
        for name, states in english.items()
    ]
    tokens = {}
    for part, tokenizer in (("encoder", model.tokenizer), ("llm", llm_tokenizer)):
        if tokenizer is not None:
            (count, unknown), (base, _) = pieces(tokenizer, sentences[language]), pieces(tokenizer, sentences["en"])
            tokens[part] = {"per sentence": count, "times English": count / base, "unknown": unknown}
    weak, why = verdict(points, tokens["encoder"]["unknown"])
    facts = [{"point": p.name, "accuracy": p.accuracy, "cka": p.cka, "anisotropy": p.anisotropy} for p in points]
    return {"language": language, "points": facts, "tokens": tokens, "weak": weak, "why": why}
