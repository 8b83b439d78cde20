"""Encoder and teacher on token arrays: means of their layers, the closed form, the student, its scores and storage."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from transformers import BertModel

LAYERS = (6, 8, 10, 12)  # whose means the head reads
WIDTH = 384  # of a layer of the encoder, and of the teacher's vectors
HIDDEN = 2048  # width of the head's MLP
SCALE_BLOCK = 32
DEVELOPMENT = ("deu", "cmn", "jpn")  # choose configurations by these
THIRTEEN = ("spa", "rus", "fra", "vie", "pes", "ind", "ara", "fin", "kor", "hin", "ben", "tel", "swh")
SEVEN = ("es", "ru", "ar", "de", "hi", "vi", "zh")
Batch = tuple[Tensor, Tensor, Tensor]


class Texts:
    """Token ids of texts, end to end, with the word each token belongs to."""

    def __init__(self, ids: Tensor, lengths: Tensor, words: Tensor) -> None:
        """Takes ids and words [tokens] and lengths [texts]."""
        self.ids, self.words, self.lengths = ids, words, lengths
        self.start = torch.cumsum(lengths, 0) - lengths

    def batch(self, index: Tensor, length: int) -> Batch:
        """Ids, mask (True at tokens) and words of some texts, all [len(index), length]."""
        place = torch.arange(length, device=self.ids.device)
        mask = place < self.lengths[index, None]
        at = torch.where(mask, self.start[index, None] + place, 0)
        return torch.where(mask, self.ids[at], 1), mask, torch.where(mask, self.words[at], 0)


@torch.no_grad()
def encode(function: Callable[..., Tensor], texts: Texts, index: Tensor | None = None, budget: int = 16384) -> Tensor:
    """Results of ``function(ids, mask, words)`` [len(index), d], over batches of like length.

    Args:
        function: From a batch of B texts to [B, d].
        texts: All texts.
        index: Those to encode; all when None.
        budget: Most padded tokens of a batch.
    """
    index = torch.arange(len(texts.lengths), device=texts.ids.device) if index is None else index
    order = torch.argsort(texts.lengths[index])
    padded = (-(texts.lengths[index][order] // -8) * 8).tolist()
    parts, start = [], 0
    while start < len(order):
        most = min(len(order), start + max(1, budget // padded[start]))
        stop = min(most, start + max(1, budget // padded[most - 1]))
        parts.append(function(*texts.batch(index[order[start:stop]], padded[stop - 1])))
        start = stop
    return torch.cat(parts)[torch.argsort(order)]


def load_bert(folder: Path, device: str) -> BertModel:
    """A frozen BERT without a pooler."""
    model = BertModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32)
    return model.eval().requires_grad_(False).to(device)


def mean_states(model: BertModel, ids: Tensor, mask: Tensor, layers: tuple[int, ...] = LAYERS) -> Tensor:
    """Means over the tokens [B, L] of some layers' states, side by side, float32: [B, 384 x layers]."""
    states = model(input_ids=ids.long(), attention_mask=mask.long(), output_hidden_states=True).hidden_states
    part = (mask / mask.sum(1, keepdim=True)).unsqueeze(-1)
    return torch.cat([(states[layer].float() * part).sum(1) for layer in layers], 1)


def moments(states: Tensor, targets: Tensor) -> Tensor:
    """Sums of products of [states, targets, 1], rows of [n, inputs] and [n, 384], in float64."""
    rows = torch.cat([states, targets, torch.ones_like(targets[:, :1])], 1).double()
    return rows.T @ rows


def ridge(sums: Tensor, first: int = 0, penalty: float = 0.01) -> dict[str, Tensor]:
    """Ridge regression of the targets on the inputs, the states from column ``first`` on.

    Returns:
        matrix [384, inputs], bias [384]; mean and deviation of the inputs.
    """
    means = sums[-1] / sums[-1, -1]
    spread = sums / sums[-1, -1] - means[:, None] * means
    inputs, outputs = slice(first, -WIDTH - 1), slice(-WIDTH - 1, -1)
    square, variance = spread[inputs, inputs].clone(), spread.diagonal()[inputs]
    square += penalty * variance.mean() * torch.eye(len(square)).to(square)
    matrix = torch.linalg.solve(square, spread[inputs, outputs]).T
    form = {"matrix": matrix, "bias": means[outputs] - matrix @ means[inputs]}
    form |= {"mean": means[inputs], "deviation": variance.clamp_min(1e-8).sqrt()}
    return {name: value.float() for name, value in form.items()}


class Head(nn.Module):
    """The closed-form map, and beside it an MLP of the standardised inputs that starts at zero."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, form: dict[str, Tensor]) -> None:
        """Takes what ``ridge`` returns."""
        super().__init__()
        outputs, inputs = form["matrix"].shape
        self.matrix, self.bias = (nn.Parameter(form[name].clone()) for name in ("matrix", "bias"))
        self.register_buffer("mean", form["mean"].clone())
        self.register_buffer("deviation", form["deviation"].clone())
        self.up = nn.Linear(inputs, HIDDEN)
        self.down = nn.Linear(HIDDEN, outputs, bias=False)
        nn.init.normal_(self.up.weight, std=1 / math.sqrt(inputs))
        nn.init.zeros_(self.up.bias)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        """From mean states [B, inputs] to vectors [B, outputs]."""
        return F.linear(x, self.matrix, self.bias) + self.down(F.gelu(self.up((x - self.mean) / self.deviation)))


class LowRank(nn.Module):
    """Adds a product of two small matrices to a weight (LoRA, arXiv 2106.09685, scale 1)."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        """Starts at zero for a weight [outputs, inputs]."""
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, weight.shape[1], device=weight.device) / math.sqrt(weight.shape[1]))
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weight [outputs, inputs]."""
        return weight + self.b @ self.a


