"""Model cards: metadata that the hub's own parser reads, facts from the run and its scores, no paths, no guesses."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from lusifer.cli.app import app
from lusifer.errors import LusiferError
from lusifer.model.card import CardScores, is_hub_id, make_card, write_card
from lusifer.recipes.schema import Recipe
from lusifer.storage import without_paths
from lusifer.training.run import recipe_for_provenance

RECIPE = {
    "output": "/home/me/runs/x",
    "model": {"encoder": "acme/encoder", "llm": "acme/llm"},
    "warm_start": {"data": "/home/me/secret/english.jsonl"},
    "contrast": {"data": [{"source": "acme/pairs"}, {"source": "/home/me/secret/pairs.jsonl"}], "steps": 70},
}
CONFIG = {
    "model_type": "lusifer",
    "encoder": "acme/encoder",
    "encoder_revision": "f00",
    "llm": "acme/llm",
    "llm_base_adapters": ["acme/mntp@1"],
    "encoder_config": {"languages": ["de", "en"]},
    "llm_config": {"hidden_size": 48, "num_hidden_layers": 3},
    "pooling": "mean",
    "max_seq_length": 64,
    "provenance": {
        "recipe": recipe_for_provenance(Recipe.model_validate(RECIPE)),
        "stages": {"contrast": {"loss": 0.5, "seconds": 3.0}, "warm_start": {"seconds": 1.0}},
    },
}


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    record = {
        "task": "STS17", "type": "STS", "status": "done", "main_scores": {"test": {"de-de": 0.5, "en-en": 0.7}},
        "languages": {"de-de": ["de"], "en-en": ["en"]}, "versions": {"mteb": "2.26"},
    }  # fmt: skip
    (folder / "STS17.json").write_text(json.dumps(record))
    return folder


def test_a_card_says_what_is_known(results, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    arguments = ["card", str(tmp_path), "--license", "mit", "--results", str(results), "--name", "acme/small"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit" and card.data.language == ["de", "en"]
    assert card.data.base_model == ["acme/encoder", "acme/llm"] and card.data.datasets == ["acme/pairs"]
    assert {r.dataset_config: r.metric_value for r in card.data.eval_results} == {"de-de": 50.0, "en-en": 70.0}
    text = card.text
    for part in ("| de | 50.0 | 1 |", "**60.0**", "acme/mntp@1", "| encoder | `acme/encoder` | f00 |", "mteb 2.26"):
        assert part in text, part
    assert "| contrast | 70 | 0.500 | 3.0 |" in text
    assert text.index("| warm_start |") < text.index("| contrast |")


NASTY = ["a|b\nc`d", "---\nlicense: mit\n---", "{{ 1 + 1 }}", "<script>alert(1)</script>", "no: yes", "# x", "```"]


@pytest.mark.parametrize("text", NASTY)
def test_nothing_in_a_configuration_breaks_the_card(text):
    """Names and prompts are data: they neither end a table or a block of code, nor become metadata or markup."""
    config = {**CONFIG, "encoder": text, "llm": text, "llm_base_adapters": [text], "encoder_revision": text}
    config["encoder_config"] = {"languages": ["no", "en"]}
    recipe = {"contrast": {"data": [{"source": text, "instruction": text}]}, "model": {"prompts": {"query": text}}}
    config["provenance"] = {"recipe": recipe, "converted_from": text}
    scores = CardScores({"no": (50.0, 1)})
    card = ModelCard(make_card(config, name=text, licence="mit", scores=scores))
    assert card.data.license == "mit" and card.data.language == ["en", "no"] and card.data.base_model is None
    plain = make_card({**CONFIG, "provenance": {"recipe": {"seed": 1}, "converted_from": "x"}}, scores=scores)
    headings = [
        line for line in card.text.split("````")[0].split("<details>")[0].splitlines() if line.startswith("## ")
    ]
    assert headings == [line for line in plain.split("<details>")[0].splitlines() if line.startswith("## ")]
    columns = [line for line in card.text.split("## Architecture")[1].split("\n\n")[1].splitlines()]
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in columns] == [4] * 5
    assert "<script>" not in card.text.split("<details>")[0].replace("`<script>alert(1)</script>`", "").split("```")[0]
    fence = re.search(r"(`{3,})yaml\n", card.text)[1]
    assert yaml.safe_load(card.text.split(fence + "yaml\n")[1].split("\n" + fence)[0]) == recipe


def test_the_recipe_in_it_is_one_and_holds_no_paths():
    text = make_card(CONFIG)
    assert "/home" not in text and "secret" not in text
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe["contrast"]["data"][1]["source"] == "pairs.jsonl"
    assert Recipe.model_validate({"output": "x", **recipe}).contrast.steps == 70


def test_nothing_is_guessed():
    text = make_card({"model_type": "lusifer"})
    for part in ("Not set. It depends", "Not evaluated yet", "`unknown`", "not pinned"):
        assert part in text
    metadata = yaml.safe_load(text.split("---")[1])
    assert not {"license", "language", "base_model", "datasets", "model-index"} & set(metadata)


@pytest.mark.parametrize(
    ("name", "is_one"),
    [("acme/x", True), ("./x/y", False), ("/a/b", False), ("a", False), ("a/b/c", False), ("starter:x", False)],
)
def test_hub_ids(name, is_one):
    assert is_hub_id(name) is is_one


def test_paths_are_shortened_everywhere():
    tree = {"a": ["/x/y.jsonl", "~/z.jsonl", "../up/w.jsonl", "C:\\data\\v.jsonl"], "b": {"c": "org/name", "d": 3}}
    assert without_paths(tree) == {"a": ["y.jsonl", "z.jsonl", "w.jsonl", "v.jsonl"], "b": {"c": "org/name", "d": 3}}


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read"), ("[]", "another model"), ('{"model_type": "llama"}', "another model")],
)
def test_other_folders_get_none(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(LusiferError, match=message):
        write_card(tmp_path)
    assert not (tmp_path / "README.md").exists()
