"""Recipes: what is accepted, and one clear line for everything that is not."""

from __future__ import annotations

import tracemalloc
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from lusifer import LusiferError
from lusifer.evaluation.mteb_model import load_prompts
from lusifer.recipes.files import load_recipe, load_yaml, parse_overrides
from lusifer.recipes.schema import Recipe
from lusifer.training.run import fingerprint

ROOT = Path(__file__).parents[2]
BASE = {
    "output": "runs/x",
    "model": {"encoder": "e", "llm": "l"},
    "align": {"data": [{"source": "texts.jsonl", "task": "reconstruct"}]},
    "contrast": {"data": [{"source": "pairs.jsonl"}]},
}


def written(tmp_path, tree):
    path = tmp_path / "recipe.yaml"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree), encoding="utf-8")
    return path


def changed(**sections):
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in BASE.items()}
    for name, value in sections.items():
        tree[name] = {**tree.get(name, {}), **value} if isinstance(value, dict) else value
    return tree


def with_sets(stage, *sets, **fields):
    """The recipe with these sets; ``source`` is filled in, and in stage 1 the task."""
    task = {"task": "complete"} if stage == "align" else {}
    return changed(**{stage: {"data": [{"source": "s.jsonl", **task, **item} for item in sets], **fields}})


def refused(tmp_path, tree, overrides=()):
    with pytest.raises(LusiferError) as caught:
        load_recipe(written(tmp_path, tree), overrides)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def test_every_shipped_recipe_is_valid():
    shipped = sorted((ROOT / "recipes").glob("*.yaml"))
    bundled = Path(str(files("lusifer") / "resources" / "quickstart.yaml"))
    assert "quickstart.yaml" in {path.name for path in shipped}
    for path in (*shipped, bundled):
        recipe = load_recipe(path)
        assert recipe.align.enabled or recipe.contrast.enabled
    quickstart = load_recipe(bundled)
    assert quickstart.model.llm_layers == 4
    assert quickstart.contrast.learning_rate == 1e-3
    assert quickstart.align.train_encoder == "frozen"
    # As many steps of completion as the recipe says: 0.25 of them.
    shares = [item.weight * rows for item, rows in zip(quickstart.align.data, (22_976, 9_312), strict=True)]
    assert shares[1] / sum(shares) == pytest.approx(0.25, abs=1e-4)


def test_a_short_recipe_gets_the_documented_defaults(tmp_path):
    recipe = load_recipe(written(tmp_path, BASE))
    assert recipe.contrast.temperature == 0.05
    item = recipe.contrast.data[0]
    assert (item.in_batch_negatives, item.hard_negatives, item.weight, item.cap) == (True, 0, 1.0, None)
    assert (item.task, item.split, item.start, item.end) == ("contrast", "train", 0.0, 1.0)
    assert (recipe.model.llm_lora.r, recipe.model.llm_lora.alpha, recipe.model.llm_lora.dropout) == (16, 32, 0.1)
    assert recipe.warm_start.enabled and recipe.align.enabled and recipe.contrast.enabled


def test_left_out_stages_are_off(tmp_path):
    tree = {"output": "o", "model": {"encoder": "e", "llm": "l"}, "warm_start": {"data": "texts.jsonl"}}
    recipe = load_recipe(written(tmp_path, tree))
    assert not recipe.align.enabled and not recipe.contrast.enabled


@pytest.mark.parametrize(
    ("tree", "key", "near"),
    [
        (changed(algin={"steps": 3}), "algin", "align"),
        (changed(model={"encodr": "e"}), "model.encodr", "encoder"),
        (changed(contrast={"temprature": 1}), "contrast.temprature", "temperature"),
        (changed(model={"llm_lora": {"drop_out": 0.1}}), "model.llm_lora.drop_out", "dropout"),
        (changed(model={"encoder_lora": {"alhpa": 3}}), "model.encoder_lora.alhpa", "alpha"),
        (with_sets("align", {}, {"wieght": 2}), "align.data.1.wieght", "weight"),
        (with_sets("contrast", {"hard_negative": 2}), "contrast.data.0.hard_negative", "hard_negatives"),
    ],
)
def test_unknown_keys_at_any_depth_offer_the_nearest(tmp_path, tree, key, near):
    message = refused(tmp_path, tree)
    assert f"unknown key '{key}'" in message
    assert f"did you mean '{near}'?" in message


