"""Trains multilingual-e5-small to hit the vectors of all-MiniLM-L6-v2 from English text, partly code-switched.

After LUSIFER (arXiv 2501.00874), which connects a multilingual encoder to an English model; the encoder is e5 (arXiv
2402.05672). ``python benchmarks/adapt/train.py OUT`` after prepare.py. The first run also computes OUT/start.pt: the
teacher's vectors, the dictionary and the closed form. Writes OUT/NAME.json and, in 4 bits, OUT/NAME.safetensors.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import LAYERS, WIDTH, Student, Texts, encode, evaluate, load_bert, mean_states, moments, pack, ridge, unpack
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from switching import Pairs, Switcher, match_scripts
from torch import Tensor
from torch.nn import functional as F
from transformers import BertModel

from lusifer.publishing import publish_file, write_json

LENGTHS = (16, 24, 32, 40, 48, 64, 96, 128, 192, 256, 288)  # of training batches
TEMPERATURE = 0.05
COSINE_WEIGHT = 5.0
WARM_UP = 0.03
OPTIONS = (
    ("layers", 6, "upper layers that are trainable"),
    ("rank", 0, "of LoRA; 0 trains all weights of the layers"),
    ("rate", 1e-4, "learning rate of the encoder"),
    ("head-rate", 1e-4, "of the linear map"),
    ("mlp-rate", 5e-4, "of the MLP beside it"),
    ("kl", 4.0, "weight of the neighbourhood term"),
    ("bank", 16384, "texts of the neighbourhood"),
    ("switched", 0.5, "share of code-switched texts"),
    ("tokens", 32768, "padded tokens of a batch"),
    ("seconds", 230.0, "of training"),
    ("steps", math.inf, "most steps"),
    ("seed", 0, "of the run; start.pt stays as it is"),
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def precision() -> torch.autocast:
    """bfloat16 on a GPU; float32 on a CPU."""
    return torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda")


def load_texts(folder: Path, name: str) -> tuple[Texts, dict[str, Tensor]]:
    """Texts as the encoder reads them, and the other columns, [texts]."""
    columns = {key: torch.from_numpy(value).to(DEVICE) for key, value in np.load(folder / f"{name}.npz").items()}
    return Texts(columns.pop("ids"), columns.pop("lengths"), columns.pop("words")), columns


def report(name: str, scores: dict[str, Any]) -> None:
    """Prints a row."""
    row = ", ".join(f"{key} {value:.2f}" for key, value in scores.items() if key != "languages")
    print(f"{name}: {row}", flush=True)


def build_dictionary(folder: Path, encoder: BertModel) -> dict[str, Pairs]:
    """Matches the vocabulary's foreign words with the texts' English ones, in the means of the last layer."""

    def last(ids: Tensor, mask: Tensor, _: Tensor) -> Tensor:
        return mean_states(encoder, ids, mask, LAYERS[-1:])

    words, _ = load_texts(folder, "words")
    prompt = words.ids[:4].tolist()  # <s> and the three tokens of "query:"
    pieces = json.loads((folder / "scripts.json").read_text())
    vectors = {}
    for script, ids in pieces.items():
        tokens = torch.tensor([[*prompt, piece, 2] for piece in ids], dtype=torch.int32, device=DEVICE).flatten()
        vectors[script] = encode(last, Texts(tokens, torch.full((len(ids),), 6, device=DEVICE), tokens * 0))
    return match_scripts(vectors, encode(last, words), pieces)


def closed_forms(folder: Path, targets: Tensor, switcher: Switcher, encoder: BertModel) -> dict[str, dict[str, Tensor]]:
    """Maps from mean states to the teacher's vectors [n, 384], learnt without and with switched copies."""
    texts, columns = load_texts(folder, "train")

    def sums(kind: Tensor, most: int, share: float) -> Tensor:
        rows = torch.nonzero(kind).flatten()
        total = torch.zeros((), dtype=torch.float64, device=DEVICE)
        for part in rows[torch.randperm(len(rows), device=DEVICE)[:most]].split(20_000):
            with precision():
                states = encode(lambda *batch: mean_states(encoder, *switcher(*batch, share)), texts, part)
            total = total + moments(states, targets[part].float())
        return total

    plain = sums(~columns["long"], 250_000, 0.0) + sums(columns["long"], 25_000, 0.0)
    both = plain + sums(~columns["long"], 200_000, 1.0)
    return {"last layer": ridge(both, WIDTH * (len(LAYERS) - 1)), "no copies": ridge(plain), "copies": ridge(both)}


