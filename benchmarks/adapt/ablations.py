"""What each part of the closed form is worth, and the forms of Drift-Adapter beside it, on a run's stored states.

``python benchmarks/adapt/ablations.py RUN/work --eval DIR [--out FILE]`` after ``lusifer adapt
starter:all-minilm-l6-v2 RUN``. The encoder stays frozen. Scores: Tatoeba (first 200 pairs of de zh ja te sw ar fi ru)
and XQuAD (first 300 questions of es hi zh; and of en), the index being MiniLM's.

Drift-Adapter (arXiv 2509.23471, section 3) maps one vector to another: by an
orthogonal matrix, an affine map of low rank, or a residual MLP; here from the encoder's own vector, on plain English.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import gelu, normalize

from lusifer.adapt.closed_form import Moments
from lusifer.adapt.student import Student
from lusifer.adapt.switching import Dictionary, Pairs, Switcher
from lusifer.adapt.texts import english_texts
from lusifer.adapt.tokens import count_words, tokenize
from lusifer.publishing import write_json
from lusifer.teacher.embedder import Teacher
from lusifer.teacher.loss import teacher_loss

TATOEBA = ("deu", "cmn", "jpn", "tel", "swh", "ara", "fin", "rus")
XQUAD = ("en", "es", "hi", "zh")
PAIRS, QUESTIONS = 200, 300
RANK = 64
Map = Callable[[Tensor], Tensor]


class Sets:
    """Mean states of the queries and the teacher's vectors of what they look for."""

    def __init__(self, folder: Path, student: Student, teacher: Teacher) -> None:
        self.tatoeba, self.xquad = {}, {}
        table = pd.read_parquet(folder / "tatoeba/default/test.parquet")
        for language, pairs in table.groupby("lang"):
            pairs, code = pairs[:PAIRS], str(language)[:3]
            if code in TATOEBA:
                index = torch.from_numpy(teacher.encode(list(pairs.sentence2), ["document"] * len(pairs)))
                self.tatoeba[code] = (self._states(student, list(pairs.sentence1)), index)
        corpus = pd.read_parquet(folder / "xquad/en-corpus/validation.parquet")
        contexts = [f"{title} {text}".strip() for title, text in zip(corpus.title.fillna(""), corpus.text, strict=True)]
        self.contexts = torch.from_numpy(teacher.encode(contexts, ["document"] * len(contexts)))
        place = {name: row for row, name in enumerate(corpus.id)}
        for language in XQUAD:
            asked = pd.read_parquet(folder / f"xquad/{language}-queries/validation.parquet")[:QUESTIONS]
            judged = pd.read_parquet(folder / f"xquad/{language}-qrels/validation.parquet")
            gold = dict(zip(judged["query-id"], judged["corpus-id"], strict=True))
            rows = torch.tensor([place[gold[name]] for name in asked.id])
            self.xquad[language] = (self._states(student, list(asked.text)), rows)

    @staticmethod
    def _states(student: Student, texts: list[str]) -> Tensor:
        prompts = [student.prompts["query"]] * len(texts)
        tokens = tokenize(student.tokenizer, texts, prompts, [], max_length=student.longest)
        return student.states(tokens, torch.arange(len(texts)))

    def score(self, form: Map) -> dict[str, float]:
        """Accuracy, nDCG@10 and that of English questions, in per cent."""
        found = [
            float(((form(states) @ index.T).argmax(1) == torch.arange(len(index))).float().mean())
            for states, index in self.tatoeba.values()
        ]
        ndcg = {}
        for language, (states, gold) in self.xquad.items():
            similar = form(states) @ self.contexts.T
            rank = (similar > similar.gather(1, gold[:, None])).sum(1)
            ndcg[language] = float(torch.where(rank < 10, 1 / torch.log2(rank + 2.0), 0.0).mean())
        foreign = fmean(score for language, score in ndcg.items() if language != "en")
        row = {"tatoeba": fmean(found), "xquad": foreign, "english": ndcg["en"]}
        return {name: round(100 * value, 1) for name, value in row.items()}


