"""Scores a model as the query side of an index that another model filled, on Tatoeba, XQuAD and STSb.

``python benchmarks/adapt/score.py MODEL --teacher TEACHER --eval DIR [--own]``. EVAL holds ``tatoeba``, ``xquad`` and
``stsb_multi_mt`` as Parquet. The index holds English sentences (Tatoeba, the first 500 pairs of a language) or English
contexts (XQuAD) embedded by TEACHER; every query is MODEL's. ``--own`` lets MODEL fill the index itself. Prints one
JSON object; writes it to ``--out``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from lusifer.data.prompts import prompt_for
from lusifer.loading import resolve
from lusifer.model.text_encoder import FastSentenceTransformer, TextEncoder, set_precision
from lusifer.publishing import write_json

THIRTEEN = ("spa", "rus", "fra", "vie", "pes", "ind", "ara", "fin", "kor", "hin", "ben", "tel", "swh")
DEVELOPMENT = ("deu", "cmn", "jpn")  # Not among the thirteen: choose by these.
SEVEN = ("es", "ru", "ar", "de", "hi", "vi", "zh")


class Embedder:
    """A model as a function from texts of a role to unit vectors; a text is embedded once."""

    def __init__(self, name: str, precision: str) -> None:
        self.model = FastSentenceTransformer(resolve(name))
        set_precision(self.model, precision)
        self.encoder = TextEncoder(self.model)

    def __call__(self, texts: list[str], role: str) -> np.ndarray:
        """(n, dim) float32 unit vectors."""
        once = list(dict.fromkeys(texts))
        prompt = prompt_for(self.model, role)
        vectors = self.encoder.encode([prompt + text for text in once])
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        place = {text: row for row, text in enumerate(once)}
        return vectors[[place[text] for text in texts]]


def tatoeba(folder: Path, query: Embedder, index: Embedder, languages: tuple[str, ...]) -> dict[str, float]:
    """Accuracy by language: a foreign sentence finds its English translation among those of its language."""
    table = pd.read_parquet(folder / "tatoeba/default/test.parquet")
    scores = {}
    for language, pairs in table.groupby("lang"):
        pairs, code = pairs[:500], str(language)[:3]
        if code in languages:
            similar = query(list(pairs.sentence1), "query") @ index(list(pairs.sentence2), "document").T
            scores[code] = 100 * float((similar.argmax(1) == np.arange(len(pairs))).mean())
    return scores


def xquad(folder: Path, query: Embedder, index: Embedder) -> dict[str, float]:
    """nDCG@10 by language: a question finds the English context that answers it."""
    corpus = pd.read_parquet(folder / "xquad/en-corpus/validation.parquet")
    contexts = [f"{title} {text}".strip() for title, text in zip(corpus.title.fillna(""), corpus.text, strict=True)]
    vectors, place = index(contexts, "document"), {name: row for row, name in enumerate(corpus.id)}
    scores = {}
    for language in ("en", *SEVEN):
        queries = pd.read_parquet(folder / f"xquad/{language}-queries/validation.parquet")
        judged = pd.read_parquet(folder / f"xquad/{language}-qrels/validation.parquet")
        gold = dict(zip(judged["query-id"], judged["corpus-id"], strict=True))
        queries = queries[queries.id.map(gold).isin(place)]
        similar = query(list(queries.text), "query") @ vectors.T
        right = similar[np.arange(len(queries)), [place[gold[name]] for name in queries.id]]
        rank = (similar > right[:, None]).sum(1)
        scores[language] = 100 * float(np.where(rank < 10, 1 / np.log2(rank + 2.0), 0).mean())
    return scores


def sts(folder: Path, query: Embedder) -> float:
    """Spearman correlation of English STSb's test pairs, all by the same model."""
    pairs = pd.read_parquet(folder / "stsb_multi_mt/default/test.parquet").query("lang == 'en'")
    cosine = (query(list(pairs.sentence1), "query") * query(list(pairs.sentence2), "query")).sum(1)
    return 100 * float(spearmanr(cosine, pairs.similarity_score).statistic)


def main() -> None:
    """Reads the command line and prints the scores."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--teacher", default="starter:all-minilm-l6-v2")
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--own", action="store_true", help="MODEL fills the index too")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--quick", action="store_true", help="Tatoeba in the three development languages alone")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    query = Embedder(args.model, args.precision)
    index = query if args.own else Embedder(args.teacher, "float32")
    chosen = DEVELOPMENT if args.quick else (*THIRTEEN, *DEVELOPMENT)
    by_language = {"tatoeba": tatoeba(args.eval, query, index, chosen)}
    scores = {"development": fmean(by_language["tatoeba"][code] for code in DEVELOPMENT)}
    if not args.quick:
        by_language["xquad"] = xquad(args.eval, query, index)
        scores["tatoeba"] = fmean(by_language["tatoeba"][code] for code in THIRTEEN)
        scores["xquad"] = fmean(by_language["xquad"][code] for code in SEVEN)
        scores |= {"english": by_language["xquad"]["en"], "stsb": sts(args.eval, query)}
    result = {name: round(score, 2) for name, score in scores.items()} | {"languages": by_language}
    print(json.dumps(result))
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
