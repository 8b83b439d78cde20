"""The examples run as they stand, and frameworks get the embeddings that `lusifer.load` gives.

The model is tiny, so what they find means nothing; docs/frameworks.md shows it for the released starter.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest

import lusifer
from lusifer import LusiferError

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {
    "chroma_search": ["chromadb"],
    "haystack_search": ["haystack", "haystack_integrations.components.embedders.sentence_transformers"],
    "langchain_search": ["langchain_huggingface"],
    "llama_index_search": ["llama_index.embeddings.huggingface"],
    "mteb_evaluate": ["mteb"],
    "onnx_embed": ["onnxruntime"],
    "openai_client": ["openai"],
    "qdrant_search": ["qdrant_client"],
    "sentence_transformers_search": [],
    "sentence_transformers_train": [],
}
TEXTS = ["the cat sat on the mat", "she reads a long book", "bread, milk and apples in the market by the sea"]


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch):
    for name in ("ANONYMIZED_TELEMETRY", "HAYSTACK_TELEMETRY_ENABLED"):
        monkeypatch.setitem(os.environ, name, "False")


@pytest.fixture
def checkpoint(tiny_st, tmp_path):
    tiny_st.save_pretrained(str(tmp_path / "model"), create_model_card=False)
    return str(tmp_path / "model")


def example(name):
    for module in NEEDS[name]:
        pytest.importorskip(module)
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_here():
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == sorted(NEEDS)


@pytest.mark.parametrize("name", [name for name in NEEDS if name.endswith("_search")])
def test_a_search_prints_what_it_returns(name, checkpoint, capsys):
    found = example(name).main(checkpoint)
    said = capsys.readouterr().out
    assert len(found) == 3 and all(text in said for text in found)


def test_training_with_their_trainer_moves_the_model_and_not_its_encoder(checkpoint, capsys, monkeypatch):
    module = example("sentence_transformers_train")
    loaded = []
    monkeypatch.setattr(lusifer, "load", lambda path, load=lusifer.load: loaded.append(load(path)) or loaded[0])
    assert module.main(checkpoint, "2") > 1e-6
    before, after = lusifer.path(checkpoint), loaded[0][0].auto_model
    same = {name: tensor for name, tensor in lusifer.LusiferModel.from_pretrained(before).state_dict().items()}
    changed = {name.split(".")[0] for name, tensor in after.state_dict().items() if not tensor.equal(same[name])}
    assert changed == {"connector"}
    assert "but not:" in capsys.readouterr().out


def test_a_task_of_ones_own_is_scored_by_mteb(checkpoint):
    assert -1 <= example("mteb_evaluate").main(checkpoint) <= 1


def langchain(path):
    module = pytest.importorskip("langchain_huggingface")
    return module.HuggingFaceEmbeddings(model_name=path).embed_documents(TEXTS)


def llama_index(path):
    module = pytest.importorskip("llama_index.embeddings.huggingface")
    return module.HuggingFaceEmbedding(model_name=path, device="cpu").get_text_embedding_batch(TEXTS)


def haystack(path):
    module = pytest.importorskip("haystack_integrations.components.embedders.sentence_transformers")
    from haystack import Document

    embedder = module.SentenceTransformersDocumentEmbedder(model=path, progress_bar=False)
    return [d.embedding for d in embedder.run(documents=[Document(content=text) for text in TEXTS])["documents"]]


def chroma(path):
    module = pytest.importorskip("chromadb.utils.embedding_functions")
    return module.SentenceTransformerEmbeddingFunction(path)(TEXTS)


@pytest.mark.parametrize("embed", [langchain, llama_index, haystack, chroma], ids=lambda embed: embed.__name__)
def test_a_framework_gets_our_embeddings(embed, checkpoint):
    found = np.asarray(embed(lusifer.path(checkpoint)), dtype=np.float32)
    cosines = (found * lusifer.load(checkpoint).encode(TEXTS)).sum(axis=1) / np.linalg.norm(found, axis=1)
    assert cosines.min() >= 0.99999


def test_two_processes_give_what_one_gives(checkpoint):
    model = lusifer.load(checkpoint)
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        found = model.encode(TEXTS, pool=pool, chunk_size=1)
    finally:
        model.stop_multi_process_pool(pool)
    np.testing.assert_allclose(found, model.encode(TEXTS), atol=1e-6)  # Batches are others.


def test_fewer_dimensions_are_the_first_ones(checkpoint):
    whole = lusifer.load(checkpoint).encode(TEXTS)[:, :16]
    cut = lusifer.load(checkpoint, truncate_dim=16).encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(cut, whole / np.linalg.norm(whole, axis=1, keepdims=True), atol=1e-6)


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_other_backends_are_refused(checkpoint, backend):
    with pytest.raises(LusiferError, match=f"no backend '{backend}'"):
        lusifer.load(checkpoint, backend=backend)
