"""A teacher beside the losses of both stages: gradients, whole runs, what is refused."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

import lusifer
import lusifer.training.stages
from lusifer import LusiferError, LusiferModel
from lusifer.data.collate import column_texts
from lusifer.recipes.schema import Recipe
from lusifer.teacher.embedder import Teacher
from lusifer.teacher.loss import teacher_loss
from lusifer.training.alignment import AlignmentLoss, LMHead
from lusifer.training.contrastive import ContrastiveLoss
from lusifer.training.llm_baseline import train_llm_alone
from lusifer.training.run import check_inputs, fingerprint, train
from lusifer.training.stages import prepare_stage, stage_mixture
from lusifer.training.teaching import vectors_of
from support.adapted import save_adapted
from support.batches import align_batch, assert_same, contrast_batch, learning, on_two_ranks, part, step_gradients
from support.kill import Killed, kill_in
from support.launch import run
from support.teachers import save_teacher, sentences

STEPS = 8


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    prompts = {"query": "the ", "document": "a "}
    return save_teacher(tmp_path_factory.mktemp("teacher"), prompts=prompts)


@pytest.fixture(scope="module")
def adapted(tiny_encoder, teacher, tmp_path_factory):
    """Without dropout, which draws other numbers on other ranks."""
    folder = tmp_path_factory.mktemp("adapted")
    still = Path(shutil.copytree(tiny_encoder, folder / "encoder"))
    config = json.loads((still / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (still / "config.json").write_text(json.dumps(config))
    return save_adapted(folder / "model", str(still), teacher)


@pytest.fixture(scope="module")
def tree(adapted, tiny_llm, teacher, tmp_path_factory):
    """A recipe of all stages, as a dictionary."""
    folder = tmp_path_factory.mktemp("data")
    texts = sentences(120)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pairs = [{"query": text, "positive": " ".join(text.split()[::-1]), "negative": ["no sea"]} for text in texts]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    shared = {"steps": STEPS, "batch_size": 8, "learning_rate": 3e-3, "warmup_steps": 4, "save_steps": 3}
    shared |= {"logging_steps": 1, "max_tokens": 64, "graph_tokens": 200, "teacher": teacher}
    lora = {"r": 2, "alpha": 4, "dropout": 0.0}
    return {
        "output": "unset",
        "model": {
            "encoder": adapted,
            "llm": tiny_llm,
            "max_seq_length": 32,
            "llm_lora": lora,
            "encoder_lora": lora,
        },
        "warm_start": {"texts": 40, "ridge": 1.0},
        "align": {
            **shared,
            "train_encoder": "lora",
            "data": [{"source": str(folder / "texts.jsonl"), "task": "reconstruct"}],
            "target_max_seq_length": 12,
        },
        "contrast": {
            **shared,
            "data": [{"source": str(folder / "pairs.jsonl"), "hard_negatives": 1, "instruction": "Find it"}],
        },
    }


def recipe(tree, output="unset", **changes):
    tree = {**tree, "output": str(output)}
    for name, value in changes.items():
        tree[name] = {**tree[name], **value}
    return Recipe.model_validate(tree)


def weights(output):
    return load_file(Path(output) / "model" / "model.safetensors")


def losses(output, stage):
    history = json.loads((output / stage / "stage.json").read_text())["history"]
    return [row["loss"] for row in history if "loss" in row]


@pytest.fixture(scope="module")
def whole(tree, tmp_path_factory):
    """An uninterrupted run with a cache of its own."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUSIFER_CACHE", str(folder / "cache"))
        train(recipe(tree, folder / "run"), progress=False)
    return folder / "run"


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LUSIFER_CACHE", str(tmp_path / "cache"))


def unit(rows, dim=32, seed=0):
    return normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def taught_contrast(rows=6, columns=3):
    return {**contrast_batch(rows=rows, columns=columns), "teacher": unit(rows * columns)}


def taught_align(rows=6):
    return {**align_batch(rows=rows), "teacher": unit(rows)}


@pytest.fixture
def model(adapted, tiny_llm):
    """On an adapted encoder, with adapters moved off their start and a head that adds something."""
    torch.manual_seed(0)
    model = LusiferModel.from_backbones(adapted, tiny_llm, max_seq_length=64)
    torch.nn.init.normal_(model.head.linear.weight, std=0.3)
    return learning(model)


def alignment(model, **options):
    embeddings = model.llm_embeddings()
    return AlignmentLoss(LMHead(embeddings.clone(), None, model.llm.config), embeddings.mean(dim=0), **options)


@pytest.mark.parametrize(("infonce", "weight"), [(1.0, 0.5), (0.0, 1.0), (1.0, 0.0)])
def test_the_losses_add_up(infonce, weight):
    vectors, targets = torch.randn(3, 5, 32), unit(15).unflatten(0, (3, 5))
    keys = torch.arange(15).reshape(3, 5)
    alone = ContrastiveLoss().of_embeddings(vectors, keys)
    expected = infonce * alone + weight * teacher_loss(
        normalize(vectors.flatten(0, 1), dim=1), targets.flatten(0, 1), torch.empty(0, 32)
    )
    loss = ContrastiveLoss(infonce_weight=infonce, teacher_weight=weight)
    torch.testing.assert_close(loss.of_embeddings(vectors, keys, targets=targets), expected)


