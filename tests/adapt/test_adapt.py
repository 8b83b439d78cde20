"""The whole command on tiny models: it learns, resumes to the byte, loads anywhere, and refuses what cannot work."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

import lusifer
from lusifer.adapt import adapt, collect, fit, student
from lusifer.adapt import run as run_module
from lusifer.adapt.closed_form import ClosedForm
from lusifer.adapt.modeling import AdaptedEncoder, LayerHead
from lusifer.adapt.work import Work
from lusifer.errors import LusiferError
from lusifer.model.backbones import load_config, load_encoder
from lusifer.model.fingerprint import weights_hash
from lusifer.model.text_encoder import Choice, TextEncoder
from lusifer.recipes.schema import Recipe
from lusifer.training.llm_baseline import train_llm_alone
from support.holding import held
from support.teachers import save_teacher, sentences


def run(teacher, folder, options):
    return adapt(teacher, folder, options, progress=False)


def weights(folder):
    return (folder / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def adapted(teacher, options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapted")
    return folder, run(teacher, folder, options)


def test_the_student_comes_near_the_teacher(adapted, teacher):
    folder, report = adapted
    model, original = lusifer.load(str(folder / "model")), SentenceTransformer(teacher, device="cpu")
    unseen = sentences(60, seed=5)
    ours, theirs = model.encode_query(unseen), original.encode(unseen)
    # A random encoder of 32 dimensions knows little of a random teacher: chance is a cosine of the mean vector.
    mean = theirs.mean(0) / np.linalg.norm(theirs.mean(0))
    assert (ours * theirs).sum(1).mean() > (theirs @ mean).mean()
    assert report["english"]["cosine"] >= report["closed_form"]["cosine"] - 0.02
    assert report["texts"] == 630
    assert json.loads((folder / "report.json").read_text()) == report
    origin = json.loads((folder / "model" / "adapted.json").read_text())
    assert origin == {"teacher": teacher, "teacher_hash": weights_hash(original), "dimension": 32}


def test_a_part_of_what_the_encoder_learnt_is_kept(adapted, tiny_encoder):
    folder, _ = adapted
    learnt = load_file(folder / "work" / "encoder.safetensors")
    untrained = load_encoder(tiny_encoder, load_config("encoder", tiny_encoder))
    model = lusifer.load(str(folder / "model"))[0].auto_model
    stacks = [list(encoder.encoder.layer) for encoder in (model.encoder, untrained)]
    last, before = ([p for layer in layers[len(layers) // 2 :] for p in layer.parameters()] for layers in stacks)
    moved = 0.0
    for number, (kept, start) in enumerate(zip(last, before, strict=True)):
        step = learnt[f"{number}.value"] - start.detach()
        moved += float(step.abs().sum())
        torch.testing.assert_close(kept.detach() - start.detach(), 0.8 * step, rtol=1e-4, atol=1e-6)
    assert moved > 0


def test_the_model_is_an_ordinary_one(adapted):
    folder, _ = adapted
    path = str(folder / "model")
    model = SentenceTransformer(path, device="cpu")  # Without trust_remote_code.
    assert isinstance(model[0].auto_model, AdaptedEncoder)
    types = [module["type"] for module in json.loads((folder / "model" / "modules.json").read_text())]
    assert all(name.startswith("sentence_transformers.") for name in types)
    assert (
        "encoder" not in json.loads((folder / "model" / "config.json").read_text())["encoder_config"]["_name_or_path"]
    )
    vectors = model.encode(["the cat sat", "a small house"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    model.save_pretrained(str(folder / "again"))
    np.testing.assert_array_equal(
        SentenceTransformer(str(folder / "again"), device="cpu").encode(["the cat"])[0], model.encode(["the cat"])[0]
    )


def test_embeddings_do_not_depend_on_batch_mates_or_padding(adapted):
    folder, _ = adapted
    model = lusifer.load(str(folder / "model"))
    texts = sentences(12, seed=3) + ["the", "the dog and the cat " * 8]
    alone = np.concatenate([TextEncoder(model).encode([text]) for text in texts])
    # Float32 sums of other lengths: a few units in the last place.
    np.testing.assert_allclose(TextEncoder(model).encode(texts), alone, atol=2e-6)
    np.testing.assert_allclose(model.encode(texts, batch_size=5, prompt=""), alone, atol=2e-6)


def test_a_used_model_goes_to_other_processes(adapted):
    folder, _ = adapted
    model = SentenceTransformer(str(folder / "model"), device="cpu")
    texts = sentences(6, seed=8)
    vectors = model.encode(texts)  # Leaves hooks of transformers behind, which cannot be pickled.
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        np.testing.assert_array_equal(again.encode(texts), vectors)


def test_an_interrupted_run_ends_like_any_other(adapted, teacher, options, tmp_path, monkeypatch):
    folder, _ = adapted
    monkeypatch.setattr(fit, "_EVERY", -1)  # A checkpoint after each step.

    class Killed(Exception):
        pass

    def killing(where, name, after):
        real, count = getattr(where, name), [0]

        def call(*args, **kwargs):
            count[0] += 1
            if count[0] == after:
                raise Killed
            return real(*args, **kwargs)

        return call

    for where, name, after in [(fit, "teacher_loss", 3), (fit, "mean_states", 4), (fit, "mean_states", 2)]:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(where, name, killing(where, name, after))
            run(teacher, tmp_path, options)
    run(teacher, tmp_path, options)
    assert weights(tmp_path) == weights(folder)


def test_pieces_to_switch_to_are_limited_by_count_whatever_the_clock_says(teacher, options, tmp_path, monkeypatch):
    real, seen = collect.foreign_pieces, []

    def pieces(*args, most):
        seen.append(most)
        return real(*args, most=most)

    monkeypatch.setattr(collect, "foreign_pieces", pieces)
    few = replace(options, head_epochs=0, encoder_steps=0)
    run(teacher, tmp_path / "counted", replace(few, most_pieces=7, minutes=5))
    run(teacher, tmp_path / "all", few)
    assert seen == [7, None]


def test_the_precision_is_decided_once_a_run(teacher, options, tmp_path, monkeypatch):
    auto = replace(options, precision="auto", head_epochs=0, encoder_steps=0)
    for measured in ("bfloat16", "float32"):  # A timing that comes out otherwise when the run goes on.
        monkeypatch.setattr(run_module, "choose_dtype", lambda *_, name=measured, **__: Choice(name, ""))
        assert run(teacher, tmp_path, auto)["precision"] == "bfloat16"
    with pytest.raises(LusiferError, match="no precision 'half'"):
        run(teacher, tmp_path, replace(options, precision="half"))


def test_collecting_goes_on_where_it_stopped(teacher, options, tmp_path, monkeypatch):
    monkeypatch.setattr(student, "_BLOCK", 200)
    few = replace(options, head_epochs=0, encoder_steps=0)
    run(teacher, tmp_path / "whole", few)
    real, seen = collect.check_vectors, []

    def check(vectors, what):
        seen.append(len(vectors))
        if len(seen) == 3:
            raise KeyboardInterrupt
        real(vectors, what)

    monkeypatch.setattr(collect, "check_vectors", check)
    with pytest.raises(KeyboardInterrupt):
        run(teacher, tmp_path / "parts", few)
    run(teacher, tmp_path / "parts", few)
    assert seen == [200, 200, 200, 200, 30]  # The third block again, none of the first two.
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def head_and_data(rows, seed=0):
    """A random closed form, the head that starts from it, and held-out texts."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(400, 6, generator=generator)
    goal = torch.nn.functional.normalize(states @ torch.randn(6, 4, generator=generator), dim=1)
    form = ClosedForm(torch.randn(4, 6, generator=generator), torch.zeros(4), torch.zeros(6), torch.ones(6), (1,))
    head = LayerHead(6, 4, 8)
    head.start_from({name: getattr(form, name) for name in ("matrix", "bias", "mean", "deviation")})
    data = collect.Collected(form, None, None, rows, rows, (states, goal), (states, goal))
    return head, data, states, goal