def test_an_unknown_key_near_nothing_lists_what_there_is(tmp_path):
    message = refused(tmp_path, changed(model={"llm_lora": {"zzz": 1}}))
    assert "known keys: alpha, dropout, r, target_modules" in message


@pytest.mark.parametrize(
    ("tree", "field"),
    [
        (changed(align={"steps": "many"}), "align.steps"),
        (changed(align={"steps": 0}), "align.steps"),
        (changed(align={"steps": 2.5}), "align.steps"),
        (changed(align={"mask_probability": 1.5}), "align.mask_probability"),
        (changed(align={"mask_probability": [0.5]}), "align.mask_probability"),
        (changed(align={"mask_probability": [0.1, 0.5, 0.9]}), "align.mask_probability"),
        (changed(align={"mask_probability": [0.1, float("nan")]}), "align.mask_probability"),
        (changed(align={"mask_probability": "half"}), "align.mask_probability"),
        (changed(align={"mask_probability": None}), "align.mask_probability"),
        (with_sets("align", {}, {"weight": 0}), "align.data.1.weight"),
        (with_sets("align", {"task": "contemplate"}), "align.data.0.task"),
        (with_sets("align", {"reverse": 1.1}), "align.data.0.reverse"),
        (with_sets("contrast", {"cap": 0}), "contrast.data.0.cap"),
        (with_sets("contrast", {"end": 1.5}), "contrast.data.0.end"),
        (with_sets("contrast", {"source": ""}), "contrast.data.0.source"),
        (with_sets("contrast", {"columns": {"quiry": "question"}}), "contrast.data.0.columns"),
        (changed(contrast={"matryoshka_dims": [64, -1]}), "contrast.matryoshka_dims.1"),
        (changed(contrast={"report_to": ["mail"]}), "contrast.report_to.0"),
        (changed(contrast={"precision": "float16"}), "contrast.precision"),
        (changed(seed=-1), "seed"),
        (changed(contrast={"temperature": 0}), "contrast.temperature"),
        (changed(contrast={"train_encoder": "thawed"}), "contrast.train_encoder"),
        (changed(contrast={"learning_rate": float("nan")}), "contrast.learning_rate"),
        (changed(model={"pooling": "max"}), "model.pooling"),
        (changed(model={"llm_dtype": "int8"}), "model.llm_dtype"),
        (changed(model={"llm_lora": {"dropout": 1.0}}), "model.llm_lora.dropout"),
        (changed(model={"max_seq_length": 3}), "model.max_seq_length"),
        (changed(model=[1]), "model"),
        (changed(seed="x"), "seed"),
        ({k: v for k, v in BASE.items() if k != "output"}, "output"),
        (changed(model={"llm": None}), "model.llm"),
    ],
)
def test_wrong_values_name_the_field(tmp_path, tree, field):
    assert f": {field}" in refused(tmp_path, tree)


def numbers(model, path=()):
    """Every field that takes a decimal number, by its path."""
    for name, field in model.model_fields.items():
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        kinds += [inner for kind in kinds for inner in getattr(kind, "__args__", ())]
        if float in kinds:
            yield (*path, name)
        for kind in kinds:
            if isinstance(kind, type) and hasattr(kind, "model_fields"):
                yield from numbers(kind, (*path, name, *(["0"] if "list" in str(field.annotation) else [])))


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
def test_no_number_of_a_recipe_is_infinite_or_nan(tmp_path, value):
    paths = [".".join(path) for path in numbers(Recipe)]
    assert {"align.learning_rate", "contrast.temperature", "contrast.data.0.weight", "model.llm_lora.dropout"} <= {
        *paths
    }
    for path in paths:
        assert path in refused(tmp_path, changed(model={"llm_lora": {}, "encoder_lora": {}}), [f"--{path}={value}"])


