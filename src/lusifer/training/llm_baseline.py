"""The English baseline: the LLM alone, bidirectional and mean pooled, trained on the same pairs, without an encoder."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed
from transformers.modeling_outputs import BaseModelOutputWithPooling

from lusifer.data.content import check_inputs_unchanged, inputs_of, keep_inputs
from lusifer.errors import LusiferError
from lusifer.model.adapters import add_lora, merge_adapters
from lusifer.model.backbone_alone import mean_pooled_llm
from lusifer.model.pooling import mean_pool
from lusifer.model.sentence_transformer import save_atomically
from lusifer.publishing import make_folder
from lusifer.recipes.schema import Recipe
from lusifer.training.checks import check_matryoshka
from lusifer.training.precision import settle
from lusifer.training.processes import alone_in, check_output, first_process_says, processes, wait_for_all
from lusifer.training.sharding import is_sharded
from lusifer.training.stages import contrast
from lusifer.training.trainer import load_trained


class LLMAlone(nn.Module):
    """A decoder without LM head, with the interface the contrastive loss expects of a model."""

    def __init__(self, llm: PreTrainedModel) -> None:
        super().__init__()
        self.llm = llm

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """As for any model of transformers."""
        self.llm.gradient_checkpointing_enable(**options)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> BaseModelOutputWithPooling:
        """Embeds texts: ``pooler_output`` (batch, llm_dim) float32, the mean of the states, not normalised.

        Args:
            input_ids: (batch, seq) int64, ids of the LLM's tokenizer.
            attention_mask: (batch, seq), non-zero at real tokens.
        """
        states = self.llm(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=mean_pool(states, attention_mask))


def llm_alone(recipe: Recipe) -> SentenceTransformer:
    """The untrained baseline: as many layers and the same adapter as in stage 2 of the recipe.

    Raises:
        LusiferError: If the LLM cannot be loaded.
    """
    chosen = recipe.model
    layers = recipe.contrast.llm_layers or chosen.llm_layers
    options: dict[str, Any] = {"revision": chosen.llm_revision, "adapters": chosen.llm_base_adapters}
    limit = chosen.max_seq_length
    model = mean_pooled_llm(chosen.llm, layers=layers, dtype=chosen.llm_dtype, max_seq_length=limit, **options)
    if chosen.llm_lora is not None:
        model[0].auto_model.requires_grad_(False)
        add_lora(model[0].auto_model, chosen.llm_lora.fields())
    return model


def train_llm_alone(recipe: Recipe, *, progress: bool = True) -> Path:
    """Trains the baseline as stage 2 of the recipe trains LUSIFER, into ``OUTPUT/llm_alone/model``, adapters merged.

    Args:
        recipe: The recipe; what it leaves to ``auto`` is as in the run beside it.
        progress: Whether to show a progress bar.

    Raises:
        LusiferError: If the LLM or the data cannot be read, the recipe has a teacher, or training has to stop.
    """
    if recipe.contrast.teacher:
        raise LusiferError("the LLM alone has no head to learn a teacher's vectors: leave contrast.teacher out")
    with alone_in(Path(recipe.output) / "llm_alone"):
        check_output(Path(recipe.output))
        return _train(recipe, progress)


def _train(recipe: Recipe, progress: bool) -> Path:
    recipe = settle(recipe)
    set_seed(recipe.seed)
    if recipe.contrast.guide == "encoder":  # What the encoder knows is what the baseline must do without.
        without = {"guide": None, "guide_margin": None, "distill": 0.0}
        recipe = recipe.model_copy(update={"contrast": recipe.contrast.model_copy(update=without)})
    model = llm_alone(recipe)
    check_matryoshka(recipe, int(model[0].auto_model.config.hidden_size))
    folder = Path(recipe.output) / "llm_alone"
    first_process_says(partial(_begin, recipe, folder))
    alone = LLMAlone(model[0].auto_model)
    trained = contrast(recipe, alone, model.tokenizer, folder / "checkpoints", progress)["trained"]
    if is_sharded(alone):  # It cannot be put together in place.
        model = llm_alone(recipe)
        load_trained(LLMAlone(model[0].auto_model), trained)
    if processes().is_main_process:
        merge_adapters(model[0].auto_model)
        save_atomically(model.eval(), folder / "model")
    wait_for_all()
    return folder / "model"


def _begin(recipe: Recipe, folder: Path) -> None:
    inputs = inputs_of(recipe, "contrast")
    check_inputs_unchanged(folder, inputs)
    make_folder(folder)
    keep_inputs(folder, inputs, begun=(folder / "checkpoints").is_dir())