def cosine(head, states, goal):
    return float((torch.nn.functional.normalize(head(states), dim=1) * goal).sum(1).mean().detach())


def test_what_was_learnt_by_heart_is_taken_back():
    head, data, states, goal = head_and_data(10)
    best = torch.linalg.lstsq(states, goal).solution.T
    data.form = replace(data.form, matrix=best)
    with torch.no_grad():
        head.linear.weight.copy_(best)
    closed = cosine(head, states, goal)
    with torch.no_grad():  # Worse in everything.
        head.down.weight.copy_(torch.randn(4, 8))
        head.linear.weight.mul_(-1)
    assert fit.hold_back(head, data, torch.arange(6)) == 0
    assert cosine(head, states, goal) == pytest.approx(closed, abs=1e-6)


def test_what_holds_for_other_texts_stays():
    head, data, states, goal = head_and_data(10)
    with torch.no_grad():
        head.linear.weight.copy_(torch.linalg.lstsq(states, goal).solution.T)
    before = cosine(head, states, goal)
    assert fit.hold_back(head, data, torch.arange(6)) == 1
    assert cosine(head, states, goal) == pytest.approx(before, abs=1e-6)


def test_the_time_ends_a_run(teacher, options, tmp_path):
    report = run(teacher, tmp_path, replace(options, minutes=0.05, head_epochs=10_000, encoder_steps=None))
    assert report["seconds"] < 30
    assert "MLP" in report["steps"]