def procrustes(states: Tensor, targets: Tensor) -> Map:
    """An orthogonal matrix between centred vectors of length 1."""
    unit = normalize(states, dim=1)
    mean, goal = unit.mean(0), targets.mean(0)
    u, _, v = torch.linalg.svd((unit - mean).T @ (targets - goal))
    return lambda x: normalize((normalize(x, dim=1) - mean) @ u @ v + goal, dim=1)


def low_rank(states: Tensor, targets: Tensor) -> Map:
    """An affine map whose matrix has rank 64: the ridge regression's, cut."""
    moments = Moments(states.shape[1], targets.shape[1])
    moments.add(normalize(states, dim=1), targets)
    form = moments.solve(torch.arange(states.shape[1]), 0.01)
    u, s, v = torch.linalg.svd(form.matrix)
    matrix = (u[:, :RANK] * s[:RANK]) @ v[:RANK]
    bias = form.bias + (form.matrix - matrix) @ form.mean
    return lambda x: normalize(normalize(x, dim=1) @ matrix.T + bias, dim=1)


def trained(network: nn.Module, states: Tensor, targets: Tensor, *, start: Map | None, epochs: int = 12) -> Map:
    """A network trained towards the teacher, alone or beside a fixed map."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-4, weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    mean, deviation = states.mean(0), states.std(0) + 1e-4

    def form(x: Tensor) -> Tensor:
        change = network((x - mean) / deviation)
        return normalize(change if start is None else start(x) + change, dim=1)

    for _ in range(epochs):
        for rows in torch.randperm(len(states), generator=generator).split(512):
            loss = teacher_loss(form(states[rows]), targets[rows], targets[:2048])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return torch.no_grad()(form)


def kinds(texts: list[str]) -> dict[str, list[int]]:
    """Rows of questions, of sentences up to 12 words, and of longer texts, as many of each."""
    rows: dict[str, list[int]] = {"questions": [], "short sentences": [], "longer texts": []}
    for row, text in enumerate(texts):
        short = "short sentences" if len(text.split()) <= 12 else "longer texts"
        rows["questions" if text.endswith("?") else short].append(row)
    least = min(map(len, rows.values()))
    return {kind: chosen[:least] for kind, chosen in rows.items()}


def noisy(path: Path, share: float) -> Dictionary:
    """A run's dictionary with the pieces of a share of its pairs dealt out anew, within each script."""
    tensors, generator, dictionary = load_file(path), torch.Generator().manual_seed(0), {}
    for script in sorted({name.rpartition(".")[0] for name in tensors}):
        words, pieces = tensors[f"{script}.words"], tensors[f"{script}.pieces"].clone()
        chosen = torch.rand(len(pieces), generator=generator) < share
        wrong = pieces[chosen]
        pieces[chosen] = wrong[torch.randperm(len(wrong), generator=generator)]
        dictionary[script] = Pairs(words, pieces)
    return dictionary