def test_a_missing_field_is_called_missing_without_printing_the_section(tmp_path):
    tree = changed()
    del tree["model"]["llm"]
    message = refused(tmp_path, tree)
    assert "model.llm" in message and "required" in message
    assert "encoder" not in message


def test_yaml_reads_1e_5_as_text_and_we_read_a_number(tmp_path):
    text = yaml.safe_dump(BASE).replace("contrast:", "contrast:\n  learning_rate: 1e-5")
    assert isinstance(yaml.safe_load(text)["contrast"]["learning_rate"], str)
    assert load_recipe(written(tmp_path, text)).contrast.learning_rate == 1e-5


def test_overrides_in_both_spellings(tmp_path):
    overrides = ["--align.steps", "7", "--contrast.learning_rate=3e-4", "--model.llm_lora.r", "4", "--output=elsewhere"]
    recipe = load_recipe(written(tmp_path, BASE), overrides)
    assert recipe.align.steps == 7
    assert recipe.contrast.learning_rate == 3e-4
    assert recipe.model.llm_lora.r == 4
    assert recipe.output == "elsewhere"


def test_overrides_are_yaml_and_accept_dashes_and_make_sections(tmp_path):
    instruction = "--contrast.data.0.instruction"
    overrides = ["--warm-start.enabled", "false", "--model.llm_lora", "null", instruction, "a: b" + "c"]
    with pytest.raises(LusiferError, match="contrast.data.0.instruction"):  # A mapping, once read as YAML.
        load_recipe(written(tmp_path, BASE), overrides)
    recipe = load_recipe(written(tmp_path, BASE), [*overrides[:4], instruction, "'a: b'"])
    assert not recipe.warm_start.enabled
    assert recipe.model.llm_lora is None
    assert recipe.contrast.data[0].instruction == "a: b"


