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
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import gelu, normalize

from lusifer.adapt.closed_form import Moments
from lusifer.adapt.collect import prepare
from lusifer.adapt.student import Student
from lusifer.adapt.switching import Dictionary, Pairs, Switcher
from lusifer.adapt.texts import english_texts
from lusifer.adapt.tokens import tokenize
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


class Stored(NamedTuple):
    """Mean states of a run's texts, plain and switched, (texts, inputs) each, and the teacher's vectors of them."""

    plain: Tensor
    switched: Tensor
    targets: Tensor

    def of(self, rows: slice | list[int]) -> Stored:
        """Some of the texts."""
        return Stored(self.plain[rows], self.switched[rows], self.targets[rows])


def load_stored(work: Path, student: Student, dimension: int) -> Stored:
    """What a run keeps of the texts of its closed form."""
    ((name, _),) = load_file(work / "moments.safetensors").items()
    done, count = map(int, name.split("."))
    inputs = student.width * len(student.layers)
    states = np.fromfile(work / "states.f16", np.float16, 2 * count * inputs).astype(np.float32)
    targets = np.fromfile(work / "targets.f16", np.float16, count * dimension).astype(np.float32)
    print(f"{count:,} texts of {done:,}")
    plain, switched = torch.from_numpy(states.reshape(count, 2, inputs)).unbind(1)
    return Stored(plain, switched, torch.from_numpy(targets.reshape(count, dimension)))


def ridge(data: Stored, *, last: int = 0, copies: bool = True) -> Map:
    """The closed form at penalty 0.03, of the ``last`` inputs (all when 0), with or without switched copies."""
    moments = Moments(data.plain.shape[1], data.targets.shape[1])
    for states in (data.plain, data.switched) if copies else (data.plain,):
        moments.add(states, data.targets)
    columns = torch.arange(moments.inputs)[-last:]
    form = moments.solve(columns, 0.03)
    return lambda x: form(x[:, columns])


def peers(data: Stored, width: int) -> Iterator[tuple[str, Map]]:
    """Drift-Adapter's forms, on the last layer of plain English."""
    states, targets = data.plain[:, -width:], data.targets
    network = Residual(width, targets.shape[1], 512, zero=False)
    forms = {
        "Procrustes": procrustes(states, targets),
        "low-rank affine": low_rank(states, targets),
        "residual MLP": trained(network, states, targets, start=None),
    }
    for name, form in forms.items():
        yield f"Drift-Adapter: {name}", lambda x, form=form: form(x[:, -width:])


def parts(data: Stored, student: Student, dictionary: Path) -> Iterator[tuple[str, Map]]:
    """The closed form, and what each of its parts is worth."""
    width, corpus = student.width, english_texts(())
    yield "closed form, last layer", ridge(data, last=width, copies=False)
    yield "closed form, four layers", ridge(data, copies=False)
    yield "closed form, last layer, switched copies", ridge(data, last=width)
    yield "closed form, four layers, switched copies", (both := ridge(data))
    for count in (1_000, 2_000, 4_000):
        yield f"the same, {count:,} texts", ridge(data.of(slice(count)))
    count = len(data.plain)
    for kind, rows in kinds(corpus.train[:count]).items():
        yield f"the same, {len(rows):,} {kind}", ridge(data.of(rows))
    roles = ["query"] * (len(corpus.train) + len(corpus.held_out))
    texts = prepare(student, corpus.train, corpus.held_out, roles).train.next(count)
    for share in (0.3, 1.0):
        options = {"switcher": Switcher(noisy(dictionary, share), student.device)}
        states = student.states(texts, torch.arange(count), **options, generator=torch.Generator().manual_seed(0))
        yield f"the same, {share:.0%} of the dictionary wrong", ridge(data._replace(switched=states))
    network = Residual(data.plain.shape[1], data.targets.shape[1], 512, zero=True)
    states, targets = torch.cat([data.plain, data.switched]), torch.cat([data.targets, data.targets])
    yield "closed form, four layers, switched copies, MLP", trained(network, states, targets, start=both, epochs=6)


def starters(evaluation: Path) -> tuple[Student, Teacher, Sets]:
    """The starter's encoder and teacher, both frozen, and the sets that are scored."""
    student = Student("starter:multilingual-e5-small", asymmetric=False, device="cpu")
    student.bfloat16 = True
    teacher = Teacher("starter:all-minilm-l6-v2", device="cpu")
    return student, teacher, Sets(evaluation, student, teacher)


def main() -> None:
    """Reads the command line, computes the rows and prints them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    student, _, sets = starters(args.eval)
    data = load_stored(args.work, student, sets.contexts.shape[1])
    rows: dict[str, dict[str, float]] = {}
    for name, form in chain(peers(data, student.width), parts(data, student, args.work / "dictionary.safetensors")):
        rows[name] = sets.score(form)
        print(name, json.dumps(rows[name]), flush=True)
    if args.plot:
        plot(rows, args.plot)
    if args.out:
        write_json(args.out, {"texts": len(data.plain), "rows": rows})


if __name__ == "__main__":
    main()