class Residual(nn.Module):
    """x plus a two-layer network of it, and a linear map where the widths differ."""

    def __init__(self, inputs: int, outputs: int, hidden: int, *, zero: bool) -> None:
        super().__init__()
        self.skip = None if zero else nn.Linear(inputs, outputs)
        self.up, self.down = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs) to (n, outputs)."""
        change = self.down(gelu(self.up(x)))
        return change if self.skip is None else self.skip(x) + change


def plot(rows: dict[str, dict[str, float]], path: Path) -> None:
    """Draws Tatoeba and XQuAD of each row as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.45 * len(rows) + 1.2), layout="constrained")
    for shift, (name, colour, hatch) in enumerate((("tatoeba", "#0072B2", ""), ("xquad", "#E69F00", "///"))):
        places = [place + 0.4 * shift for place in range(len(rows))]
        values = [row[name] for row in rows.values()]
        label = {"tatoeba": "Tatoeba, accuracy", "xquad": "XQuAD, nDCG@10"}[name]
        bars = axes.barh(places, values, 0.38, color=colour, hatch=hatch, label=label)
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axes.set_yticks([place + 0.2 for place in range(len(rows))], list(rows), fontsize=9)
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="%", title="Foreign queries on MiniLM's English index")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Reads the command line, computes the rows and prints them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    student = Student("starter:multilingual-e5-small", asymmetric=False, device="cpu")
    student.bfloat16 = True
    sets = Sets(args.eval, student, Teacher("starter:all-minilm-l6-v2", device="cpu"))
    ((name, _),) = load_file(args.work / "moments.safetensors").items()
    done, stored = map(int, name.split("."))
    width, inputs = student.width, student.width * len(student.layers)
    size = args.work.joinpath("states.f16").stat().st_size // (2 * inputs)
    states = np.memmap(args.work / "states.f16", np.float16, "r", shape=(size, inputs))[: 2 * stored]
    flat = torch.from_numpy(states.astype(np.float32)).unflatten(0, (-1, 2))
    total = args.work.joinpath("targets.f16").stat().st_size // (2 * sets.contexts.shape[1])
    goals = np.memmap(args.work / "targets.f16", np.float16, "r", shape=(total, sets.contexts.shape[1]))[:stored]
    targets, last = torch.from_numpy(goals.astype(np.float32)), slice(inputs - width, inputs)
    print(f"{stored:,} texts of {done:,}")
    rows: dict[str, dict[str, float]] = {}

    def row(what: str, form: Map) -> None:
        rows[what] = sets.score(form)
        print(what, json.dumps(rows[what]), flush=True)

    def ridge(count: int, columns: Tensor, *, copies: bool) -> Map:
        moments = Moments(inputs, targets.shape[1])
        for kind in (0, 1) if copies else (0,):
            moments.add(flat[:count, kind], targets[:count])
        form = moments.solve(columns, 0.03)
        return lambda x: form(x[:, columns])

    plain, every = flat[:, 0], torch.arange(inputs)
    for what, form in (("Procrustes", procrustes), ("low-rank affine", low_rank)):
        inner = form(plain[:, last], targets)
        row(f"Drift-Adapter: {what}", lambda x, inner=inner: inner(x[:, last]))
    peer = trained(Residual(width, targets.shape[1], 512, zero=False), plain[:, last], targets, start=None)
    row("Drift-Adapter: residual MLP", lambda x: peer(x[:, last]))
    row("closed form, last layer", ridge(stored, every[last], copies=False))
    row("closed form, four layers", ridge(stored, every, copies=False))
    row("closed form, last layer, switched copies", ridge(stored, every[last], copies=True))
    both = ridge(stored, every, copies=True)
    row("closed form, four layers, switched copies", both)
    for count in (1_000, 2_000, 4_000):
        row(f"the same, {count:,} texts", ridge(count, every, copies=True))
    texts = english_texts(()).train[:stored]
    for kind, chosen in kinds(texts).items():
        moments = Moments(inputs, targets.shape[1])
        for copy in (0, 1):
            moments.add(flat[chosen, copy], targets[chosen])
        row(f"the same, {len(chosen):,} {kind}", moments.solve(every, 0.03))
    prompts, words = [student.prompts["query"]] * stored, count_words(english_texts(()).train, least=3)[:20_000]
    tokens = tokenize(student.tokenizer, texts, prompts, words, max_length=student.longest)
    for share in (0.3, 1.0):
        moments = Moments(inputs, targets.shape[1])
        moments.add(plain, targets)
        switcher = Switcher(noisy(args.work / "dictionary.safetensors", share), student.device)
        generator = torch.Generator().manual_seed(0)
        moments.add(student.states(tokens, torch.arange(stored), switcher=switcher, generator=generator), targets)
        row(f"the same, {share:.0%} of the dictionary wrong", moments.solve(every, 0.03))
    order = torch.cat([flat[:, 0], flat[:, 1]]), torch.cat([targets, targets])
    mlp = Residual(inputs, targets.shape[1], 512, zero=True)
    row("closed form, four layers, switched copies, MLP", trained(mlp, *order, start=both, epochs=6))
    if args.plot:
        plot(rows, args.plot)
    if args.out:
        write_json(args.out, {"texts": stored, "rows": rows})


if __name__ == "__main__":
    main()