def test_a_plain_model_loads_without_lusifer(teacher, options, tmp_path):
    run(teacher, tmp_path, replace(options, plain=True))
    code = (
        "import sys, json; from sentence_transformers import SentenceTransformer\n"
        "m = SentenceTransformer(sys.argv[1], device='cpu')\n"
        "kinds = [type(x).__name__ for x in m]\n"
        "print(json.dumps([m.encode(['the cat sat']).tolist(), kinds, 'lusifer' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "model"], capture_output=True, text=True, check=True)
    vectors, kinds, ours = json.loads(done.stdout.splitlines()[-1])
    assert kinds == ["Transformer", "Pooling", "Dense", "Normalize"]
    assert not ours
    np.testing.assert_allclose(lusifer.load(str(tmp_path / "model")).encode(["the cat sat"]), vectors, atol=1e-6)


def test_a_table_of_texts_and_vectors_teaches_too(teacher, options, tmp_path):
    few = replace(options, head_epochs=0, encoder_steps=0)
    texts = [json.loads(line)["text"] for line in Path(options.texts[0]).read_text().splitlines()]
    vectors = SentenceTransformer(teacher, device="cpu").encode(texts)
    np.save(tmp_path / "vectors.npy", 3 * vectors)  # Their length says nothing.
    location = f"{tmp_path / 'vectors.npy'}+{options.texts[0]}"
    report = run(location, tmp_path / "table", few)
    whole = run(teacher, tmp_path / "model", few)
    assert report["english"]["cosine"] == pytest.approx(whole["english"]["cosine"], abs=0.05)
    assert "everyday" not in report


def test_rows_that_are_not_english_are_left_out(teacher, options, tmp_path):
    path = tmp_path / "mixed.jsonl"
    lines = Path(options.texts[0]).read_text()
    foreign = "".join(json.dumps({"text": f"кошка сидит на ковре {number}"}) + "\n" for number in range(30))
    path.write_text(lines + foreign)
    report = run(teacher, tmp_path / "out", replace(options, texts=(str(path),), head_epochs=0, encoder_steps=0))
    assert (report["texts"], report["left_out"]) == (630, 30)


def test_queries_and_documents_of_a_teacher_with_prompts(options, tmp_path):
    teacher = save_teacher(tmp_path, width=128, prompts={"query": "the dog ", "document": "the river "})
    run(teacher, tmp_path / "out", replace(options, head_epochs=0, encoder_steps=0))
    model, original = lusifer.load(str(tmp_path / "out" / "model")), SentenceTransformer(teacher, device="cpu")
    assert model.prompts["query"] != model.prompts["document"]
    unseen = sentences(80, seed=5)
    theirs = {role: getattr(original, f"encode_{role}")(unseen) for role in ("query", "document")}
    ours = {role: getattr(model, f"encode_{role}")(unseen) for role in ("query", "document")}
    assert ours["query"].shape == (80, 128)
    own, other = (
        sum(float((ours[a] * theirs[b]).sum(1).mean()) for a, b in pairs)
        for pairs in ((("query", "query"), ("document", "document")), (("query", "document"), ("document", "query")))
    )
    assert own > other


def test_a_decoder_teaches_too(tiny_encoder, tiny_llm, options, texts, tmp_path):
    rows = {"source": texts, "columns": {"query": "text", "positive": "text"}}
    contrast = {"data": [rows], "steps": 2, "batch_size": 8, "learning_rate": 1e-2}
    model = {"encoder": tiny_encoder, "llm": tiny_llm}
    tree = {"output": str(tmp_path / "run"), "model": model, "warm_start": {"enabled": False}, "contrast": contrast}
    teacher = train_llm_alone(Recipe.model_validate(tree), progress=False)
    original = SentenceTransformer(str(teacher), device="cpu")
    run(str(teacher), tmp_path / "out", replace(options, encoder_steps=0))
    unseen = sentences(60, seed=5)
    ours = lusifer.load(str(tmp_path / "out" / "model")).encode_query(unseen)
    theirs = original.encode(unseen, normalize_embeddings=True)
    assert ours.shape == theirs.shape
    mean = theirs.mean(0) / np.linalg.norm(theirs.mean(0))
    own = (ours * theirs).sum(1).mean()
    assert own > (theirs @ mean).mean()  # As for any random teacher.
    assert own > (ours * np.roll(theirs, 1, axis=0)).sum(1).mean() + 0.02


def test_prefixes_of_a_matryoshka_teacher_hold(adapted, teacher):
    folder, _ = adapted
    model, original = (SentenceTransformer(str(p), device="cpu", truncate_dim=16) for p in (folder / "model", teacher))
    unseen = sentences(60, seed=5)
    ours, theirs = (m.encode(unseen, normalize_embeddings=True) for m in (model, original))
    assert ours.shape == (60, 16)
    own = (ours * theirs).sum(1).mean()
    assert own > (ours * np.roll(theirs, 1, axis=0)).sum(1).mean() + 0.02  # Nearer to its own text than to another.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": ("nowhere.jsonl",)}, "nowhere.jsonl"),
        ({"encoder": "nowhere/encoder"}, "nowhere/encoder"),
    ],
)
def test_what_is_missing_is_named(teacher, options, tmp_path, change, message):
    with pytest.raises(LusiferError, match=message):
        run(teacher, tmp_path, replace(options, **change))


