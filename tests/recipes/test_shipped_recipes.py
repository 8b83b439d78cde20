"""Every shipped recipe parses, and its dry run works on tiny stand-ins for its backbones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, MistralConfig, XLMRobertaConfig

from lusifer import LusiferError
from lusifer.cli.app import app
from lusifer.recipes.files import load_recipe
from lusifer.training.planning.dry_run import dry_run

# What the stand-in of the encoder reads, and that the stand-in of the LLM is narrow.
WINDOW = ["--model.max_seq_length", "128", "--contrast.matryoshka_dims", "[]"]
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def test_all_are_here():
    names = {path.name for path in RECIPES}
    assert {"starter.yaml", "paper-xlmr-mistral.yaml", "modern.yaml", "quickstart.yaml"} <= names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_runs_dry_on_stand_ins(path, tiny_encoder, tiny_llm):
    recipe = load_recipe(path, ["--model.encoder", tiny_encoder, "--model.llm", tiny_llm, *WINDOW])
    for item in [*recipe.align.data, *recipe.contrast.data]:
        assert item.source
    recipe.model.llm_layers = None
    if recipe.contrast.llm_layers:
        recipe.contrast.llm_layers = 2
    facts = dry_run(recipe, str(path), ranks=2)
    for name, stage in facts["stages"].items():
        settings = getattr(recipe, name)
        assert stage["steps"] == settings.steps and stage["rows per step"] == settings.batch_size
        assert stage["trainable parameters"] > 0 and stage["memory_gb_total"] >= 0
    assert facts["launch"] == f"torchrun --nproc-per-node 2 -m lusifer train {path}"
    assert facts["parameters"]["llm adapter"]["trainable"] > 0


def test_recipes_for_any_cpu_leave_the_data_type_to_it():
    """bfloat16 halves the time of a pass where the CPU has instructions for it, and doubles it elsewhere."""
    for name in ("quickstart", "quickstart-full-depth", "starter"):
        recipe = load_recipe(next(path for path in RECIPES if path.stem == name))
        chosen = (recipe.model.encoder_dtype, recipe.model.llm_dtype, recipe.align.precision, recipe.contrast.precision)
        assert "auto" in chosen and set(chosen) <= {"auto", "float32"}, name


def test_the_paper_recipe_has_the_published_figures():
    recipe = load_recipe(next(path for path in RECIPES if path.stem == "paper-xlmr-mistral"))
    for lora in (recipe.model.encoder_lora, recipe.model.llm_lora):
        assert (lora.r, lora.alpha, lora.dropout) == (16, 32, 0.1)
    assert recipe.model.num_added_tokens == 1 and recipe.model.max_seq_length == 512
    assert (recipe.align.learning_rate, recipe.contrast.learning_rate) == (2e-4, 5e-5)
    assert recipe.align.mask_probability == 0.5 and recipe.contrast.temperature == 0.05
    assert (recipe.align.schedule, recipe.align.warmup_share) == ("cosine", 0.1)
    assert (recipe.contrast.schedule, recipe.contrast.warmup_share) == ("cosine", 0.1)
    assert (recipe.align.batch_size, recipe.align.data[0].cap) == (256, 500_000)
    assert (recipe.model.connector_dim, recipe.model.head_dim) == (1024, 4096)
    # 32 records a batch, each with three positives and about 32 negatives.
    for item in recipe.contrast.data:
        assert (recipe.contrast.batch_size / item.positives, item.positives, item.cap) == (32, 3, 20_000)
        assert item.positives * item.hard_negatives == 33
    assert not recipe.warm_start.enabled
    own = [item for item in recipe.contrast.data if not item.in_batch_negatives]
    assert own and all(item.start == 0.5 for item in own)  # Retrieval first, then everything.


def test_the_paper_recipe_reads_the_published_sets():
    if not (facts := Path(__file__).parents[3] / "shared" / "reference" / "published_training.json").is_file():
        pytest.skip("a list of what the authors train on is not here")
    published = json.loads(facts.read_text())
    recipe = load_recipe(next(path for path in RECIPES if path.stem == "paper-xlmr-mistral"))
    chinese = {"Hieuman/dureader", "Hieuman/t2ranking", "Hieuman/zh_MIRACL"}
    tasks = {"reconstruct": [], "passage_to_query": [], "query_to_passage": []}
    for item in recipe.align.data:
        direction = "passage_to_query" if item.reverse else "query_to_passage"
        tasks[item.task if item.task == "reconstruct" else direction].append(item.source)
    for task, sources in tasks.items():
        assert sources == [source for source in published["stage1"][task] if source not in chinese]
    assert len({item.instruction for item in recipe.align.data}) == 3
    for name, in_batch in (("in_batch_negatives", True), ("own_negatives_only", False)):
        sources = [item.source for item in recipe.contrast.data if item.in_batch_negatives == in_batch]
        assert sorted(sources) == sorted(published["stage2"][name])
    assert all(item.instruction for item in recipe.contrast.data)


def test_real_sizes_come_from_configurations_alone(tmp_path):
    """XLM-R-large and Mistral-7B from nothing but their config.json: 0.56 and 7.1 billion parameters, no weights."""
    XLMRobertaConfig(
        vocab_size=250002, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
        max_position_embeddings=514, type_vocab_size=1,
    ).save_pretrained(tmp_path / "encoder")  # fmt: skip
    MistralConfig().save_pretrained(tmp_path / "llm")
    assert AutoConfig.from_pretrained(tmp_path / "llm").num_hidden_layers == 32
    path = next(path for path in RECIPES if path.stem == "paper-xlmr-mistral")
    recipe = load_recipe(path, ["--model.encoder", str(tmp_path / "encoder"), "--model.llm", str(tmp_path / "llm")])
    one, eight = (dry_run(recipe, "r", ranks=ranks) for ranks in (1, 8))
    assert one["parameters"]["encoder"]["total"] == pytest.approx(559e6, rel=0.01)
    assert one["parameters"]["llm"]["total"] == pytest.approx(7.11e9, rel=0.01)
    weights = [run["stages"]["align"]["memory_gb"]["weights"] for run in (one, eight)]
    assert weights[0] == pytest.approx(2 * 7.7, rel=0.02) and weights[1] == pytest.approx(weights[0] / 8, rel=0.01)
    recipe.model.quantization = "4bit"
    assert dry_run(recipe, "r")["stages"]["align"]["memory_gb"]["weights"] < 6


def test_a_missing_backbone_is_one_line(tmp_path, tiny_encoder):
    options = ["--model.encoder", tiny_encoder, "--model.llm", str(tmp_path / "nothing"), *WINDOW]
    recipe = load_recipe(RECIPES[0], options)
    with pytest.raises(LusiferError, match="nothing"):
        dry_run(recipe, "r")


def test_the_command_prints_a_plan_and_loads_no_weights(tiny_encoder, tiny_llm, tmp_path):
    from typer.testing import CliRunner

    path = next(path for path in RECIPES if path.stem == "modern")
    options = ["--model.encoder", tiny_encoder, "--model.llm", tiny_llm, *WINDOW]
    done = CliRunner().invoke(app, ["train", str(path), "--dry-run", "--ranks", "4", "--json", *options])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["stages"]["contrast"]["rows per rank"] == 256
    assert not (tmp_path / "runs").exists()
    done = CliRunner().invoke(app, ["train", str(path), "--dry-run", *options])
    assert "lusifer train" in done.stdout and "memory_gb" in done.stdout
