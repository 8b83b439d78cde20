"""A tiny checkpoint in the format of the paper's authors."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, XLMRobertaModel

from lusifer import LusiferModel
from support.tiny import sharpen

IDS = [[0, 5, 9, 17, 2], [0, 2], [0, *range(4, 60), 2]]


RANK, ALPHA = 4, 12


@pytest.fixture(scope="session")
def made(tiny_encoder, tiny_llm, tmp_path_factory):
    """A checkpoint in the authors' format, and the embeddings it must give."""
    torch.manual_seed(0)
    model = LusiferModel.from_backbones(
        tiny_encoder,
        tiny_llm,
        max_seq_length=64,
        connector_dim=40,
        connector_residual=False,
        use_bos=False,
        head_dim=24,
    )
    sharpen(model.connector)
    sharpen(model.head)
    for part in ("encoder", "llm"):
        model.add_adapter(part, {"r": RANK, "lora_alpha": ALPHA})
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    state = {}
    plain = {"connector.up.": "connection_module.ff.0.", "connector.down.": "connection_module.ff.2."}
    plain |= {"connector.added": "connection_module.added", "head.": "output_projection."}
    plain |= {"encoder.": "universal_learner.base_model.model.", "llm.": "encoder.base_model.model.model."}
    for name, tensor in model.state_dict().items():
        prefix = next(prefix for prefix in plain if name.startswith(prefix))
        adapter = "universal_lora" if prefix == "encoder." else "encoder_lora"
        theirs = plain[prefix] + name.removeprefix(prefix).replace(".default.", f".{adapter}.")
        state[theirs] = tensor.clone()
    # What their model carries without using it.
    pooler = XLMRobertaModel.from_pretrained(tiny_encoder).pooler.state_dict()
    state |= {f"universal_learner.base_model.model.pooler.{name}": tensor for name, tensor in pooler.items()}
    head = AutoModelForCausalLM.from_pretrained(tiny_llm).get_output_embeddings().weight
    state["encoder.base_model.model.lm_head.weight"] = head.detach().clone()
    folder = tmp_path_factory.mktemp("authors")
    save_file(state, folder / "model.safetensors")
    config = {
        "universal_learner_name_or_path": tiny_encoder,
        "encoder_name_or_path": tiny_llm,
        "universal_learner_backbone_type": "xlm-r",
        "connection_type": "ff",
        "pooling_method": "mean",
        "loar_r": RANK,
        "lora_alpha": ALPHA,
        "dropout": 0.1,
        "universal_learner_lora_target_modules": "all",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder, embeddings(model)


@torch.inference_mode()
def embeddings(model):
    model.eval()
    return np.stack([model(torch.tensor([ids])).pooler_output[0].numpy() for ids in IDS])
