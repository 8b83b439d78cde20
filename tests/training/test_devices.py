"""Where a run's tensors are: on the training device from the start, checked without a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from lusifer import LusiferModel
from lusifer.hooks.trainer import OneDevice
from lusifer.model import backbone_pair, modeling
from lusifer.recipes.schema import ModelRecipe
from lusifer.training import run, stages

GPU = torch.device("cuda", 0)


def test_a_process_uses_one_of_the_gpus_it_sees(tmp_path):
    arguments = OneDevice(output_dir=str(tmp_path), per_device_train_batch_size=8, use_cpu=True)
    arguments._n_gpu = 4
    assert arguments.n_gpu == 1
    assert arguments.train_batch_size == 8


def test_backbones_are_loaded_to_the_device(tiny_encoder, tiny_llm, monkeypatch):
    asked = []

    def load(name, config, **options):
        asked.append(options.pop("device_map", None))
        return original[len(asked) - 1](name, config, **options)

    original = [backbone_pair.load_encoder, backbone_pair.load_llm]
    monkeypatch.setattr(backbone_pair, "load_encoder", load)
    monkeypatch.setattr(backbone_pair, "load_llm", load)
    stages.build_model(ModelRecipe(encoder=tiny_encoder, llm=tiny_llm, max_seq_length=32), device=GPU)
    assert asked == [GPU, GPU]


def test_every_model_of_a_run_is_loaded_to_the_device_of_its_process(tiny_encoder, tiny_llm, monkeypatch):
    asked = []
    monkeypatch.setattr(run, "processes", lambda: SimpleNamespace(device=GPU))
    monkeypatch.setattr(run, "build_model", lambda recipe, device: asked.append(device))
    monkeypatch.setattr(run, "load_checkpoint", lambda path, **options: asked.append(options))
    model = ModelRecipe(encoder=tiny_encoder, llm=tiny_llm)
    recipe = SimpleNamespace(seed=0, model=model)
    run._model_before(recipe, None)
    run._model_before(recipe, "somewhere")
    assert asked[0] == GPU
    assert (asked[1]["device"], asked[1]["model_kwargs"]["device_map"]) == ("cuda:0", GPU)


def test_a_checkpoint_is_loaded_to_the_device(tiny_model, tmp_path, monkeypatch):
    asked = []
    tiny_model.save_pretrained(tmp_path / "model")

    def load(*arguments, **hub):
        asked.append(arguments[-1])
        return original(*arguments[:-1], None, **hub)

    original = modeling.load_backbones
    monkeypatch.setattr(modeling, "load_backbones", load)
    LusiferModel.from_pretrained(tmp_path / "model", device_map=GPU)
    LusiferModel.from_pretrained(tmp_path / "model", device_map={"": GPU})
    LusiferModel.from_pretrained(tmp_path / "model")
    assert asked == [GPU, GPU, None]


class Nowhere(TorchFunctionMode):
    """Notes tensors that are made without saying where: on a GPU's run they would be on the CPU."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in _device_constructors() and (kwargs or {}).get("device") is None and result.dim():
            self.made.append(func.__name__)
        return result


@pytest.mark.parametrize("stage", ["align", "contrast"])
def test_a_pass_says_of_every_tensor_where_it_is(tiny_model, stage):
    ids = torch.ones(2, 7, dtype=torch.long)
    mask, options = torch.tensor([[1] * 7, [1] * 4 + [0] * 3]), {}
    if stage == "align":
        options = {"target_ids": ids, "target_mask": mask, "target_masked": mask.bool()}
        options["mask_embedding"] = torch.ones(tiny_model.config.llm_config.hidden_size)
    with Nowhere() as nowhere:
        tiny_model(ids, mask, **options)
    assert nowhere.made == []
