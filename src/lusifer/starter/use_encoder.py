"""Google's multilingual Universal Sentence Encoder (the CNN/DAN student, version 3) as a torch model.

Yang et al. 2019, "Multilingual Universal Sentence Encoder for Semantic Retrieval", arXiv 1907.04307. Three n-gram
convolution branches look at windows of 2, 3 and 5 tokens; their outputs beside the raw embedding are the token states,
which a deep averaging network turns into one sentence embedding.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BatchEncoding,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

# Languages it was trained on (arXiv 1907.04307, section 1; Chinese in both scripts).
LANGUAGES = ("ar", "de", "en", "es", "fr", "it", "ja", "ko", "nl", "pl", "pt", "ru", "th", "tr", "zh")


class UseConfig(PretrainedConfig):
    """Shape of a multilingual Universal Sentence Encoder; the defaults are the published model.

    Args:
        vocab_size: Pieces of the SentencePiece vocabulary.
        embedding_size: Width of the token embeddings and of the sentence embedding.
        ngram_size: Width of each n-gram branch.
        ngrams: Window lengths of the branches; a window of n tokens starts (n - 1) // 2 tokens before its own.
        dan_sizes: Widths of the three hidden layers of the averaging network.
        layer_norm_eps: Added to the variance in every layer norm.
        max_position_embeddings: Length at which texts are truncated. The model itself has no limit; this keeps one text
            from filling the memory.
        languages: Codes of the languages it was trained on.
    """

    model_type = "use-multilingual"

    vocab_size: int = 128_000
    embedding_size: int = 512
    ngram_size: int = 256
    ngrams: tuple[int, ...] | list[int] = (2, 3, 5)
    dan_sizes: tuple[int, int, int] | list[int] = (320, 320, 512)
    layer_norm_eps: float = 1e-12
    max_position_embeddings: int = 512
    languages: tuple[str, ...] | list[str] = LANGUAGES
    pad_token_id: int | None = 3
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2

    def __post_init__(self, **kwargs: Any) -> None:
        self.languages, self.ngrams, self.dan_sizes = list(self.languages), list(self.ngrams), list(self.dan_sizes)
        # Everything that builds on an encoder reads the width of its token states under this name.
        self.hidden_size = self.embedding_size + self.ngram_size * len(self.ngrams)
        kwargs.pop("hidden_size", None)
        super().__post_init__(**kwargs)


class NgramLayer(nn.Module):
    """Residual convolution over windows of n tokens, written as a linear map of the concatenated window.

    A ``Linear`` rather than a ``Conv1d``: it needs no transposes, and LoRA on all linear layers reaches it.
    """

    def __init__(self, size: int, ngram: int) -> None:
        super().__init__()
        self.ngram = ngram
        self.window = nn.Linear(size * ngram, size)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Adds to each token what its window says: (batch, seq, size) in and out.

        Args:
            states: (batch, seq, size).
            mask: (batch, seq, 1), 1 at real tokens and 0 at padding.
        """
        left = (self.ngram - 1) // 2
        # Padding must look like the end of the text, for which the model was trained with zeros.
        padded = F.pad(states * mask, (0, 0, left, self.ngram - 1 - left))
        length = states.shape[1]
        window = torch.cat([padded[:, i : i + length] for i in range(self.ngram)], dim=-1)
        return states + F.relu(self.window(window))


class AveragingNetwork(nn.Module):
    """The residual deep averaging network between the summed token states and the sentence embedding."""

    def __init__(self, config: UseConfig) -> None:
        super().__init__()
        size = config.embedding_size
        first, second, third = config.dan_sizes
        self.hidden1 = nn.Linear(size, first, bias=False)
        self.hidden2 = nn.Linear(first, second, bias=False)
        self.shortcut2 = nn.Linear(size, second, bias=False)
        self.hidden3 = nn.Linear(second, third, bias=False)
        self.out = nn.Linear(third, size, bias=False)
        self.shortcut_out = nn.Linear(second, size, bias=False)

    def forward(self, summed: Tensor) -> Tensor:
        """Maps (batch, embedding_size) to (batch, embedding_size) of unit length."""
        hidden = F.relu(self.shortcut2(summed) + self.hidden2(F.relu(self.hidden1(summed))))
        out = self.shortcut_out(hidden) + self.out(F.relu(self.hidden3(hidden)))
        return F.normalize(torch.tanh(out), dim=-1, eps=1e-6)


