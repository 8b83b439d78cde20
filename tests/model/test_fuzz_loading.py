"""Damaged and hostile files: a recipe, a configuration or a checkpoint loads, or is refused in one line, nothing else.

Inputs are mutations of valid ones, since most random bytes get no further than the first check. Runs are derandomised.
"""

from __future__ import annotations

import json
import math
import os
import shutil

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lusifer
from lusifer import LusiferError, LusiferModel
from lusifer.evaluation.report.results import read
from lusifer.interop.authors import convert_authors
from lusifer.recipes.files import load_recipe
from lusifer.recipes.schema import Recipe
from support.tiny import CORPUS


def fuzz(examples):
    """The same examples at every run, however slow the machine; ``FUZZ=10`` takes ten times as many."""
    examples *= int(os.environ.get("FUZZ", "1"))
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(derandomize=True, database=None, deadline=None, max_examples=examples, suppress_health_check=checks)


# Sizes stay where a machine can still refuse them: nobody needs a model of a million layers to be told so in time.
NUMBERS = st.one_of(st.integers(-3, 300), st.floats(allow_nan=True, allow_infinity=True), st.just(2**40))
SCALARS = st.one_of(
    st.none(), st.booleans(), NUMBERS, st.text(max_size=8), st.sampled_from(["mean", "llama", "../x", ""])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(tree, at=()):
    """Every place in a tree of mappings and lists."""
    found = [at] if at else []
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in pairs:
        found += places(value, (*at, key))
    return found


@st.composite
def mutations(draw, tree):
    """The tree with one to three places dropped, renamed or given another value."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 3))):
        everywhere = places(tree)
        if not everywhere:
            break
        *path, last = draw(st.sampled_from(everywhere))
        node = tree
        for key in path:
            node = node[key]
        what = draw(st.sampled_from(["drop", "rename", "value", "value", "value"]))
        if what == "value":
            node[last] = draw(VALUES)
        else:
            value = node.pop(last)
            if what == "rename" and isinstance(node, dict):
                node[draw(st.text(max_size=6))] = value
    return tree


RECIPE = {
    "output": "runs/x",
    "seed": 1,
    "model": {"encoder": "a/b", "llm": "c/d", "llm_lora": {"r": 4}, "max_seq_length": 64, "prompts": {"query": "q: "}},
    "warm_start": {"data": "t.jsonl", "texts": 10},
    "align": {"data": [{"source": "t.jsonl", "task": "reconstruct"}], "steps": 3, "mask_probability": [0.2, 0.7]},
    "contrast": {"data": [{"source": "p.jsonl", "columns": {"query": "q"}, "weight": 2}], "matryoshka_dims": [8, 16]},
    "scale": {"strategy": "ddp"},
}


@fuzz(400)
@given(mutations(RECIPE))
@example({**RECIPE, "seed": math.nan})
@example({**RECIPE, "align": {**RECIPE["align"], "mask_probability": [[]]}})
def test_a_recipe_is_read_or_refused(tmp_path, tree):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    try:
        recipe = load_recipe(path)
    except LusiferError as error:
        assert "\n" not in str(error)
        return
    assert Recipe.model_validate(recipe.model_dump(exclude_unset=True)) == recipe or "nan" in str(recipe)


@fuzz(200)
@given(st.lists(st.text(max_size=12).map(lambda text: "--" + text) | st.text(max_size=8), max_size=4))
@example(["--contrast.data.9.weight", "1"])
@example(["--seed.x", "1"])
@example(["--", "1"])
@example(["--contrast.data.-1.weight", "1"])
def test_overrides_are_taken_or_refused(tmp_path, overrides):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    try:
        load_recipe(path, overrides)
    except LusiferError:
        return


@pytest.fixture(scope="module")
def checkpoints(tiny_encoder, tiny_llm, tmp_path_factory):
    """A small and a standalone checkpoint."""
    from lusifer.model.backbones import load_tokenizer
    from lusifer.model.sentence_transformer import save_atomically, to_sentence_transformer

    root = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    model = LusiferModel.from_backbones(tiny_encoder, tiny_llm, max_seq_length=64)
    model.add_adapter("llm", {"r": 2})
    tokenizer = load_tokenizer("encoder", tiny_encoder)
    save_atomically(to_sentence_transformer(model.eval(), tokenizer), root / "small")
    save_atomically(to_sentence_transformer(model.merge(), tokenizer), root / "standalone")
    return root


def loads(folder):
    """Whether a folder loads and embeds; anything but that or one clear line is an error of ours."""
    try:
        found = lusifer.load(str(folder), device="cpu").encode(CORPUS[:2])
    except LusiferError as error:
        assert str(error).strip() and "\n" not in str(error)
        return False
    assert found.shape[0] == 2
    return True


def altered(checkpoints, kind, file, content, tmp_path):
    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(checkpoints / kind, folder)
    (folder / file).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


@pytest.mark.parametrize("kind", ["small", "standalone"])
@pytest.mark.parametrize("file", ["config.json", "modules.json", "sentence_bert_config.json", "tokenizer_config.json"])
def test_a_checkpoints_settings_are_taken_or_refused(checkpoints, kind, file, tmp_path):
    tree = json.loads((checkpoints / kind / file).read_text())

    @fuzz(30)
    @given(mutations(tree))
    def check(changed):
        loads(altered(checkpoints, kind, file, changed, tmp_path))

    check()


@pytest.mark.parametrize("kind", ["small", "standalone"])
def test_weights_with_bits_turned_are_numbers_or_refused(checkpoints, kind, tmp_path):
    whole = (checkpoints / kind / "model.safetensors").read_bytes()
    head = int.from_bytes(whole[:8], "little") + 8

    @fuzz(40)
    @given(st.one_of(st.integers(0, head - 1), st.integers(0, len(whole) - 1)), st.integers(1, 255), st.booleans())
    @example(0, 255, False)
    @example(7, 127, False)
    def check(place, bits, cut):
        changed = whole[:place] if cut else whole[:place] + bytes([whole[place] ^ bits]) + whole[place + 1 :]
        loads(altered(checkpoints, kind, "model.safetensors", changed, tmp_path))

    check()


@pytest.mark.parametrize("kind", ["small", "standalone"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused(checkpoints, kind, value, tmp_path):
    folder = altered(checkpoints, kind, "config.json", (checkpoints / kind / "config.json").read_bytes(), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["connector.up.weight"][0, 0] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LusiferError, match="connector.up.weight contains NaN or infinite values"):
        lusifer.load(str(folder))


@pytest.mark.parametrize("kind", ["small", "standalone"])
def test_a_pickle_is_not_opened(checkpoints, kind, tmp_path):
    trap = tmp_path / "sprung"

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(trap),)

    folder = altered(checkpoints, kind, "config.json", (checkpoints / kind / "config.json").read_bytes(), tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({"x": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(LusiferError):
        lusifer.load(str(folder))
    assert not trap.exists()


@pytest.mark.parametrize("part", ["encoder", "llm"])
def test_a_backbone_in_a_pickle_is_not_opened(tiny_encoder, tiny_llm, part, tmp_path):
    folders = {"encoder": tiny_encoder, "llm": tiny_llm}
    folders[part] = str(shutil.copytree(folders[part], tmp_path / part))
    weights = load_file(os.path.join(folders[part], "model.safetensors"))
    os.remove(os.path.join(folders[part], "model.safetensors"))
    torch.save(weights, os.path.join(folders[part], "pytorch_model.bin"))
    with pytest.raises(LusiferError, match=f"the {part} .* has no model.safetensors.*lusifer convert pickled"):
        LusiferModel.from_backbones(**folders)


def test_an_encoder_without_all_of_its_weights_is_refused(tiny_encoder, tiny_llm, tmp_path):
    folder = shutil.copytree(tiny_encoder, tmp_path / "encoder")
    weights = load_file(folder / "model.safetensors")
    del weights[sorted(weights)[-1]]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LusiferError, match="the encoder .* lacks 1 tensors"):
        LusiferModel.from_backbones(str(folder), tiny_llm)


def test_code_in_a_folder_is_not_run(checkpoints, tmp_path):
    trap = tmp_path / "sprung"
    modules = json.loads((checkpoints / "small" / "modules.json").read_text())
    modules[0]["type"] = "trap.Module"
    folder = altered(checkpoints, "small", "modules.json", modules, tmp_path)
    code = f"import os\nos.mkdir({str(trap)!r})\nclass Module: pass\nclass Config: pass\n"
    (folder / "trap.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "trap.Config", "AutoModel": "trap.Module"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LusiferError):
        lusifer.load(str(folder))
    assert not trap.exists()


@pytest.mark.parametrize("kind", ["small", "standalone"])
def test_a_configuration_may_name_no_file_of_weights(checkpoints, kind, tmp_path):
    config = json.loads((checkpoints / kind / "config.json").read_text())
    changed = {**config, "transformers_weights": "../other.bin"}
    with pytest.raises(LusiferError, match="names a file of weights"):
        lusifer.load(str(altered(checkpoints, kind, "config.json", changed, tmp_path)))


class Trap:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("kind", ["small", "standalone", "foreign"])
def test_no_setting_opens_a_pickle(checkpoints, tiny_encoder, kind, tmp_path):
    trap = tmp_path / "sprung"
    if kind == "foreign":
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

        folder, module = tmp_path / "model", Transformer(tiny_encoder)
        SentenceTransformer(modules=[module, Pooling(32)]).save_pretrained(str(folder))
    else:
        folder = shutil.copytree(checkpoints / kind, tmp_path / "model")
    for file, fields in (
        ("sentence_bert_config.json", {"model_kwargs": {"weights_only": False, "use_safetensors": False}}),
        ("config.json", {"transformers_weights": "adapter_model.bin"}),
    ):
        found = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**found, **fields}))
    torch.save({"x": Trap(str(trap))}, folder / "adapter_model.bin")
    with pytest.raises(LusiferError, match="names a file of weights"):
        lusifer.load(str(folder))
    assert not trap.exists()


def test_an_index_may_not_lead_out_of_its_folder(tiny_encoder, tiny_llm, tmp_path):
    folder = shutil.copytree(tiny_llm, tmp_path / "llm")
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(LusiferError, match="which is not a safetensors file in its folder"):
        LusiferModel.from_backbones(tiny_encoder, str(folder))


def test_an_adapter_may_name_no_module(checkpoints, tmp_path):
    config = json.loads((checkpoints / "small" / "config.json").read_text())
    config["llm_adapter"] |= {"megatron_core": "trap", "megatron_config": {"a": 1}}
    with pytest.raises(LusiferError, match="names code to import"):
        lusifer.load(str(altered(checkpoints, "small", "config.json", config, tmp_path)))


def test_a_huge_model_is_refused_before_memory_is_taken(checkpoints, tmp_path):
    config = json.loads((checkpoints / "small" / "config.json").read_text())
    folder = altered(checkpoints, "small", "config.json", {**config, "connector_dim": 2**40}, tmp_path)
    with pytest.raises(LusiferError, match="has other shapes"):
        lusifer.load(str(folder))


def test_the_authors_format_is_converted_or_refused(made, tmp_path):  # noqa: F811
    theirs, _ = made
    config = json.loads((theirs / "config.json").read_text())

    @fuzz(25)
    @given(mutations(config))
    def check(changed):
        folder = tmp_path / "theirs"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(theirs, folder)
        (folder / "config.json").write_text(json.dumps(changed))
        try:
            convert_authors(str(folder), tmp_path / "ours", merge=True)
        except LusiferError as error:
            assert "\n" not in str(error)

    check()


RECORD = {
    "task": "STS17", "type": "STS", "status": "done", "main_scores": {"test": {"de-de": 0.5, "en-en": 0.7}},
    "standard_errors": {"test": {"de-de": 0.01}}, "languages": {"de-de": ["de"], "en-en": ["en"]},
    "versions": {"mteb": "2"}, "prompts": "own", "fingerprint": "x",
}  # fmt: skip
RUN = {"model": "x", "plan": {"STS17": {"splits": ["test"], "subsets": {"de-de": ["de"]}}}, "versions": {"mteb": "2"}}
PROFILE = {
    "bias": {"de": {"same_language": 0.1, "alone": 0.9, "mixed": 0.8}},
    "tokens": {"llm": {"de": 12.5}},
}


@fuzz(150)
@given(mutations({"STS17.json": RECORD, "run.json": RUN, "languages.json": PROFILE}))
def test_results_are_shown_or_named(tmp_path, files):
    from lusifer.evaluation.report import write

    folder = tmp_path / "results"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, value in files.items():
        if name.endswith(".json") and "/" not in name and "\0" not in name:
            (folder / name).write_text(json.dumps(value))
    systems = read([folder])
    assert all(path.stat().st_size for path in write(systems, tmp_path / "report"))
