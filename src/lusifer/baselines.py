"""The English baseline: the LLM alone, bidirectional and mean pooled, trained on the same pairs, without an encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from torch import Tensor, nn
from transformers import set_seed
from transformers.modeling_outputs import BaseModelOutputWithPooling

from lusifer.adapters import add_lora, merge_adapters
from lusifer.backbones import load_config
from lusifer.base_adapters import fold_in
from lusifer.checkpoint import SAFE, check_files
from lusifer.errors import LusiferError
from lusifer.recipes import Recipe
from lusifer.sentence import save_atomically
from lusifer.starter import resolve_backbone
from lusifer.training import contrast


class LLMAlone(nn.Module):
    """An LLM with the interface the contrastive loss expects of a model.

    Args:
        llm: A decoder of transformers, without LM head.
    """

    def __init__(self, llm: nn.Module) -> None:
        super().__init__()
        self.llm = llm

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> BaseModelOutputWithPooling:
        """Embeds texts.

        Args:
            input_ids: (batch, seq) int64, ids of the LLM's tokenizer.
            attention_mask: (batch, seq), non-zero at real tokens.

        Returns:
            ``pooler_output`` (batch, llm_dim) float32, the mean of the states, not normalised.
        """
        states = self.llm(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        weights = attention_mask.unsqueeze(-1).float()
        mean = (states.float() * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=mean)


def mean_pooled_llm(
    name: str,
    *,
    layers: int | None = None,
    dtype: str = "auto",
    max_seq_length: int = 512,
    causal: bool = False,
    revision: str | None = None,
    device: str | None = None,
    adapters: Sequence[str] = (),
) -> SentenceTransformer:
    """A decoder LLM as it comes, its states mean pooled: the baseline that has learned nothing.

    Args:
        name: Hub id, local folder or starter name.
        layers: Use only the first layers; all when None.
        dtype: Data type of the weights, as transformers names it.
        max_seq_length: Tokens read of a text.
        causal: Direction of the attention; both ways when False.
        revision: Hub revision.
        device: Torch device; the best there is when None.
        adapters: LoRA adapters of PEFT to fold into it, in this order.

    Raises:
        LusiferError: If it cannot be loaded, or is no decoder LLM.
    """
    config = load_config("llm", name, revision=revision)
    check_files(f"the llm {name!r}", resolve_backbone(name), **({"revision": revision} if revision else {}))
    try:
        module = Transformer(
            resolve_backbone(name),
            config_kwargs={"num_hidden_layers": layers or config.num_hidden_layers},
            model_kwargs={"dtype": dtype, **SAFE, **({"revision": revision} if revision else {})},
            max_seq_length=max_seq_length,
        )
    except (OSError, ValueError) as error:
        raise LusiferError(f"cannot load the llm {name!r}: {str(error).splitlines()[0]}") from error
    for adapter in adapters:
        fold_in(module.auto_model, adapter, depth=config.num_hidden_layers)
    # Not in config_kwargs, which drop what the configuration does not have already.
    module.auto_model.config.is_causal = causal
    if module.tokenizer.pad_token is None:
        module.tokenizer.pad_token = module.tokenizer.eos_token
    modules = [module, Pooling(module.get_embedding_dimension()), Normalize()]
    return SentenceTransformer(modules=modules, device=device)


def llm_alone(recipe: Recipe) -> SentenceTransformer:
    """The untrained baseline: as many layers and the same adapter as in stage 2 of the recipe.

    Raises:
        LusiferError: If the LLM cannot be loaded.
    """
    model = mean_pooled_llm(
        recipe.model.llm,
        layers=recipe.contrast.llm_layers or recipe.model.llm_layers,
        dtype=recipe.model.llm_dtype,
        max_seq_length=recipe.model.max_seq_length,
        revision=recipe.model.llm_revision,
        adapters=recipe.model.llm_base_adapters,
    )
    if recipe.model.llm_lora is not None:
        model[0].auto_model.requires_grad_(False)
        add_lora(model[0].auto_model, recipe.model.llm_lora.fields())
    return model


def train_llm_alone(recipe: Recipe, *, progress: bool = True) -> Path:
    """Trains the baseline as stage 2 of the recipe trains LUSIFER: same data, steps, batch and loss.

    Args:
        recipe: The recipe.
        progress: Whether to show a progress bar.

    Returns:
        ``OUTPUT/llm_alone/model``, adapters merged, which Sentence Transformers opens without us.

    Raises:
        LusiferError: If the LLM or the data cannot be read, or training has to stop.
    """
    set_seed(recipe.seed)
    if recipe.contrast.guide == "encoder":  # What the encoder knows is what the baseline must do without.
        alone = {"guide": None, "guide_margin": None, "distill": 0.0}
        recipe = recipe.model_copy(update={"contrast": recipe.contrast.model_copy(update=alone)})
    model = llm_alone(recipe)
    folder = Path(recipe.output) / "llm_alone"
    limit = recipe.contrast.max_seq_length or recipe.model.max_seq_length
    llm = model[0].auto_model
    contrast(recipe, LLMAlone(llm), model.tokenizer, limit, folder / "checkpoints", progress)
    merge_adapters(llm)
    save_atomically(model.eval(), folder / "model")
    return folder / "model"