def test_cached_gradient_is_the_single_pass_one(model):
    batch, found = taught_contrast(), []
    for kept in (0, 10_000):
        loss = ContrastiveLoss(infonce_weight=0.0, max_tokens=40, graph_tokens=kept)
        found.append(step_gradients(loss, model, batch))
    assert found[0][0]["recomputed"] > 0.2 and found[0][0]["loss"] == found[1][0]["loss"]
    assert_same(found[0][1], found[1][1], tolerance=1e-6)  # Only the order in which gradients are added differs.
    without = step_gradients(ContrastiveLoss(max_tokens=40), model, contrast_batch(rows=6))[1]
    with pytest.raises(AssertionError):  # The control: the teacher matters.
        assert_same(without, found[1][1], tolerance=1e-2)


@pytest.mark.parametrize("max_tokens", [1, 60, 10_000])
def test_stage_1_is_the_sum_of_both_losses_however_it_is_grouped(model, max_tokens):
    batch, weight = taught_align(), 0.7
    plain = {name: value for name, value in batch.items() if name != "teacher"}
    loss = alignment(model, max_tokens=max_tokens, teacher_weight=weight)
    vectors = model.encoder(batch["source"]["input_ids"], batch["source"]["attention_mask"]).pooler_output
    expected = alignment(model)(model, plain) + weight * teacher_loss(
        normalize(vectors, dim=1), batch["teacher"], batch["teacher"][:0]
    )
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    metrics, found = step_gradients(loss, model, batch)
    assert metrics["loss"] == pytest.approx(float(expected.detach()), rel=1e-5)  # float32
    assert_same(found, gradients)


def on_a_rank(rank, size, model):
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)  # One model for both stages.
    contrast = ContrastiveLoss(max_tokens=40, graph_tokens=60)
    return [
        step_gradients(contrast, wrapped, part(taught_contrast(), rank, size)),
        step_gradients(alignment(model, max_tokens=60, seed=3), wrapped, part(taught_align(), rank, size)),
    ]


def test_two_processes_equal_one(model):
    contrast, align = ContrastiveLoss(max_tokens=40, graph_tokens=60), alignment(model, max_tokens=60, seed=3)
    expected = [step_gradients(contrast, model, taught_contrast()), step_gradients(align, model, taught_align())]
    for steps in on_two_ranks(on_a_rank, model):
        for (metrics, found), (wanted, gradients) in zip(steps, expected, strict=True):
            assert metrics["loss"] == pytest.approx(wanted["loss"], rel=1e-5)  # float32
            assert_same({name: found[name] for name in gradients}, gradients)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_train_like_one(tree, whole, tmp_path, strategy):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    done = run(path, tmp_path / "run", ranks=2, overrides=["--scale.strategy", strategy])
    assert done.returncode == 0, done.stderr[-3000:]
    for stage in ("align", "contrast"):
        assert len(losses(whole, stage)) == STEPS
        torch.testing.assert_close(losses(tmp_path / "run", stage), losses(whole, stage), rtol=1e-3, atol=1e-3)


def test_held_out_texts_come_nearer_to_the_teacher(tree, tmp_path, own_cache):
    many = {"steps": 40, "learning_rate": 2e-2, "infonce_weight": 0.0}
    train(recipe(tree, tmp_path / "run", align={"enabled": False}, contrast=many), progress=False)
    report = json.loads((tmp_path / "run" / "contrast" / "stage.json").read_text())
    before, after = report["held_out_before"], report["held_out"]
    assert after["teacher_cosine"] > before["teacher_cosine"] + 0.05 and after["loss"] < before["loss"]
    assert report["teacher_hash"]


def test_training_starts_at_the_adapted_model(tree, whole, adapted, tmp_path, own_cache):
    """What is measured before the first step is the adapted model's own agreement."""
    one = {"steps": 1, "infonce_weight": 0.0}
    settings = recipe(tree, tmp_path / "run", align={"enabled": False}, contrast=one)
    train(settings, progress=False)
    before = json.loads((tmp_path / "run" / "contrast" / "stage.json").read_text())["held_out_before"]
    mixture = stage_mixture(settings, "contrast")
    (examples,) = mixture.held_out_examples()
    model, original = lusifer.load(adapted), lusifer.load(tree["contrast"]["teacher"])
    model.max_seq_length = tree["model"]["max_seq_length"]
    documents = [row["positive"] for row in examples] + [row["negatives"][0] for row in examples]
    # The model reads the instruction, the teacher does not.
    ours = [model.encode_query([row["query"] for row in examples]), model.encode_document(documents)]
    theirs = [original.encode_query([row["plain_query"] for row in examples]), original.encode_document(documents)]
    cosine = float((np.concatenate(ours) * np.concatenate(theirs)).sum(1).mean())
    assert before["teacher_cosine"] == pytest.approx(cosine, abs=2e-4)  # Targets in float16.