class UseModel(PreTrainedModel):
    """The multilingual Universal Sentence Encoder (arXiv 1907.04307), trainable."""

    config_class = UseConfig
    config: UseConfig
    base_model_prefix = "use"
    main_input_name = "input_ids"
    _no_split_modules = ["NgramLayer"]
    embeds_sentences = True  # Its pooler was trained to: `lusifer.training.distillation`.

    def __init__(self, config: UseConfig) -> None:
        super().__init__(config)
        branches, size = len(config.ngrams), config.ngram_size
        self.embeddings = nn.Embedding(config.vocab_size, config.embedding_size)
        self.ngram_input = nn.Linear(config.embedding_size, branches * size)
        # One norm across the branches: that is how the published weights were trained.
        self.ngram_norm = nn.LayerNorm(branches * size, eps=config.layer_norm_eps)
        self.ngram_layers = nn.ModuleList(
            nn.ModuleList(NgramLayer(size, ngram) for _ in range(2)) for ngram in config.ngrams
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.project = nn.Linear(config.hidden_size, config.embedding_size)
        self.dan = AveragingNetwork(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embeddings, (vocab_size, embedding_size)."""
        return self.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replaces the token embeddings."""
        self.embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple[Tensor, Tensor]:
        """Encodes a batch of texts, padded on either side.

        Args:
            input_ids: (batch, seq) integer ids.
            attention_mask: (batch, seq), 1 at real tokens; None means that all are real.
            inputs_embeds: (batch, seq, embedding_size) instead of ``input_ids``.
            return_dict: False returns the two tensors as a tuple.
            **kwargs: Ignored; callers pass what other encoders need.

        Returns:
            ``last_hidden_state`` (batch, seq, hidden_size), zero at padding; ``pooler_output`` (batch, embedding_size),
            the sentence embedding, of unit length.

        Raises:
            ValueError: Unless exactly one of ``input_ids`` and ``inputs_embeds`` is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        embedded = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if attention_mask is None:
            mask = embedded.new_ones(*embedded.shape[:2], 1)
        else:
            mask = attention_mask.unsqueeze(-1).to(embedded.dtype)
        parts = [embedded]
        branches = self.ngram_norm(self.ngram_input(embedded)).split(self.config.ngram_size, dim=-1)
        for branch, states in enumerate(branches):
            for layer in cast(nn.ModuleList, self.ngram_layers[branch]):
                states = layer(states, mask)
            parts.append(states)
        hidden = self.norm(torch.cat(parts, dim=-1)) * mask
        pooled = self.dan(self._sum(hidden, mask))
        if return_dict is False:
            return hidden, pooled
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)

    def _sum(self, hidden: Tensor, mask: Tensor) -> Tensor:
        # Sum over tokens / sqrt(tokens), written as mean * sqrt(tokens) so that half precision cannot
        # overflow; the projection commutes with the mean, so it runs once per text instead of once per token.
        # A row of nothing but padding gets a length of one: its embedding means nothing but is no NaN.
        length = mask.sum(dim=1, dtype=torch.float32).clamp(min=1.0)
        mean = hidden.sum(dim=1, dtype=torch.float32) / length
        return self.project(mean.to(hidden.dtype)) * length.sqrt().to(hidden.dtype)


class UseTokenizer(PreTrainedTokenizerFast):
    """A fast tokenizer that gives the empty text the one unknown token that the encoder's package gives it.

    The pipeline in ``tokenizer.json`` does this for texts of nothing but spaces, but never sees an empty text.
    """

    def _encode_plus(self, text: Any, *args: Any, **kwargs: Any) -> BatchEncoding:
        if isinstance(text, str):
            text = text or " "
        elif not kwargs.get("is_split_into_words"):
            text = [" " if one == "" else one for one in text]
        return super()._encode_plus(text, *args, **kwargs)


AutoConfig.register(UseConfig.model_type, UseConfig, exist_ok=True)
AutoModel.register(UseConfig, UseModel, exist_ok=True)
AutoTokenizer.register(UseConfig, fast_tokenizer_class=UseTokenizer, exist_ok=True)
