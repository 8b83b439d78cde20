"""`lusifer init`: what is found in embedders of every style, and a recipe that trains as it stands."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from transformers import AutoModel
from typer.testing import CliRunner

import lusifer
from lusifer.cli.app import app
from lusifer.errors import LusiferError
from lusifer.interop.llm_embedder import inspect_embedder
from lusifer.interop.recipe_writer import compose, recipe_path
from lusifer.recipes.files import load_recipe
from lusifer.training.run import train
from support.adapters import make_adapter
from support.tiny import CORPUS

E5 = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: "


def write(folder, file, value):
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(json.dumps(value))


def edit(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    write(folder, "config.json", {**config, **fields})


@pytest.fixture
def plain(tiny_llm, tmp_path):
    return shutil.copytree(tiny_llm, tmp_path / "plain")


@pytest.fixture
def e5(tiny_llm, tmp_path):
    """As E5-Mistral is published: causal, last token, prompts, no LM head."""
    folder = shutil.copytree(tiny_llm, tmp_path / "e5")
    AutoModel.from_pretrained(tiny_llm).save_pretrained(folder)
    names = {"": "models.Transformer", "1_Pooling": "models.Pooling", "2_Normalize": "models.Normalize"}
    modules = [{"idx": 0, "path": path, "type": f"sentence_transformers.{kind}"} for path, kind in names.items()]
    write(folder, "modules.json", modules)
    write(folder, "1_Pooling/config.json", {"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True})
    write(folder, "config_sentence_transformers.json", {"prompts": {"web": E5}, "default_prompt_name": "web"})
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# An embedder\n")
    return folder


@pytest.fixture
def llm2vec(plain, tmp_path):
    """As LLM2Vec is published: a base LLM, an adapter for two-sided attention, another one for embeddings."""
    mntp = tmp_path / "mntp"
    make_adapter(str(plain), mntp)
    shutil.copy(plain / "config.json", mntp / "config.json")
    edit(mntp, architectures=["LlamaBiForMNTP"], auto_map={"AutoModel": "code.LlamaBiModel"})
    write(mntp, "llm2vec_config.json", {"pooling_mode": "weighted_mean"})
    supervised = tmp_path / "supervised"
    make_adapter(str(plain), supervised, seed=1)
    return mntp, supervised


def said(found):
    return " ".join(f"{note.what} {note.where} {note.so}" for note in found.notes)


def test_a_sentence_transformers_folder_tells_everything(e5):
    found = inspect_embedder(str(e5))
    assert (found.pooling, found.head, found.licence, found.adapters) == ("last_token", False, "mit", [])
    assert found.prompts == {"web": E5, "query": E5}
    assert "normalises" in said(found) and "stage 1, which needs one, is off" in said(found)


def test_a_causal_embedder_is_told_what_stage_2_does(e5):
    edit(e5, is_causal=True)
    found = inspect_embedder(str(e5))
    assert found.causal is True and "stage 2 makes it bidirectional" in said(found)


@pytest.mark.parametrize(
    ("settings", "pooling"),
    [
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last_token"),
        ({"pooling_mode_weightedmean_tokens": True}, "weighted_mean"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True}, "mean"),
        ({"pooling_mode": ["mean", "max"]}, "mean"),
    ],
)
def test_pooling_in_old_and_new_words(e5, settings, pooling):
    write(e5, "1_Pooling/config.json", settings)
    found = inspect_embedder(str(e5))
    assert found.pooling == pooling
    odd = "cls" in str(settings) or isinstance(settings.get("pooling_mode"), list)
    assert ("not for decoders" in said(found)) == odd


def test_pooling_of_an_odd_type_is_named(plain):
    write(plain, "llm2vec_config.json", {"pooling_mode": ["mean", "max"]})
    embedder = inspect_embedder(str(plain))
    assert embedder.pooling == "mean" and "not for decoders" in said(embedder)


def test_a_dense_module_is_left_out_and_said_so(e5):
    modules = json.loads((e5 / "modules.json").read_text())
    write(e5, "modules.json", [*modules, {"idx": 3, "path": "3_Dense", "type": "sentence_transformers.models.Dense"}])
    assert "a Dense module after the LLM" in said(inspect_embedder(str(e5)))


def test_an_adapter_leads_to_its_llm(plain, llm2vec):
    mntp, supervised = llm2vec
    found = inspect_embedder(str(mntp), [str(supervised)])
    assert (found.llm, found.adapters) == (str(plain), [str(mntp), str(supervised)])
    assert (found.causal, found.pooling, found.head) == (False, "weighted_mean", True)
    assert "has custom code" in said(found)


def test_gritlm_is_known_by_its_name(tiny_llm, tmp_path):
    found = inspect_embedder(str(shutil.copytree(tiny_llm, tmp_path / "GritLM-7B")))
    assert (found.causal, found.pooling) == (False, "mean")
    assert found.prompts["query"] == "<|embed|>\n" and "plain characters" in said(found)


def test_a_plain_llm_takes_the_defaults_and_says_so(plain):
    found = inspect_embedder(str(plain))
    assert (found.causal, found.pooling, found.prompts, found.head) == (None, "mean", {}, True)
    for line in ("is not stated", "pooling is not stated", "no prompts", "no licence"):
        assert line in said(found)


def test_the_tokenizer_decides_on_bos(plain):
    assert inspect_embedder(str(plain)).use_bos is False  # The tiny one names a BOS token, but puts none.
    tokenizer = json.loads((plain / "tokenizer.json").read_text())
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [0], "tokens": ["<bos>"]}},
    }
    write(plain, "tokenizer.json", tokenizer)
    assert inspect_embedder(str(plain)).use_bos is True


def test_an_encoder_by_mistake_is_named(tiny_encoder, plain):
    with pytest.raises(LusiferError, match="is not a decoder LLM"):
        inspect_embedder(tiny_encoder)
    with pytest.raises(LusiferError, match="is a decoder LLM; give a bidirectional encoder"):
        compose(str(plain), inspect_embedder(str(plain)))


@pytest.mark.parametrize("file", ["config.json", "modules.json", "1_Pooling/config.json", "adapter_config.json"])
def test_broken_files_are_named(e5, file):
    (e5 / file).write_text("{")
    with pytest.raises(LusiferError):
        inspect_embedder(str(e5))


@pytest.mark.parametrize("value", [[], "x", 3])
def test_files_of_another_shape_are_named(e5, value):
    write(e5, "1_Pooling/config.json", value)
    with pytest.raises(LusiferError, match=r"1_Pooling/config.json of .* holds no mapping"):
        inspect_embedder(str(e5))


@pytest.mark.parametrize("value", [{"prompts": [1]}, {"prompts": {"query": 1}}, {"prompts": None}, {"pooling_mode": 3}])
def test_odd_values_are_passed_over(e5, value):
    write(e5, "config_sentence_transformers.json", value)
    write(e5, "1_Pooling/config.json", value)
    assert inspect_embedder(str(e5)).prompts == {}


def test_an_adapter_that_names_no_llm(tmp_path):
    write(tmp_path, "adapter_config.json", {"peft_type": "LORA"})
    with pytest.raises(LusiferError, match="does not name the LLM"):
        inspect_embedder(str(tmp_path))


def run(*arguments):
    return CliRunner().invoke(app, ["init", *map(str, arguments)])


def test_the_recipe_trains_as_it_stands(e5, tiny_encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"query": text, "positive": f"{text} today"} for text in CORPUS * 12]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in CORPUS * 4))
    done = run("--encoder", tiny_encoder, "--llm", e5, "--data", "pairs.jsonl", "--text", "texts.jsonl", "mine.yaml")
    assert done.exit_code == 0, done.output
    recipe = load_recipe("mine.yaml", ["--contrast.steps", "2", "--contrast.batch_size", "8"])
    assert recipe.output == "runs/mine" and recipe.model.pooling == "last_token" and not recipe.align.enabled
    model = lusifer.load(str(train(recipe, progress=False)))
    assert model.prompts["query"] == E5
    assert model.encode_query(["the sea"]).shape == (1, 48)


def test_every_style_gives_a_recipe_that_loads(plain, e5, llm2vec, tiny_encoder, tmp_path):
    for llm, adapters in ((plain, []), (e5, []), (llm2vec[0], [str(llm2vec[1])])):
        out = tmp_path / "out" / llm.name
        options = [part for adapter in adapters for part in ("--adapter", adapter)]
        done = run("--encoder", tiny_encoder, "--llm", llm, *options, out)
        assert done.exit_code == 0, done.output
        recipe = load_recipe(out / "recipe.yaml")
        assert recipe.output == f"runs/{llm.name}"
        text = (out / "recipe.yaml").read_text()
        assert "# - " in text and "lusifer train THIS --dry-run" in text


def test_large_llms_get_settings_for_gpus(plain, tiny_encoder):
    found = inspect_embedder(str(plain))
    found.parameters, found.dtype = 7_000_000_000, "bfloat16"
    tree = yaml.safe_load(compose(tiny_encoder, found))
    assert tree["scale"] == {"strategy": "fsdp2"} and tree["contrast"]["precision"] == "bfloat16"
    assert tree["model"]["encoder_lora"]["r"] == 16 and tree["align"]["train_encoder"] == "lora"


@pytest.mark.parametrize(("stored", "written"), [("float32", "float32"), ("bfloat16", "auto"), ("float16", "auto")])
def test_small_llms_compute_in_what_is_fast_on_the_machine(plain, tiny_encoder, stored, written):
    found = inspect_embedder(str(plain))
    found.dtype = stored
    assert yaml.safe_load(compose(tiny_encoder, found))["model"]["llm_dtype"] == written


def test_a_recipe_is_not_replaced_unasked(plain, tiny_encoder, tmp_path):
    out = tmp_path / "mine.yaml"
    out.write_text("precious")
    done = run("--encoder", tiny_encoder, "--llm", plain, out)
    assert isinstance(done.exception, LusiferError) and "--force" in str(done.exception)
    assert out.read_text() == "precious"
    assert run("--encoder", tiny_encoder, "--llm", plain, "--force", out).exit_code == 0
    assert load_recipe(out).model.llm == str(plain)


def test_missing_data_is_told_first(plain, tiny_encoder, tmp_path):
    done = run("--encoder", tiny_encoder, "--llm", plain, "--data", tmp_path / "none.jsonl", tmp_path / "mine.yaml")
    assert isinstance(done.exception, LusiferError) and "none.jsonl" in str(done.exception)
    assert not (tmp_path / "mine.yaml").exists()


def test_json_output_holds_what_was_found(e5, tiny_encoder, tmp_path):
    done = run("--encoder", tiny_encoder, "--llm", e5, "--json", tmp_path / "mine.yaml")
    facts = json.loads(done.output)
    assert facts["pooling"] == "last_token" and facts["recipe"].endswith("mine.yaml") and facts["notes"]


@pytest.mark.parametrize(("out", "path"), [("a.yaml", "a.yaml"), ("a.yml", "a.yml"), ("a", "a/recipe.yaml")])
def test_where_the_recipe_goes(tmp_path, out, path):
    assert recipe_path(tmp_path / out) == tmp_path / path
