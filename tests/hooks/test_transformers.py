"""Canaries for the private parts of ``transformers`` that `lusifer.hooks.transformers` touches."""

from __future__ import annotations

from transformers import LlamaConfig, LlamaModel

from lusifer.hooks.transformers import cached_or_none, layer_class_names


def test_a_backbone_names_its_layer_classes():
    model = LlamaModel(LlamaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    names = layer_class_names(model)
    assert names == {"LlamaDecoderLayer"}, "transformers moved _no_split_modules: FSDP2 would shard no layer"
    assert names <= {type(module).__name__ for module in model.modules()}


def test_a_missing_file_is_none_and_no_error(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert cached_or_none(str(tmp_path), "config.json") == str(tmp_path / "config.json")
    assert cached_or_none(str(tmp_path), "missing.json") is None
    assert cached_or_none("acme/never-fetched", "config.json") is None