def test_the_last_override_wins():
    assert parse_overrides(["--a.b", "1", "--a.b=2"]) == [("a.b", 1), ("a.b", 2)]
    assert parse_overrides(["--a=x=y"]) == [("a", "x=y")]
    assert parse_overrides(["--a", "-1"]) == [("a", -1)]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--align.steps"], "'--align.steps' lacks a value"),
        (["--align.steps", "--contrast.steps", "3"], "'--align.steps' lacks a value"),
        (["align.steps", "3"], "unexpected argument 'align.steps'"),
        (["--output.folder", "3"], "'output' is not a section"),
        (["--align.steps.more", "3", "--align.steps.more.still", "3"], "is not a section"),
        (["--align.stepz", "3"], "did you mean 'steps'?"),
        (["--align.data.0.wieght", "3"], "'align.data.0.wieght'; did you mean 'weight'?"),
        (["--align.data.1.weight", "3"], "the list has 1 items, counted from 0, not '1'"),
        (["--align.data.first.weight", "3"], "the list has 1 items, counted from 0, not 'first'"),
        (["--align.data.-1", "3"], "the list has 1 items"),
        (["--align.data.0.source.name", "3"], "'source' is not a section"),
        (["--align.steps", "[1"], "'--align.steps' is not valid YAML"),
    ],
)
def test_bad_overrides(tmp_path, overrides, words):
    tree = changed(align={"steps": 5})
    assert words in refused(tmp_path, tree, overrides)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({**changed(warm_start={"enabled": False}), "align": {"steps": 5}}, "align: stage 1 needs data"),
        (
            changed(scale={"strategy": "fsdp2"}, model={"quantization": "4bit"}),
            "cannot be sharded; use scale.strategy: ddp",
        ),
        ({**BASE, "contrast": {"steps": 5}}, "contrast: stage 2 needs data"),
        (with_sets("contrast", {}, {"in_batch_negatives": False}), "contrast.data.1: no negatives: set hard_negatives"),
        (with_sets("contrast", {"streaming": True}), "contrast.data.0: a streaming set needs cap"),
        (with_sets("contrast", {"start": 0.5, "end": 0.5}), "contrast.data.0: start (0.5) must be less than end"),
        (with_sets("contrast", {"task": "complete"}), "data.0.task must be contrast"),
        (with_sets("contrast", {"reverse": 0.5}), "contrast.data.0: reverse is for task: complete"),
        (with_sets("align", {"task": "reconstruct", "reverse": 0.5}), "align.data.0: reverse is for task: complete"),
        (with_sets("align", {"task": None}), "data.0.task must be reconstruct or complete"),
        (with_sets("align", {"task": "contrast"}), "data.0.task must be reconstruct or complete"),
        (with_sets("align", {"positives": 3}), "data.0.positives is for stage 2; remove it"),
        (changed(align={"warmup_steps": 3, "warmup_share": 0.1}), "are alternatives: set only one"),
        (with_sets("align", {}, {"hard_negatives": 1}), "data.1.hard_negatives is for stage 2; remove it"),
        (with_sets("align", {"document_instruction": "Keep"}), "data.0.document_instruction is for stage 2; remove it"),
        (with_sets("align", {"start": 0.1}), "align: no dataset is used after 0 of the steps"),
        (with_sets("align", {"end": 0.5}, {"end": 0.7}), "align: no dataset is used after 0.7 of the steps"),
        (with_sets("align", {"end": 0.4}, {"start": 0.5}), "align: no dataset is used after 0.4 of the steps"),
        (changed(contrast={"matryoshka_dims": [64, 32]}), "matryoshka_dims must increase: [32, 64]"),
        (changed(contrast={"guide_margin": 0.1}), "guide_margin needs guide"),
        (changed(contrast={"batch_size": 1}), "batch_size is 1: a row has no negatives"),
        (changed(contrast={"best_metric": "loss"}), "best_metric needs eval_steps"),
        (changed(contrast={"best_metric": "los", "eval_steps": 5}), "nothing measures 'los'; there are loss"),
        (changed(contrast={"best_metric": "teacher_cosine", "eval_steps": 5}), "nothing measures 'teacher_cosine'"),
        (changed(align={"best_metric": "loss", "eval_steps": 5}), "there are visible_own_accuracy, visible_own_cross"),
        (changed(contrast={"distill": 1.0}), "distill needs guide"),
        (changed(contrast={"distill": -1.0, "guide": "encoder"}), "distill"),
        (changed(contrast={"guide": "encoder"}), "guide has no effect without"),
        (changed(model={"connector_residual": False}), "model.connector_residual"),
        ({"output": "o", "model": BASE["model"]}, "warm_start.data"),
        (changed(align={"train_encoder": "lora"}), "model.encoder_lora"),
        (changed(contrast={"train_encoder": "lora"}), "model.encoder_lora"),
        (
            changed(warm_start={"enabled": False}, align={"enabled": False}, contrast={"enabled": False}),
            "every stage is disabled",
        ),
        (changed(align={"train_connector": False}), "align"),
        (changed(contrast={"train_connector": False}, model={"llm_lora": None}), "contrast"),
    ],
)
def test_what_does_not_fit_together(tmp_path, tree, words):
    assert words in refused(tmp_path, tree)


