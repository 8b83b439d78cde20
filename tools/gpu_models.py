"""Random models and texts for `gpu_proof.py`, built from configurations: nothing is fetched."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from lusifer import LusiferConfig, LusiferModel
from lusifer.recipes.schema import Recipe
from lusifer.training.stages import prepare_stage

WORDS = 500
XLMR = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}


class NotHere(Exception):
    """Why a row is not possible on this machine."""


@dataclass
class Bench:
    """Where the rows compute, and the folders of small backbones."""

    device: torch.device
    full: bool
    folder: Path
    encoder: str = ""
    llm: str = ""

    def model(self, **options: Any) -> LusiferModel:
        """The small pair, in evaluation mode."""
        torch.manual_seed(0)
        options = {"max_seq_length": 64, "device": self.device, **options}
        return LusiferModel.from_backbones(self.encoder, self.llm, **options)

    def needs_gpu(self) -> None:
        """Leaves a row out on a CPU."""
        if self.device.type != "cuda":
            raise NotHere("needs a CUDA GPU")


def small_backbones(bench: Bench) -> None:
    """Saves a random encoder and LLM with a tokenizer of words."""
    special = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3}
    words = special | {f"w{number}": number for number in range(len(special), WORDS)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **tokens)
    ids = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    shape = {"num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
    torch.manual_seed(0)
    encoder = XLMRobertaModel(
        XLMRobertaConfig(**ids, hidden_size=128, max_position_embeddings=130, **shape), add_pooling_layer=False
    )
    llm = LlamaForCausalLM(LlamaConfig(**ids, hidden_size=256, num_key_value_heads=2, **shape))
    for name, model in (("encoder", encoder), ("llm", llm)):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.08)
        model.save_pretrained(bench.folder / name)
        tokenizer.save_pretrained(bench.folder / name)
        setattr(bench, name, str(bench.folder / name))


def texts(count: int, longest: int, seed: int = 0) -> list[torch.Tensor]:
    """Token ids of texts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(longest // 2, longest + 1, (count,), generator=generator).tolist()
    lengths[0] = longest
    return [torch.randint(4, WORDS, (length,), generator=generator) for length in lengths]


def padded(rows: list[torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Texts as a batch, padded on the right."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def recipe_of(bench: Bench, name: str, **model: Any) -> Recipe:
    """A recipe of both stages over generated pairs, a few steps each."""
    path = bench.folder / "pairs.jsonl"
    if not path.exists():
        rows = [" ".join(f"w{int(word)}" for word in row) for row in texts(200, 12)]
        path.write_text("".join(json.dumps({"query": r, "positive": r[3:], "negative": r[:9]}) + "\n" for r in rows))
    lora = {"r": 4, "alpha": 8, "dropout": 0.0}
    stage = {"steps": 4, "batch_size": 8, "save_steps": 2, "learning_rate": 1e-3, "train_encoder": "lora"}
    return Recipe.model_validate(
        {
            "output": str(bench.folder / name),
            "model": {
                "encoder": bench.encoder, "llm": bench.llm, "max_seq_length": 32, "encoder_lora": lora,
                "llm_lora": lora, **model,
            },
            "warm_start": {"texts": 100},
            "align": {**stage, "data": [{"source": str(path), "task": "complete"}]},
            "contrast": {**stage, "data": [{"source": str(path), "hard_negatives": 1}]},
        }
    )  # fmt: skip


def large_pair(bench: Bench) -> tuple[Recipe, LusiferModel]:
    """XLM-R-large and Mistral-7B in bfloat16, random, prepared for stage 2; tiny ones on a CPU or with ``--tiny``."""
    if bench.full:
        encoder = XLMRobertaConfig(vocab_size=250002, max_position_embeddings=514, **XLMR)
        llm: Any = MistralConfig()
    else:
        encoder = XLMRobertaConfig(vocab_size=WORDS, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
        shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256}
        llm = MistralConfig(vocab_size=WORDS, hidden_size=128, **shape)
    config = LusiferConfig(encoder_config=encoder, llm_config=llm, connector_residual=False)
    config.encoder_config.dtype = config.llm_config.dtype = torch.bfloat16
    with torch.device(bench.device), _dtype(torch.bfloat16):
        model = LusiferModel(config)
    lora = {"r": 16, "alpha": 32, "dropout": 0.0}
    data = [{"source": "unused", "hard_negatives": 1}]
    stage = {"batch_size": 16, "precision": "bfloat16", "gradient_checkpointing": True, "train_encoder": "lora"}
    stage |= {"max_tokens": 8192, "graph_tokens": 16384, "data": data}
    names = {"encoder": "unused", "llm": "unused", "encoder_lora": lora, "llm_lora": lora}
    names |= {"max_seq_length": 512, "encoder_dtype": "bfloat16", "llm_dtype": "bfloat16"}
    recipe = Recipe.model_validate({"output": "unused", "model": names, "contrast": stage})
    model.connector.float()
    model.add_adapter("encoder", recipe.model.encoder_lora.fields())
    prepare_stage(recipe, "contrast", model)
    return recipe, model


@contextlib.contextmanager
def _dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