def test_every_text_of_a_stage_is_known_before_it_begins(tree, own_cache, monkeypatch):
    """So that the teacher is out of memory while the model trains."""
    mixture = stage_mixture(recipe(tree), "contrast")
    vectors = vectors_of(tree["contrast"]["teacher"], mixture, column_texts, progress=False)
    monkeypatch.setattr(Teacher, "__init__", lambda *_, **__: pytest.fail("the teacher was loaded again"))
    rows = [*(mixture[position] for position in range(len(mixture))), *mixture.held_out_examples()[0]]
    assert vectors(*column_texts(rows)).shape == (3 * len(rows), 32)
    assert vectors_of(None, mixture, column_texts, progress=False) is None


@pytest.mark.parametrize("stage", ["align", "contrast"])
def test_an_interrupted_run_ends_where_the_uninterrupted_one_does(tree, whole, tmp_path, own_cache, monkeypatch, stage):
    settings = recipe(tree, tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in(patch, stage, 6)
        train(settings, progress=False)
    if stage == "contrast":  # All its texts are known: the teacher embeds none.
        monkeypatch.setattr(Teacher, "encode", lambda *_: pytest.fail("the teacher was asked again"))
    train(settings, progress=False)
    one, other = weights(whole), weights(tmp_path / "run")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_stage_1_trains_what_has_a_gradient(tree, adapted, tiny_llm):
    for teacher, head in ((tree["align"]["teacher"], True), (None, False)):
        settings = recipe(tree, align={"train_encoder": "full", "teacher": teacher})
        model = LusiferModel.from_backbones(adapted, tiny_llm, max_seq_length=32)
        prepare_stage(settings, "align", model)
        assert all(p.requires_grad == head for p in model.encoder.head.parameters())
        assert not any(p.requires_grad for p in model.head.parameters())
        batch = taught_align() if teacher else align_batch()
        alignment(model).step(model, batch, backward=torch.Tensor.backward, no_sync=nullcontext)
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        prepare_stage(settings, "contrast", model)
        assert all(p.requires_grad for p in model.head.parameters())


def test_what_cannot_be_learnt_is_refused_before_any_work(tree, tiny_encoder, tmp_path, own_cache):
    narrow = save_teacher(tmp_path, width=16)
    on_top = recipe(tree, align={"enabled": False}, contrast={"teacher": narrow})
    with pytest.raises(LusiferError, match=r"16 dimensions, the model of 32; give an encoder adapted to this"):
        check_inputs(on_top)
    plain = {"model": {"encoder": tiny_encoder}, "align": {"enabled": False}}
    with pytest.raises(LusiferError, match=r"32 dimensions, the model of 48; set model.head_dim: 32"):
        check_inputs(recipe(tree, **plain))
    check_inputs(recipe(tree, **{**plain, "model": {"encoder": tiny_encoder, "head_dim": 32}}))
    with pytest.raises(LusiferError, match=r"align.teacher needs an encoder from `lusifer adapt`"):
        check_inputs(recipe(tree, model={"encoder": tiny_encoder, "head_dim": 32}))
    with pytest.raises(LusiferError, match="the LLM alone has no head"):
        train_llm_alone(recipe(tree, tmp_path / "run"), progress=False)


def test_another_teacher_than_the_encoders_is_named(tree, tmp_path, own_cache, caplog):
    check_inputs(recipe(tree))
    assert "was adapted to" not in caplog.text
    other = save_teacher(tmp_path, seed=9)
    check_inputs(recipe(tree, contrast={"teacher": other}))
    assert "was adapted to" in caplog.text and "not to contrast.teacher" in caplog.text


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        ("align", {"train_encoder": "frozen"}, "teacher needs train_encoder"),
        ("align", {"teacher": None, "teacher_weight": 2.0}, "teacher_weight needs teacher"),
        ("contrast", {"teacher": None, "teacher_weight": 2.0}, "teacher_weight needs teacher"),
        ("contrast", {"teacher": None, "infonce_weight": 0}, "nothing to learn from"),
        ("contrast", {"teacher_weight": 0}, "greater than 0"),
    ],
)
def test_recipes_that_say_nothing_useful_are_refused(tree, stage, change, message):
    with pytest.raises(ValueError, match=message):
        recipe(tree, **{stage: change})


def test_a_run_begun_before_there_were_teachers_goes_on(tree):
    plain = recipe(tree, align={"teacher": None}, contrast={"teacher": None})
    tree_before = plain.contrast.model_dump()
    assert {"teacher", "teacher_weight", "infonce_weight"} <= tree_before.keys()
    assert fingerprint(plain, "contrast") != fingerprint(recipe(tree), "contrast")
    named = recipe(tree, align={"teacher": None}, contrast={"teacher": None, "infonce_weight": 1.0})
    assert fingerprint(plain, "contrast") == fingerprint(named, "contrast")
    assert fingerprint(recipe(tree, contrast={"teacher": None, "infonce_weight": 0.5}), "contrast") not in {
        fingerprint(plain, "contrast"),
        fingerprint(recipe(tree), "contrast"),
    }
