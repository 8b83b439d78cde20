"""The LLM's next-token head, which stage 1 needs and no checkpoint stores."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lusifer.errors import LusiferError
from lusifer.hooks.transformers import no_load_report
from lusifer.model.backbones import SAFE_LOADING, load_part


class LMHead(nn.Module):
    """The LLM's next-token head: projection, then whatever scaling its family applies to logits.

    Args:
        weight: (vocab, llm_dim).
        bias: (vocab,) or None.
        config: Read for ``final_logit_softcapping`` (Gemma), ``logits_scaling`` (Granite), ``logit_scale`` (Cohere).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, config: PretrainedConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        factors = [float(getattr(config, name, None) or 1.0) for name in ("logit_scale", "logits_scaling")]
        self.scale = factors[0] / factors[1]

    def forward(self, hidden: Tensor) -> Tensor:
        """Maps states (tokens, llm_dim) to float32 logits (tokens, vocab)."""
        logits = nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias).float()
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def load_lm_head(name: str, llm: PreTrainedModel, *, revision: str | None = None, **hub: Any) -> LMHead:
    """Loads the frozen LM head of an LLM: the embedding matrix if tied, else read through a causal model of no layers.

    Args:
        name: Where the LLM was loaded from.
        llm: The LLM, without head.
        revision: Its hub revision.
        **hub: As for ``from_pretrained``.

    Raises:
        LusiferError: If it cannot be read.
    """
    config = AutoConfig.for_model(**llm.config.to_dict())
    if config.tie_word_embeddings:
        embeddings: Any = llm.get_input_embeddings()
        return LMHead(embeddings.weight.detach(), None, config)
    config.num_hidden_layers = 0
    if getattr(config, "layer_types", None):
        config.layer_types = []
    kwargs = {"config": config, "dtype": llm.dtype, "revision": revision or "main", **hub}
    with no_load_report():
        loader = partial(AutoModelForCausalLM.from_pretrained, **SAFE_LOADING)
        model, report = load_part("llm head", name, loader, **kwargs)
    if any("embed_tokens" not in key for key in report["missing_keys"]):
        raise LusiferError(f"the llm {name!r} has no LM head, which stage 1 needs: set align.enabled: false")
    head = model.get_output_embeddings()
    return LMHead(head.weight.detach().to(llm.device), getattr(head, "bias", None), config)