def build_start(folder: Path, sets: dict[str, Any]) -> dict[str, Any]:
    """What every run starts from: teacher's vectors, dictionary, closed form; with the scores on the way."""
    teacher = SentenceTransformer(str(folder / "teacher"), device=DEVICE)
    encoder = load_bert(folder / "encoder", DEVICE)

    def embed(name: str) -> Tensor:
        texts = json.loads((folder / f"{name}-texts.json").read_text())
        return torch.from_numpy(teacher.encode(texts, batch_size=256, normalize_embeddings=True)).to(DEVICE)

    index, targets = embed("eval"), embed("train").half()
    dictionary = build_dictionary(folder, encoder)
    forms = closed_forms(folder, targets, Switcher(dictionary), encoder)
    states = encode(lambda ids, mask, _: mean_states(encoder, ids, mask), load_texts(folder, "eval")[0])
    space = F.normalize(states[:, -WIDTH:], dim=1)
    scores = {"MiniLM": evaluate(index, index, sets), "encoder's own space": evaluate(space, space, sets)}
    for name, form in forms.items():
        inputs = states[:, -form["matrix"].shape[1] :]
        vectors = F.normalize(F.linear(inputs, form["matrix"], form["bias"]), dim=1)
        scores[f"closed form, {name}"] = evaluate(vectors, index, sets)
    return {"targets": targets, "index": index, "dictionary": dictionary, "form": forms["copies"], "scores": scores}