class Student(nn.Module):
    """The encoder, of which the upper layers are trainable, and the head."""

    def __init__(self, folder: Path, form: dict[str, Tensor], device: str, *, layers: int, rank: int = 0) -> None:
        """Loads the encoder and starts the head from a closed form.

        Args:
            folder: The encoder.
            form: What ``ridge`` returns.
            device: Where to compute.
            layers: Upper layers that are trainable.
            rank: Of what is added to their matrices; 0 trains the matrices themselves.
        """
        super().__init__()
        self.encoder, self.head = load_bert(folder, device), Head(form).to(device)
        upper = self.encoder.encoder.layer[self.encoder.config.num_hidden_layers - layers :]
        upper.requires_grad_(True)
        names = {id(p): name for name, p in self.encoder.named_parameters()}
        self.base = {names[id(p)]: p.detach().clone() for p in upper.parameters()}
        for module in list(upper.modules()) if rank else ():
            if isinstance(module, nn.Linear):
                module.weight.requires_grad_(False)
                parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank))

    def forward(self, ids: Tensor, mask: Tensor, words: Tensor | None = None) -> Tensor:
        """Vectors of length 1 [B, 384] of tokens [B, L]; ``words`` is not read."""
        return F.normalize(self.head(mean_states(self.encoder, ids, mask)), dim=1)

    def changes(self) -> dict[str, Tensor]:
        """What training added to the encoder's weights, and the head, in float16."""
        tensors = {f"encoder.{name}": self._weight(name) - base for name, base in self.base.items()}
        tensors |= {f"head.{name}": value for name, value in self.head.state_dict().items()}
        return {name: value.detach().half().cpu().contiguous() for name, value in tensors.items()}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes what ``changes`` returned of a student with the same layers; this one has no ``rank``."""
        for name, base in self.base.items():
            self._weight(name).copy_(base + tensors[f"encoder.{name}"].to(base))
        self.head.load_state_dict({name: tensors[f"head.{name}"].float() for name in self.head.state_dict()})

    def _weight(self, name: str) -> Tensor:
        module, _, kind = name.rpartition(".")
        return getattr(self.encoder.get_submodule(module), kind)


def evaluate(queries: Tensor, index: Tensor, sets: dict[str, Any]) -> dict[str, Any]:
    """Scores in %: Tatoeba accuracy, XQuAD nDCG@10, rank correlation with English STSb.

    Args:
        queries: Vectors of all evaluation texts as queries, [n, 384].
        index: Vectors of the same texts as the index holds them, [n, 384].
        sets: eval.json.
    """
    tatoeba, xquad = {}, {}
    for language, (foreign, english) in sets["tatoeba"].items():
        best = (queries[foreign] @ index[english].T).argmax(1).cpu()
        tatoeba[language] = 100 * (best == torch.arange(len(best))).float().mean().item()
    for language, (asked, gold) in sets["xquad"].items():
        score = queries[asked] @ index[sets["contexts"]].T
        rank = (score > score.gather(1, torch.tensor(gold, device=score.device)[:, None])).sum(1)
        xquad[language] = 100 * torch.where(rank < 10, 1 / torch.log2(rank + 2.0), 0.0).mean().item()
    one, other, judged = sets["stsb"]
    cosine = (queries[one] * queries[other]).sum(1).cpu().numpy()
    return {
        "tatoeba": fmean(tatoeba[language] for language in THIRTEEN),
        "development": fmean(tatoeba[language] for language in DEVELOPMENT),
        "xquad": fmean(xquad[language] for language in SEVEN),
        "english": xquad["en"],
        "stsb": 100 * float(spearmanr(cosine, judged).statistic),
        "languages": {"tatoeba": tatoeba, "xquad": xquad},
    }


def pack(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stores matrices [n, m], save the head's map, in 4 bits: bytes [n, m / 2] and float16 scales [n, m / 32]."""
    packed = {}
    for name, value in tensors.items():
        if value.dim() < 2 or name == "head.matrix":
            packed[name] = value
            continue
        blocks = value.float().unflatten(1, (-1, SCALE_BLOCK))
        scale = (blocks.gather(2, blocks.abs().argmax(2, keepdim=True)) / -8).half()
        divisor = torch.where(scale == 0, 1, scale).float()
        codes = (torch.round(blocks / divisor).clamp(-8, 7) + 8).to(torch.uint8)
        packed[f"{name}.codes"] = (codes[..., :16] | (codes[..., 16:] << 4)).flatten(1)
        packed[f"{name}.scale"] = scale.squeeze(2)
    return packed


def unpack(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a packed dictionary; matrices in float32."""
    tensors = {name: value for name, value in packed.items() if not name.endswith((".codes", ".scale"))}
    for name in (name.removesuffix(".codes") for name in packed if name.endswith(".codes")):
        codes = packed[f"{name}.codes"].unflatten(1, (-1, SCALE_BLOCK // 2))
        values = torch.cat([codes & 15, codes >> 4], 2).float() - 8
        tensors[name] = (values * packed[f"{name}.scale"].float().unsqueeze(2)).flatten(1)
    return tensors