def test_overrides_reach_the_items_of_a_list(tmp_path):
    path = written(tmp_path, with_sets("align", {"task": "reconstruct"}, {}))
    overrides = ["--align.data.0.weight", "2", "--align.data.1.reverse=0.5", "--align.mask_probability", "[0.2, 0.9]"]
    recipe = load_recipe(path, overrides)
    assert [item.weight for item in recipe.align.data] == [2.0, 1.0]
    assert recipe.align.data[1].reverse == 0.5
    assert recipe.align.mask_probability == (0.2, 0.9)
    recipe = load_recipe(path, ["--align.data", "[{source: other.jsonl, task: complete}]"])
    assert [item.source for item in recipe.align.data] == ["other.jsonl"]


def test_a_schedule_whose_sets_follow_each_other(tmp_path):
    tree = with_sets("align", {"end": 0.5}, {"start": 0.5, "end": 0.75}, {"start": 0.25})
    assert [item.end for item in load_recipe(written(tmp_path, tree)).align.data] == [0.5, 0.75, 1.0]


def test_what_stage_0_reads(tmp_path):
    def source(tree, **warm_start):
        return load_recipe(written(tmp_path, {**tree, "warm_start": warm_start})).warm_start_data().source

    assert source(BASE) == "texts.jsonl"
    assert source(BASE, data="other.jsonl") == "other.jsonl"
    assert source(with_sets("align", {"source": "a"}, {"source": "b", "task": "reconstruct"})) == "b"
    assert source(with_sets("align", {"source": "a"})) == "pairs.jsonl"
    assert source({key: BASE[key] for key in ("output", "model", "contrast")}) == "pairs.jsonl"


def test_a_warm_start_needs_a_residual_only_if_it_runs(tmp_path):
    tree = changed(model={"connector_residual": False}, warm_start={"enabled": False})
    assert not load_recipe(written(tmp_path, tree)).model.connector_residual


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words", "model: [1\n", "a: b: c", "a: \t- x"])
def test_files_that_are_no_recipe(tmp_path, text):
    assert "recipe.yaml" in refused(tmp_path, text)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(LusiferError, match=r"nowhere\.yaml.*No such file"):
        load_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(LusiferError, match="directory"):
        load_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"output: \xe9\n")
    with pytest.raises(LusiferError, match="not valid YAML"):
        load_recipe(tmp_path / "latin.yaml")


RENAMED = [
    (section, earlier, today)
    for section, field in Recipe.model_fields.items()
    for earlier, today in getattr(field.annotation, "renamed", {}).items()
]


def test_the_renamed_keys_are_known():
    expected = [("model", "connector_shortcut", "connector_residual")]
    for stage in ("align", "contrast"):
        expected += [(stage, "encoder", "train_encoder"), (stage, "connector", "train_connector")]
    assert expected == RENAMED


@pytest.mark.parametrize(("section", "earlier", "today"), RENAMED)
def test_a_key_of_before_is_refused_with_its_new_name(tmp_path, section, earlier, today):
    message = f"{section}: {earlier} is now called {today}; rename the key"
    assert message in refused(tmp_path, changed(**{section: {earlier: True}}))
    assert message in refused(tmp_path, BASE, [f"--{section}.{earlier}", "true"])
    assert today in Recipe.model_fields[section].annotation.model_fields


VOLATILE = [
    ("gradient_checkpointing", True),
    ("max_tokens", 64),
    ("graph_tokens", 64),
    ("save_steps", 7),
    ("save_total_limit", 7),
    ("eval_steps", 7),
    ("logging_steps", 7),
    ("report_to", ["wandb"]),
    ("max_loss", 7.0),
]


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("model", "attn_implementation", "eager"),
        *((stage, *change) for stage in ("align", "contrast") for change in VOLATILE),
    ],
)
def test_what_decides_speed_memory_and_logs_may_change_when_a_run_goes_on(section, field, value):
    one, other = (Recipe.model_validate(changed(**change)) for change in ({}, {section: {field: value}}))
    assert getattr(getattr(one, section), field) != getattr(getattr(other, section), field)
    for stage in ("warm_start", "align", "contrast"):
        assert fingerprint(one, stage) == fingerprint(other, stage)