class Buckets:
    """Draws batches of training texts of like length, a text by its weight."""

    def __init__(self, lengths: Tensor, weight: Tensor, tokens: int, seed: int) -> None:
        """Takes lengths and weights [n] and the padded tokens of a batch."""
        bucket = torch.bucketize(lengths, torch.tensor(LENGTHS, device=lengths.device))
        rows = {length: torch.nonzero(bucket == i).flatten() for i, length in enumerate(LENGTHS)}
        self.buckets = [(length, at, weight[at]) for length, at in rows.items() if len(at)]
        share = np.array([length * float(w.sum()) for length, _, w in self.buckets])
        self.share, self.tokens, self.random = share / share.sum(), tokens, np.random.default_rng(seed)

    def draw(self) -> tuple[Tensor, int]:
        """Rows of a batch, and the length they are padded to."""
        length, rows, weight = self.buckets[self.random.choice(len(self.buckets), p=self.share)]
        n = min(max(self.tokens // length, 32), 4 * len(rows))
        return rows[torch.multinomial(weight, n, replacement=True)], length


def loss_of(vectors: Tensor, targets: Tensor, bank: Tensor, weight: float) -> Tensor:
    """Distance of the student's vectors to the teacher's, both [B, 384], and ``weight`` times the neighbourhood term.

    That is how their similarities to the targets and to the ``bank`` [bank, 384] diverge from the teacher's.
    """
    known = torch.cat([targets, bank])
    wanted = F.softmax(targets @ known.T / TEMPERATURE, 1)
    got = F.log_softmax(vectors @ known.T / TEMPERATURE, 1)
    divergence = F.kl_div(got, wanted, reduction="batchmean")
    return COSINE_WEIGHT * (1 - (vectors * targets).sum(1).mean()) + weight * divergence


def make_optimizer(student: Student, args: argparse.Namespace) -> torch.optim.AdamW:
    """A group each for the encoder, the linear map and the MLP."""
    encoder = [p for p in student.encoder.parameters() if p.requires_grad]
    head = student.head
    mlp = [*head.up.parameters(), *head.down.parameters()]
    groups = [
        {"params": encoder, "peak": args.rate, "weight_decay": 0.0},
        {"params": [head.matrix, head.bias], "peak": args.head_rate, "weight_decay": 0.0},
        {"params": mlp, "peak": args.mlp_rate, "weight_decay": 0.01},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=DEVICE == "cuda")


def train(student: Student, folder: Path, start: dict[str, Any], args: argparse.Namespace) -> dict[str, float]:
    """Trains for a time or a number of steps, and returns steps, seconds and the last loss."""
    texts, columns = load_texts(folder, "train")
    switcher = Switcher(start["dictionary"])
    buckets = Buckets(texts.lengths, columns["weight"], args.tokens, args.seed)
    targets = start["targets"]
    shuffled = targets[torch.randperm(len(targets), device=DEVICE)]
    size = min(args.bank, len(targets))
    optimizer = make_optimizer(student, args)
    trainable = [p for group in optimizer.param_groups for p in group["params"]]
    torch.set_float32_matmul_precision("high")
    step, began = 0, time.monotonic()
    while (done := max((time.monotonic() - began) / args.seconds, step / args.steps)) < 1:
        factor = min(1.0, done / WARM_UP) * (0.5 * (1 + math.cos(math.pi * done)) * 0.98 + 0.02)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        rows, length = buckets.draw()
        ids, mask = switcher(*texts.batch(rows, length), args.switched)
        with precision():
            states = mean_states(student.encoder, ids, mask)
        vectors = F.normalize(student.head(states), dim=1)
        first = int(buckets.random.integers(len(targets) - size + 1))
        loss = loss_of(vectors, targets[rows].float(), shuffled[first : first + size].float(), args.kl)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 500 == 0:
            print(f"step {step}, {time.monotonic() - began:.0f} s, loss {loss.item():.4f}", flush=True)
    torch.set_float32_matmul_precision("highest")
    return {"steps": step, "loss": loss.item(), "seconds": time.monotonic() - began}


def options() -> argparse.Namespace:
    """The command line; the defaults are the last run of the log."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder prepare.py wrote")
    parser.add_argument("--name", default="run", help="of the files written")
    for name, value, what in OPTIONS:
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"{what} (%(default)s)")
    return parser.parse_args()


def main() -> None:
    """One run."""
    args = options()
    torch.manual_seed(args.seed)
    sets = json.loads((args.out / "eval.json").read_text())
    path = args.out / "start.pt"
    if not path.exists():
        start = build_start(args.out, sets)
        with publish_file(path) as file:
            torch.save(start, file)
    start = torch.load(path, map_location=DEVICE)
    for name, scores in start["scores"].items():
        report(name, scores)
    evaluation, _ = load_texts(args.out, "eval")
    student = Student(args.out / "encoder", start["form"], DEVICE, layers=args.layers, rank=args.rank)
    result: dict[str, Any] = train(student, args.out, start, args)
    scores = {"trained": evaluate(encode(student, evaluation), start["index"], sets)}
    stored = args.out / f"{args.name}.safetensors"
    with publish_file(stored) as file:
        save_file(pack(student.changes()), file)
    student = Student(args.out / "encoder", start["form"], DEVICE, layers=args.layers)
    student.restore(unpack(load_file(stored)))
    scores["4 bits"] = evaluate(encode(student, evaluation), start["index"], sets)
    for name, row in scores.items():
        report(name, row)
    config = {name: getattr(args, name.replace("-", "_")) for name, *_ in OPTIONS if name != "steps"}
    result |= {"device": DEVICE, "bytes": stored.stat().st_size, "config": config, "scores": start["scores"] | scores}
    write_json(args.out / f"{args.name}.json", result)


if __name__ == "__main__":
    main()
