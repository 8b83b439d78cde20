"""Stage 0: a closed-form start of the connector, our own addition to the paper.

1. Split English texts into words and find each word's tokens in both tokenizers.
2. Average the encoder states of a word (in context), and the LLM's input embeddings of the same word.
3. Solve one ridge regression from the first to the second.
4. Flatten the map's spectrum: plain ridge shrinks the directions in which English words vary little, where the encoder
   keeps its languages together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from lusifer.errors import LusiferError
from lusifer.model.modeling import LusiferModel
from lusifer.progress import track

_WORD = re.compile(r"\w+|[^\w\s]+")
_SPACED = re.compile(r"\S+")
_BATCH = 32  # Texts in one encoder pass.
_HELD_OUT = 0.1  # Share of the texts.


class WarmStart(NamedTuple):
    """A fitted linear map from encoder states to LLM input embeddings.

    Attributes:
        weight: (llm_dim, encoder_dim) float32.
        bias: (llm_dim,) float32.
        explained: Share of the variance of held-out words' LLM embeddings that the map explains.
        words, held_out_words: Numbers of word occurrences fitted and held out, from different texts.
    """

    weight: Tensor
    bias: Tensor
    explained: float
    words: int
    held_out_words: int


def _token_words(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[tuple[int, int]], *, special: bool, limit: int
) -> tuple[list[int], list[int]] | None:
    """Token ids of a text, and for each token the word it belongs to (-1: none)."""
    options = {"add_special_tokens": special, "truncation": True, "max_length": limit}
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, return_offsets_mapping=True, **options)
        words, word = [], 0
        for start, end in encoded["offset_mapping"]:
            # Byte-level tokenizers count the space before a word into its token.
            while start < end and text[start].isspace():
                start += 1
            while word < len(spans) and spans[word][1] <= start:
                word += 1
            inside = word < len(spans) and start < end and spans[word][0] <= start
            words.append(word if inside else -1)
        return list(encoded["input_ids"]), words
    return _sentencepiece_words(tokenizer, list(tokenizer(text, **options)["input_ids"]), len(spans))


def _sentencepiece_words(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], num_words: int
) -> tuple[list[int], list[int]] | None:
    """Words of SentencePiece tokens without offsets: each piece that opens with a meta symbol opens a word."""
    pieces = tokenizer.convert_ids_to_tokens(ids)
    special, words, word = set(tokenizer.all_special_ids), [], -1
    for token_id, piece in zip(ids, pieces, strict=True):
        if token_id in special:
            words.append(-1)
            continue
        word += piece.startswith("\u2581") or word < 0
        words.append(word)
    # A different count means that the tokenizer normalised spaces in a way we cannot follow.
    return (ids, words) if word + 1 == num_words else None


def _average(states: Tensor, words: Tensor, num_words: int) -> tuple[Tensor, Tensor]:
    """Averages token rows by word: (num_words, dim) float32 and which words have any token."""
    inside = words >= 0
    sums = torch.zeros(num_words, states.shape[1]).index_add_(0, words[inside], states[inside])
    counts = torch.zeros(num_words).index_add_(0, words[inside], torch.ones(int(inside.sum())))
    return sums / counts.clamp(min=1).unsqueeze(1), counts > 0


@torch.inference_mode()
def aligned_words(
    model: LusiferModel,
    encoder_tokenizer: PreTrainedTokenizerBase,
    llm_tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields, batch by batch of texts, the two views of every English word.

    Args:
        model: Its encoder and its LLM's input embeddings are used.
        encoder_tokenizer: The encoder's tokenizer.
        llm_tokenizer: The LLM's tokenizer.
        texts: English texts.

    Yields:
        (words, encoder_dim) mean encoder states and (words, llm_dim) mean LLM input embeddings, float32.
    """
    table = model.llm_embeddings()
    device = model.connector.added_tokens.device
    offsets = all(getattr(tokenizer, "is_fast", False) for tokenizer in (encoder_tokenizer, llm_tokenizer))
    pattern = _WORD if offsets else _SPACED
    limit = model.config.max_seq_length
    for begin in range(0, len(texts), _BATCH):
        rows = []
        for text in texts[begin : begin + _BATCH]:
            spans = [match.span() for match in pattern.finditer(text)]
            source = _token_words(encoder_tokenizer, text, spans, special=True, limit=limit)
            target = _token_words(llm_tokenizer, text, spans, special=False, limit=limit)
            if spans and source is not None and target is not None:
                rows.append((len(spans), source, target))
        if not rows:
            continue
        unpadded = [torch.tensor(source[0], dtype=torch.long) for _, source, _ in rows]
        ids = pad_sequence(unpadded, batch_first=True, padding_value=encoder_tokenizer.pad_token_id or 0)
        mask = pad_sequence([torch.ones_like(row) for row in unpadded], batch_first=True)
        states = model.encoder(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state.float().cpu()
        inputs, outputs = [], []
        for row, (num_words, source, target) in zip(states, rows, strict=True):
            x, has_x = _average(row[: len(source[1])], torch.tensor(source[1]), num_words)
            embedded = table[torch.tensor(target[0], device=table.device)].float().cpu()
            y, has_y = _average(embedded, torch.tensor(target[1]), num_words)
            both = has_x & has_y
            inputs.append(x[both])
            outputs.append(y[both])
        yield torch.cat(inputs), torch.cat(outputs)


class _Moments:
    """Running sums of a regression with intercept: memory does not grow with the number of words."""

    def __init__(self) -> None:
        self.count = 0
        self.sums = [torch.zeros((), dtype=torch.float64)] * 4

    def add(self, x: Tensor, y: Tensor) -> None:
        # Products of one batch are exact enough in float32; their long sum is not.
        batch = (x.T @ x, x.T @ y, x.sum(dim=0), y.sum(dim=0))
        self.sums = [total + part.double() for total, part in zip(self.sums, batch, strict=True)]
        self.count += len(x)

    def solve(self, ridge: float, spectrum: float) -> tuple[Tensor, Tensor]:
        """Weight (llm_dim, encoder_dim) and bias (llm_dim,), float32."""
        n, (xx, xy, x, y) = self.count, self.sums
        mean_x, mean_y = x / n, y / n
        xx, xy = xx - n * torch.outer(mean_x, mean_x), xy - n * torch.outer(mean_x, mean_y)
        linear = torch.linalg.solve(xx + ridge * torch.eye(len(xx), dtype=xx.dtype), xy)
        if spectrum != 1.0:
            left, values, right = torch.linalg.svd(linear, full_matrices=False)
            linear = left @ torch.diag(values**spectrum) @ right
            linear = linear * (linear * xy).sum() / (linear * (xx @ linear)).sum()
        return linear.T.float().contiguous(), (mean_y - mean_x @ linear).float()


def fit_connector(
    model: LusiferModel,
    encoder_tokenizer: PreTrainedTokenizerBase,
    llm_tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    ridge: float = 1000.0,
    spectrum: float = 0.5,
    progress: bool = True,
) -> WarmStart:
    """Solves the ridge regression from encoder states to LLM input embeddings.

    Args:
        model: An untrained model; not changed.
        encoder_tokenizer: The encoder's tokenizer.
        llm_tokenizer: The LLM's tokenizer.
        texts: English texts; the last tenth measures the fit and is not fitted.
        ridge: Penalty lambda on the squared weights (the intercept is free).
        spectrum: Exponent on the map's singular values, before one least-squares factor restores its size.
        progress: Whether to show a progress bar.

    Raises:
        LusiferError: If no word could be aligned (too few texts, or tokenizers that cannot be followed).
    """
    fitted = max(1, round(len(texts) * (1 - _HELD_OUT)))
    sums = _Moments()
    batches = aligned_words(model, encoder_tokenizer, llm_tokenizer, texts[:fitted])
    total = -(-fitted // _BATCH)
    for x, y in track(batches, "stage 0, warm start", "batch", total=total, show=progress, keep=True):
        sums.add(x, y)
    if sums.count < 2:
        raise LusiferError(
            f"stage 0 could align no words in {len(texts)} texts; give it English text, or switch it off"
        )
    weight, bias = sums.solve(ridge, spectrum)
    pairs = list(aligned_words(model, encoder_tokenizer, llm_tokenizer, texts[fitted:]))
    if not pairs:
        return WarmStart(weight, bias, float("nan"), sums.count, 0)
    x, y = (torch.cat(side) for side in zip(*pairs, strict=True))
    residual = (y - x @ weight.T - bias).square().sum()
    explained = 1.0 - float(residual / (y - y.mean(dim=0)).square().sum())
    return WarmStart(weight, bias, explained, sums.count, len(x))


def start_connector(model: LusiferModel, start: WarmStart, *, scale: float = 1.0) -> None:
    """Starts the model's connector as the fitted map.

    Args:
        model: Its connector is changed in place.
        start: The fitted map.
        scale: Positive factor on the soft tokens. A louder one looks the same to the LLM's first layer, but weighs more
            in the residual stream: 1 stays near the LLM's representation, more near the encoder's (docs/LOG.md).
    """
    model.connector.start_linear(scale * start.weight, scale * start.bias)