@pytest.mark.parametrize(("stage", "metric"), [("align", "hidden_own_accuracy"), ("contrast", "loss")])
def test_another_best_metric_is_the_same_run(stage, metric):
    one = Recipe.model_validate(changed(**{stage: {"eval_steps": 5}}))
    other = Recipe.model_validate(changed(**{stage: {"eval_steps": 5, "best_metric": metric}}))
    assert fingerprint(one, "contrast") == fingerprint(other, "contrast")


def test_fields_of_a_disabled_stage_may_change_but_not_the_data_that_stage_0_reads():
    one, other, read = (
        Recipe.model_validate(changed(align={"enabled": False, **fields}))
        for fields in ({}, {"steps": 7, "learning_rate": 1.0}, {"data": [{"source": "x", "task": "complete"}]})
    )
    assert fingerprint(one, "contrast") == fingerprint(other, "contrast")
    assert fingerprint(one, "contrast") != fingerprint(read, "contrast")
    assert fingerprint(one, "contrast") != fingerprint(Recipe.model_validate(BASE), "contrast")


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("model", "encoder_dtype", "bfloat16"),
        ("warm_start", "ridge", 7.0),
        ("align", "precision", "bfloat16"),
        ("contrast", "temperature", 7.0),
    ],
)
def test_what_decides_the_result_may_not_change(section, field, value):
    other = Recipe.model_validate(changed(**{section: {field: value}}))
    assert fingerprint(other, "contrast") != fingerprint(Recipe.model_validate(BASE), "contrast")


def test_a_run_begun_under_the_earlier_keys_goes_on():
    """The fingerprints are those that the earlier keys gave: a run's folder keeps its stages."""
    tree = changed(
        model={"encoder": "acme/encoder", "llm": "acme/llm", "connector_residual": True, "encoder_lora": {"r": 2}},
        align={
            "train_encoder": "lora",
            "train_connector": False,
            "data": [{"source": "t.jsonl", "task": "reconstruct"}],
        },
        contrast={"train_encoder": "full", "data": [{"source": "p.jsonl"}]},
        seed=7,
    )
    recipe = Recipe.model_validate(tree)
    assert [fingerprint(recipe, name)[:16] for name in ("warm_start", "align", "contrast")] == [
        "77dde62ac44ac7e6",
        "f63b8b59b2ef5aa1",
        "6ba16eb70497d1fd",
    ]


def laughs(levels, merged=False):
    """Aliases of aliases, nine of each."""
    lines = ["a0: &a0 {x: lol}" if merged else "a0: &a0 [lol]"]
    for level in range(1, levels):
        inner = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"a{level}: &a{level} " + (f"{{<<: [{inner}]}}" if merged else f"[{inner}]"))
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [laughs(10), laughs(10, merged=True), "a: &a [*a]", "a: &a {b: *a}"],
    ids=["lists", "merged mappings", "a list in itself", "a mapping in itself"],
)
def test_aliases_that_unfold_without_end_are_refused(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    tracemalloc.start()
    try:
        with pytest.raises(LusiferError, match="aliases expand to more than 10,000,000 characters"):
            load_recipe(path)
        with pytest.raises(LusiferError, match="aliases expand to more than 10,000,000 characters"):
            load_prompts(path)
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()


def test_aliases_of_people_are_read():
    assert load_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]") == {
        "a": {"x": 1},
        "b": {"x": 1, "y": 2},
        "c": [{"x": 1}, {"x": 1}],
    }


@pytest.mark.parametrize("text", ["[" * 5000, "a: 2001-13-45", "a: " + "1" * 5000], ids=["deep", "date", "number"])
def test_yaml_that_is_no_value_is_one_line(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(LusiferError, match="is not valid YAML"):
        load_recipe(path)
    with pytest.raises(LusiferError, match="the value of '--seed' is not valid YAML"):
        parse_overrides(["--seed", text.removeprefix("a: ")])
