"""Canaries: which private part of transformers an upgrade has moved."""

from __future__ import annotations

import logging
import pickle

import pytest
import torch
import transformers as tf

from lusifer.hooks.transformers import cached_or_none, has_pooler, no_load_report, remove_capturing_hooks


def test_cached_file_still_takes_raise_exceptions_for(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert cached_or_none(str(tmp_path), "config.json") == str(tmp_path / "config.json")
    assert cached_or_none(str(tmp_path), "other.json") is None
    assert cached_or_none("nobody/nothing", "config.json") is None  # Not in the cache, and the hub is out of reach.


def test_auto_model_still_has_model_mapping():
    assert has_pooler(tf.BertConfig()) and has_pooler(tf.XLMRobertaConfig())
    assert not has_pooler(tf.ModernBertConfig()) and not has_pooler(tf.LlamaConfig())


def test_the_load_report_still_comes_from_modeling_utils(tmp_path, caplog):
    config = tf.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    tf.BertForMaskedLM(config).save_pretrained(tmp_path)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    # Commands that ran before in this process have silenced it.
    caplog.set_level(logging.WARNING, "transformers")
    caplog.set_level(logging.NOTSET, "transformers.modeling_utils")
    try:
        with no_load_report():
            tf.BertModel.from_pretrained(tmp_path, add_pooling_layer=False)
        assert not [record for record in caplog.records if record.name == "transformers.modeling_utils"]
        tf.BertModel.from_pretrained(tmp_path, add_pooling_layer=False)
        assert [record for record in caplog.records if record.name == "transformers.modeling_utils"]
    finally:
        logger.removeHandler(caplog.handler)


def test_hidden_states_still_come_from_hooks_that_cannot_be_pickled():
    config = tf.BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    model, ids = tf.BertModel(config).eval(), torch.ones(1, 3, dtype=torch.long)
    expected = model(ids, output_hidden_states=True).hidden_states
    with pytest.raises((AttributeError, pickle.PicklingError), match="hook"):
        pickle.dumps(model)
    remove_capturing_hooks(model)
    again = pickle.loads(pickle.dumps(model))(ids, output_hidden_states=True).hidden_states
    assert len(again) == 3 and all(torch.equal(one, other) for one, other in zip(again, expected, strict=True))
