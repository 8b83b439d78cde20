"""The adapted encoder: mean states of several layers, mapped into the teacher's vector space."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from lusifer.adapt.configuration import AdaptedConfig
from lusifer.hooks.transformers import InitializesParts, remove_capturing_hooks
from lusifer.model.backbones import build_encoder


class LayerHead(nn.Module):
    """A linear map of the mean states, and beside it an MLP of the standardised ones that starts at zero.

    Args:
        inputs: Width of the mean states side by side.
        outputs: Width of the embedding.
        hidden: Hidden width of the MLP; 0 means none.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, inputs: int, outputs: int, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("deviation", torch.ones(inputs))
        self.up: nn.Linear | None = None
        self.down: nn.Linear | None = None
        if hidden:
            self.up, self.down = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs, bias=False)
            nn.init.normal_(self.up.weight, std=1 / math.sqrt(inputs))
            nn.init.zeros_(self.up.bias)
            nn.init.zeros_(self.down.weight)

    def start_from(self, form: Mapping[str, Tensor]) -> None:
        """Takes a closed form: ``matrix`` (outputs, inputs), ``bias`` (outputs,), ``mean``, ``deviation`` (inputs,)."""
        with torch.no_grad():
            self.linear.weight.copy_(form["matrix"])
            self.linear.bias.copy_(form["bias"])
            self.mean.copy_(form["mean"])
            self.deviation.copy_(form["deviation"])

    def forward(self, states: Tensor) -> Tensor:
        """From mean states (batch, inputs) float32 to vectors (batch, outputs), not normalised."""
        vectors = self.linear(states)
        if self.up is not None and self.down is not None:
            vectors = vectors + self.down(F.gelu(self.up((states - self.mean) / self.deviation)))
        return vectors


def mean_states(encoder: nn.Module, input_ids: Tensor, attention_mask: Tensor, layers: list[int]) -> Tensor:
    """Means over the tokens of some layers' states, side by side.

    Args:
        encoder: The encoder.
        input_ids: (batch, seq) int64, padded on the right.
        attention_mask: (batch, seq), non-zero at real tokens.
        layers: Layers; 0 are the token embeddings.

    Returns:
        (batch, width x layers) float32.
    """
    output = encoder(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
    return _means(output.hidden_states, attention_mask, layers)


def _means(states: Sequence[Tensor], attention_mask: Tensor, layers: list[int]) -> Tensor:
    mask = attention_mask.to(torch.float32)
    part = (mask / mask.sum(dim=1, keepdim=True).clamp(min=1)).unsqueeze(1)
    # A matrix product, which needs no second copy of the states.
    means = [torch.bmm(part, states[layer].float()).squeeze(1) for layer in layers]
    return torch.cat(means, dim=1)


class AdaptedEncoder(InitializesParts, PreTrainedModel):
    """A multilingual encoder whose embeddings lie in a teacher's vector space.

    Args:
        config: The model's configuration.
        encoder: A loaded encoder; built with random weights when None.
    """

    config_class = AdaptedConfig
    config: AdaptedConfig
    base_model_prefix = "adapted"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: AdaptedConfig, encoder: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.encoder = encoder if encoder is not None else build_encoder(config.encoder_config)
        width = config.encoder_config.hidden_size * len(config.layers or [])
        self.head = LayerHead(width, config.dimension, config.mlp_dim)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leaves the head as its constructor made it; the encoder initialises itself."""

    def get_input_embeddings(self) -> nn.Module:
        """The encoder's token embeddings."""
        return self.encoder.get_input_embeddings()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles as any module does, without the hooks with which transformers collects states."""
        bare = copy.deepcopy(self, {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())})
        remove_capturing_hooks(bare)
        return _rebuilt, (bare.__dict__,)

    def __deepcopy__(self, memo: dict[int, Any]) -> AdaptedEncoder:
        """Copies as any module does, not by way of `__reduce__`."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, return_dict: bool | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Embeds a batch of texts.

        Args:
            input_ids: (batch, seq) int64, padded on the right.
            attention_mask: (batch, seq), non-zero at real tokens; all real when None.
            return_dict: Accepted for Sentence Transformers; the output is always a dict-like object.
            **kwargs: Ignored; callers pass what other encoders need.

        Returns:
            ``last_hidden_state`` (batch, seq, width) of the encoder and ``pooler_output`` (batch, dimension) float32,
            not normalised.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        output = self.encoder(input_ids=input_ids, attention_mask=mask, output_hidden_states=True)
        states = _means(output.hidden_states, mask, self.config.layers or [])
        with torch.autocast(states.device.type, enabled=False):
            vectors = self.head(states.to(self.head.linear.weight.dtype)).float()
        return BaseModelOutputWithPooling(last_hidden_state=output.last_hidden_state, pooler_output=vectors)


def _rebuilt(attributes: dict[str, Any]) -> AdaptedEncoder:
    with torch.device("meta"):  # In a new process transformers knows what a class records once one is made.
        AdaptedEncoder(copy.deepcopy(attributes["config"]))
    model = AdaptedEncoder.__new__(AdaptedEncoder)
    model.__dict__ = attributes
    return model


AutoModel.register(AdaptedConfig, AdaptedEncoder, exist_ok=True)