def test_another_teacher_is_refused_in_a_folder_of_unfinished_work(adapted, options, tmp_path):
    folder, _ = adapted
    shutil.copytree(folder / "work", tmp_path / "out" / "work")
    other = save_teacher(tmp_path, width=48)
    with pytest.raises(LusiferError, match="another teacher; .*--restart"):
        run(other, tmp_path / "out", options)
    run(other, tmp_path / "out", replace(options, restart=True, head_epochs=0, encoder_steps=0))


def test_two_at_once_are_refused(teacher, options, tmp_path):
    Work(tmp_path / "work", {"layout": 0}).close()
    with held(tmp_path / "work"), pytest.raises(LusiferError, match="another process is using"):
        run(teacher, tmp_path, options)
    with pytest.raises(LusiferError, match="was started with"):
        run(teacher, tmp_path, options)


def test_time_used_before_a_kill_counts(teacher, options, tmp_path):
    few = replace(options, minutes=1, head_epochs=1_000_000, encoder_steps=0)
    Work(tmp_path / "work", {}).close()
    (tmp_path / "work" / "clock.json").write_text(json.dumps({"seconds": 1000}))
    report = run(teacher, tmp_path, few)  # No time is left of the minute, so it takes the least there is.
    assert 1000 < report["seconds"] < 1040


def test_too_few_texts_are_refused(teacher, options, tmp_path):
    path = tmp_path / "few.txt"
    path.write_text("\n".join(sentences(20)))
    with pytest.raises(LusiferError, match="18 English texts .* 32 dimensions"):
        run(teacher, tmp_path, replace(options, texts=(str(path),)))


def test_no_english_is_refused(teacher, options, tmp_path):
    path = tmp_path / "russian.txt"
    path.write_text("\n".join(f"кошка сидит на ковре {number}" for number in range(50)))
    with pytest.raises(LusiferError, match="none of the 50 texts .* looks English"):
        run(teacher, tmp_path, replace(options, texts=(str(path),)))


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "NaN, infinite or zero"), (0.0, "the same|zero")])
def test_a_broken_teacher_is_refused(options, tmp_path, value, message):
    teacher = save_teacher(tmp_path)
    path = tmp_path / "model" / "model.safetensors"
    state = load_file(path)
    save_file({name: torch.full_like(tensor, value) for name, tensor in state.items()}, path, {"format": "pt"})
    with pytest.raises(LusiferError, match=message):
        run(teacher, tmp_path / "out", options)


def test_texts_beyond_the_teachers_window_are_counted(options, tmp_path, caplog):
    teacher = save_teacher(tmp_path, window=8)
    run(teacher, tmp_path / "out", replace(options, head_epochs=0, encoder_steps=0))
    assert "longer than the teacher's 8 tokens" in caplog.text


def test_a_folder_that_is_no_model_and_no_table(options, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(LusiferError, match="no checkpoint at .* no modules.json"):
        run(str(tmp_path / "empty"), tmp_path / "out", options)
