"""mteb tasks from a folder: scores, resume, failures, the cache of embeddings."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from lusifer import LusiferError
from lusifer.data.everyday_set import load_everyday
from lusifer.evaluation import benchmarks as suite
from lusifer.evaluation.cache import EmbeddingCache
from lusifer.evaluation.everyday import embedder, score
from lusifer.evaluation.systems import Embedder, language_profile, load_embedder
from lusifer.model.sentence_transformer import save_atomically
from support import forked
from support.backbones import save_sentence_encoder

mteb = pytest.importorskip("mteb")
evaluation = pytest.importorskip("lusifer.evaluation.run")

from lusifer.evaluation.mteb_model import load_prompts  # noqa: E402
from lusifer.evaluation.results import main_scores  # noqa: E402
from lusifer.evaluation.tasks import choose, mteb_task  # noqa: E402

EVAL_DATA = Path(__file__).parents[3] / "shared" / "eval-data"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two small tasks in the layout of an offline folder."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "klue").mkdir()
    rows = [
        {
            "guid": str(i),
            "sentence1": f"text {i}",
            "sentence2": f"text {i // 2} and {i}",
            "labels": {"label": i / 4, "real-label": i / 4, "binary-label": int(i > 8)},
        }
        for i in range(16)
    ]
    datasets.Dataset.from_list(rows).to_parquet(folder / "klue" / "validation.parquet")
    # mteb asks for this configuration by name.
    card = (
        "---\nconfigs:\n- config_name: sts\n  data_files:\n  - split: validation\n    path: validation.parquet\n---\n"
    )
    (folder / "klue" / "README.md").write_text(card)
    (folder / "farstail").mkdir()
    rows = [{"sentence1": f"one {i}", "sentence2": f"two {i}", "labels": i % 2} for i in range(16)]
    datasets.Dataset.from_list(rows).to_parquet(folder / "farstail" / "test.parquet")
    entries = [
        {"name": "KLUE-STS", "dir": "klue", "eval_splits": ["validation"], "subsets": {"default": "ko"}},
        {"name": "FarsTail", "dir": "farstail", "eval_splits": ["test"], "subsets": {"default": "fa"}},
    ]
    (folder / "tasks.json").write_text(json.dumps(entries))
    return folder


def counting(monkeypatch):
    """Hashed bags of letters in place of a model; returns the texts it was given."""
    seen = []

    def embed(texts):
        seen.extend(texts)
        return np.stack([np.bincount([ord(c) % 32 for c in text + "."], minlength=32) for text in texts]).astype("f4")

    monkeypatch.setattr(evaluation, "load_embedder", lambda model, **kwargs: Embedder(embed, 64))
    return seen


def result_file(out, name):
    """Where a task's result lies, for mteb's tools and ours."""
    (path,) = (out / "results").glob(f"*/*/{name}.json")
    return path


@pytest.mark.parametrize("name", suite.BENCHMARKS)
def test_mteb_knows_the_benchmarks_and_every_task_resolves(name):
    found = {task.metadata.name: task for task in mteb.get_benchmark(name).tasks}
    for task in suite.tasks(name):
        made = found[task.name]
        assert set(made.hf_subsets) == set(task.subsets), task.name
        assert set(made.eval_splits) == set(task.splits), task.name
        assert made.metadata.type == task.type


def test_what_is_done_is_not_embedded_again(data, tmp_path, monkeypatch):
    seen = counting(monkeypatch)
    tasks, missing = choose(None, data)
    assert not missing and {task.name for task in tasks} == {"KLUE-STS", "FarsTail"}
    first = evaluation.run("some-model", tasks[:1], tmp_path / "out", data=data, progress=False)
    name = tasks[0].name
    assert first[name]["status"] == "done" and seen
    for fact in ("model_hash", "versions", "max_seq_length", "prefixes", "seed", "evaluation_time", "dataset_revision"):
        assert fact in first[name]
    count = len(seen)
    again = evaluation.run("some-model", tasks, tmp_path / "out", data=data, progress=False)
    assert again[name] == first[name] and len(again) == 2
    new = set(seen[count:])
    assert new and not new & set(seen[:count])
    count = len(seen)
    # In another folder everything is scored anew, and nothing embedded.
    third = evaluation.run("some-model", tasks, tmp_path / "other", data=data, progress=False)
    assert len(seen) == count
    assert main_scores(third) == main_scores(again)


def test_scores_are_mtebs_own(data, tmp_path, monkeypatch):
    counting(monkeypatch)
    tasks, _ = choose(None, data)
    found = main_scores(evaluation.run("m", tasks, tmp_path / "out", data=data, progress=False))
    embed = evaluation.load_embedder("m").embed

    class Plain(mteb.models.abs_encoder.AbsEncoder):
        mteb_model_meta = mteb.models.ModelMeta.create_empty(overwrites={"name": "local/plain", "revision": "x"})

        def encode(self, inputs, **kwargs):
            return embed([text for batch in inputs for text in batch["text"]])

    for task in tasks:
        result = mteb.evaluate(Plain(), mteb_task(task, data), cache=None, co2_tracker=False, show_progress_bar=False)
        ((row,),) = result.task_results[0].scores.values()
        assert found[task.name]["default"] == pytest.approx(row["main_score"], abs=1e-6)


def test_instructions_stand_before_queries_and_are_recorded(data, tmp_path, monkeypatch):
    seen = counting(monkeypatch)
    tasks, _ = choose(None, data, names=["KLUE-STS"])
    prompts = load_prompts()
    records = evaluation.run("m", tasks, tmp_path / "out", data=data, prompts=prompts, progress=False)
    own = {text for texts in load_everyday().sentences.values() for text in texts}  # Of the profile of languages.
    assert all(text.startswith(f"Instruct: {prompts['STS']}\nQuery: ") for text in set(seen) - own)
    told = f"Instruct: {prompts['STS']}\nQuery: "
    assert records["KLUE-STS"]["prefixes"] == {"query": told, "document": "", "symmetric": told}
    with pytest.raises(LusiferError, match="holds results of another run \\(prompts"):
        evaluation.run("m", tasks, tmp_path / "out", data=data, progress=False)


def test_a_failing_task_is_recorded_and_tried_again(data, tmp_path, monkeypatch):
    counting(monkeypatch)
    tasks, _ = choose(None, data)
    real, broken, calls = mteb.evaluate, [True], []

    def evaluate(model, task, **options):
        calls.append(task.metadata.name)
        if broken[0] and task.metadata.name == "FarsTail":
            raise ConnectionError("the hub is away")
        return real(model, task, **options)

    monkeypatch.setattr(mteb, "evaluate", evaluate)
    records = evaluation.run("m", tasks, tmp_path / "out", data=data, progress=False)
    assert records["FarsTail"]["status"] == "failed" and calls.count("FarsTail") == 2
    assert "the hub is away" in records["FarsTail"]["error"]
    assert records["KLUE-STS"]["status"] == "done"
    broken[0] = False
    records = evaluation.run("m", tasks, tmp_path / "out", data=data, progress=False)
    assert records["FarsTail"]["status"] == "done" and calls.count("KLUE-STS") == 1


def test_a_damaged_result_is_scored_again(data, tmp_path, monkeypatch):
    counting(monkeypatch)
    tasks, _ = choose(None, data, names=["KLUE-STS"])
    first = evaluation.run("m", tasks, tmp_path / "out", data=data, progress=False)
    result_file(tmp_path / "out", "KLUE-STS").write_text('{"task_name": "KLUE-')
    again = evaluation.run("m", tasks, tmp_path / "out", data=data, progress=False)
    assert main_scores(again) == main_scores(first)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "LUSIFR", "data": None}, "there is no benchmark 'LUSIFR'"),
        ({"name": None, "data": None}, "say which --benchmark"),
        ({"name": None, "languages": ["xx"]}, "no language 'xx' here; there are fa, ko"),
        ({"name": None, "types": ["Poetry"]}, "no type 'Poetry'"),
        ({"name": None, "names": ["KLUE"]}, "no task 'KLUE'"),
        ({"name": None, "types": ["STS"], "languages": ["fa"]}, "no task is left"),
    ],
)
def test_wrong_choices_are_one_clear_line(data, arguments, message):
    with pytest.raises(LusiferError, match=message):
        choose(**{"data": data, **arguments})


def test_a_folder_holds_part_of_a_benchmark(data):
    tasks, missing = choose(suite.MAIN, data)
    assert {task.name for task in tasks} == {"KLUE-STS", "FarsTail"} and len(missing) == 121
    with pytest.raises(LusiferError, match="is not a list of tasks"):
        choose(None, data / "klue")


def test_the_command_says_what_failed_and_exits_with_1(data, tmp_path, tiny_encoder):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "farstail" / "test.parquet").write_bytes(b"no parquet")
    command = ["-m", "lusifer", "evaluate", f"encoder:{tiny_encoder}", "-q"]
    command += ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--json"]
    environment = {**os.environ, "LUSIFER_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = forked.run(command, environment=environment)
    assert done.returncode == 1, done.stderr
    assert "failed: FarsTail" in done.stderr and "Traceback" not in done.stderr
    told = json.loads(done.stdout)
    assert set(told["scores"]) == {"KLUE-STS"} and set(told["failed"]) == {"FarsTail"}


def test_backbones_alone_and_ours_are_scored_with_a_profile_of_languages(
    data, tmp_path, tiny_encoder, tiny_llm, tiny_st
):
    tasks, _ = choose(None, data, names=["KLUE-STS"])
    encoder, llm, ours = str(tiny_encoder), str(tiny_llm), str(tmp_path / "model")
    save_atomically(tiny_st, tmp_path / "model")
    parts = {f"encoder:{encoder}": ["encoder"], f"llm:{llm}": ["llm"], ours: ["encoder", "llm"]}
    hashes = set()
    for number, (model, tokenizers) in enumerate({**parts, f"llm-causal:{llm}": ["llm"]}.items()):
        out = tmp_path / str(number)
        record = evaluation.run(model, tasks, out, data=data, progress=False)["KLUE-STS"]
        assert record["status"] == "done", record
        hashes.add(record["model_hash"])
        profile = json.loads((out / "languages.json").read_text())
        assert list(profile["tokens"]) == tokenizers
        assert all(count > 5 for row in profile["tokens"].values() for count in row.values())
        assert set(profile["bias"]["te"]) == {"same_language", "alone", "mixed"} and "en" not in profile["bias"]
    assert len(hashes) == 4
    both, causal = (
        load_embedder(f"{kind}:{llm}").embed(["the cat sat", "on the mat"]) for kind in ("llm", "llm-causal")
    )
    assert np.abs(both - causal).max() > 1e-3
    with pytest.raises(LusiferError, match="is not a decoder LLM"):
        load_embedder(f"llm:{encoder}")


def test_several_devices_share_the_tasks(data, tmp_path, tiny_encoder, monkeypatch):
    tasks, _ = choose(None, data)
    options = {"data": data, "device": "cpu,cpu", "progress": False}
    records = evaluation.run(f"encoder:{tiny_encoder}", tasks, tmp_path / "out", **options)
    assert {name: record["status"] for name, record in records.items()} == {"KLUE-STS": "done", "FarsTail": "done"}
    # Once each, by one of the workers: the second call finds them done, and starts none.
    monkeypatch.setattr(evaluation, "_run_on_devices", None)
    assert evaluation.run(f"encoder:{tiny_encoder}", tasks, tmp_path / "out", **options) == records


def test_the_cache_keeps_order_and_computes_each_text_once(tmp_path):
    given = []

    def embed(texts):
        given.extend(texts)
        return np.array([[len(text), ord(text[0])] for text in texts])

    cache = EmbeddingCache(tmp_path / "c.sqlite", embed)
    texts = ["bb", "a", "bb", "ccc"]
    expected = [[2, 98], [1, 97], [2, 98], [3, 99]]
    assert cache(texts).tolist() == expected
    assert sorted(given) == ["a", "bb", "ccc"]
    other = EmbeddingCache(tmp_path / "c.sqlite", embed)
    assert other([*texts, "d"]).tolist() == [*expected, [1, 100]]
    assert given[3:] == ["d"] and other.computed == 1
    assert cache([]).shape[0] == 0


def test_many_open_the_cache_at_once(tmp_path):
    def use(file, number):
        cache = EmbeddingCache(file, lambda texts: np.ones((len(texts), 8)))
        cache([f"{number} {k}" for k in range(50)])
        cache.base.close()

    with ThreadPoolExecutor(8) as pool:
        for time in range(30):
            list(pool.map(use, [tmp_path / f"{time}.sqlite"] * 8, range(8)))


@pytest.mark.skipif(not EVAL_DATA.is_dir(), reason="needs the evaluation data beside the repository")
def test_every_task_of_the_real_folder_is_known():
    tasks, missing = choose(None, EVAL_DATA)
    assert len(tasks) == 12 and not missing


@pytest.fixture
def e5_like(tiny_st, tmp_path):
    """A function that saves a Sentence Transformers model with prompts or another similarity."""

    def save(**facts):
        tiny_st.prompts = facts.get("prompts", {})
        tiny_st.default_prompt_name = facts.get("default")
        tiny_st.similarity_fn_name = facts.get("similarity", "cosine")
        save_atomically(tiny_st, tmp_path / "e5")
        return str(tmp_path / "e5")

    return save


PAIR = {"query": "the cat ", "document": "rain fell on the roof "}


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"prompts": PAIR},
        {"prompts": PAIR, "default": "query"},
        {"prompts": {"STS": "milk "}},
        {"similarity": "dot"},
    ],
    ids=str,
)
def test_a_model_with_prompts_is_scored_as_by_mteb(data, e5_like, tmp_path, facts):
    from sentence_transformers import SentenceTransformer

    tasks, _ = choose(None, data, names=["KLUE-STS"])
    path = e5_like(**facts)
    record = evaluation.run(path, tasks, tmp_path / "out", data=data, progress=False)["KLUE-STS"]
    made = mteb_task(tasks[0], data)
    result = mteb.evaluate(SentenceTransformer(path), made, cache=None, co2_tracker=False, show_progress_bar=False)
    (row,) = result.task_results[0].scores["validation"]
    for key in ("main_score", "cosine_spearman", "spearman"):
        assert record["scores"]["validation"][0][key] == pytest.approx(row[key], abs=1e-6)
    symmetric = {"query": PAIR["query"]}.get(facts.get("default", ""), facts.get("prompts", {}).get("STS", ""))
    assert record["prefixes"]["symmetric"] == symmetric
    if facts.get("prompts") is PAIR:
        assert record["prefixes"]["query"] == PAIR["query"] and record["prefixes"]["document"] == PAIR["document"]


@pytest.fixture
def sib(tmp_path):
    """SIB-200 in two languages."""
    rows = [{"index_id": i, "category": "abc"[i % 3], "text": f"{'xyz'[i % 3]} {i}"} for i in range(60)]
    lines = ["---", "configs:"]
    for config in ("kor_Hang", "tel_Telu"):
        (tmp_path / "sib" / "sib" / config).mkdir(parents=True)
        lines += [f'- config_name: "{config}"', "  data_files:"]
        for split in ("train", "validation", "test"):
            datasets.Dataset.from_list(rows).to_parquet(tmp_path / "sib" / "sib" / config / f"{split}.parquet")
            lines += [f'  - split: "{split}"', f'    path: "{config}/{split}.parquet"']
    (tmp_path / "sib" / "sib" / "README.md").write_text("\n".join([*lines, "---", ""]))
    subsets = {"kor_Hang": "ko", "tel_Telu": "te"}
    entry = {"name": "SIB200Classification", "dir": "sib", "eval_splits": ["test"], "subsets": subsets}
    (tmp_path / "sib" / "tasks.json").write_text(json.dumps([entry]))
    return tmp_path / "sib"


def test_another_language_joins_what_is_scored(sib, tmp_path, monkeypatch):
    counting(monkeypatch)
    out, name = tmp_path / "out", "SIB200Classification"
    for code in ("te", "ko"):
        tasks, _ = choose(None, sib, languages=[code])
        evaluation.run("m", tasks, out, data=sib, progress=False)
    record = json.loads(result_file(out, name).read_text())
    assert set(record["languages"]) == set(record["standard_errors"]["test"]) == {"kor_Hang", "tel_Telu"}
    assert [row["hf_subset"] for row in record["scores"]["test"]] == ["tel_Telu", "kor_Hang"]
    run = json.loads((out / "run.json").read_text())
    assert run["asked"] == {name: ["kor_Hang"]}  # By the last command alone.
    assert run["plan"] == {name: {"splits": ["test"], "subsets": {"tel_Telu": ["te"], "kor_Hang": ["ko"]}}}


def test_mtebs_own_tools_read_the_results(data, tmp_path, monkeypatch):
    counting(monkeypatch)
    tasks, _ = choose(None, data)
    records = evaluation.run("m", tasks, tmp_path / "out", data=data, progress=False)
    (model,) = mteb.ResultCache(tmp_path / "out").load_results().model_results
    assert model.model_name == "local/m" and model.model_revision == records["FarsTail"]["model_hash"]
    ours = main_scores(records)
    # To the last digit: mteb's own files are rounded to six places.
    assert {result.task_name: {"default": result.main_score} for result in model.task_results} == ours
    # And its own runner takes them for done.
    results = mteb.evaluate(
        mteb.models.ModelMeta.create_empty(overwrites={"name": "local/m", "revision": model.model_revision}),
        [mteb_task(task, data) for task in tasks],
        cache=mteb.ResultCache(tmp_path / "out"),
        overwrite_strategy="only-cache",
        show_progress_bar=False,
    )
    assert {result.task_name: {"default": result.main_score} for result in results.task_results} == ours


def test_a_kill_between_two_subsets_loses_neither_score_nor_interval_of_the_first(sib, tmp_path, monkeypatch):
    seen = counting(monkeypatch)
    out, name = tmp_path / "out", "SIB200Classification"
    real, killed = evaluation.Results.save_to_cache, []

    def save(self, result, *args, **kwargs):
        real(self, result, *args, **kwargs)
        if not killed:
            killed.append(result)
            raise KeyboardInterrupt

    monkeypatch.setattr(evaluation.Results, "save_to_cache", save)
    tasks, _ = choose(None, sib)
    with pytest.raises(KeyboardInterrupt):
        evaluation.run("m", tasks, out, data=sib, progress=False)
    first = json.loads(result_file(out, name).read_text())
    (row,) = first["scores"]["test"]
    assert set(first["standard_errors"]["test"]) == {row["hf_subset"]}
    count = len(seen)
    record = evaluation.run("m", tasks, out, data=sib, progress=False)[name]
    assert record["status"] == "done" and set(record["standard_errors"]["test"]) == {"kor_Hang", "tel_Telu"}
    assert record["scores"]["test"][0] == row and len(seen) == count


def test_a_failure_takes_nothing_away(sib, tmp_path, monkeypatch):
    counting(monkeypatch)
    out, name = tmp_path / "out", "SIB200Classification"
    tasks, _ = choose(None, sib, languages=["te"])
    before = evaluation.run("m", tasks, out, data=sib, progress=False)[name]
    real = mteb.evaluate
    monkeypatch.setattr(mteb, "evaluate", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("no such luck")))
    after = evaluation.run("m", choose(None, sib)[0], out, data=sib, progress=False)[name]
    assert after["status"] == "failed" and "no such luck" in after["error"]
    assert after["scores"] == before["scores"] and main_scores({name: after})[name]
    monkeypatch.setattr(mteb, "evaluate", real)
    mended = evaluation.run("m", choose(None, sib)[0], out, data=sib, progress=False)[name]
    assert mended["status"] == "done" and "error" not in mended and len(mended["scores"]["test"]) == 2


def test_changed_data_are_scored_again(sib, tmp_path, monkeypatch):
    counting(monkeypatch)
    out, name = tmp_path / "out", "SIB200Classification"
    tasks, _ = choose(None, sib, languages=["te"])
    before = evaluation.run("m", tasks, out, data=sib, progress=False)[name]
    rows = [{"index_id": i, "category": "abc"[i % 3], "text": "one and the same"} for i in range(60)]
    for split in ("train", "test"):
        datasets.Dataset.from_list(rows).to_parquet(sib / "sib" / "tel_Telu" / f"{split}.parquet")
    after = evaluation.run("m", tasks, out, data=sib, progress=False)[name]
    assert after["dataset_revision"] != before["dataset_revision"]
    assert main_scores({name: after})[name]["tel_Telu"] < main_scores({name: before})[name]["tel_Telu"]


def test_a_main_score_of_nan_is_a_failure(data, tmp_path, monkeypatch):
    monkeypatch.setattr(
        evaluation, "load_embedder", lambda m, **k: Embedder(lambda texts: np.ones((len(texts), 4), "f4"))
    )
    tasks, _ = choose(None, data, names=["KLUE-STS"])
    record = evaluation.run("m", tasks, tmp_path / "out", data=data, progress=False)["KLUE-STS"]
    assert record["status"] == "failed" and "is NaN" in record["error"]
    assert not list((tmp_path / "out" / "results").rglob("KLUE-STS.json"))


def test_what_a_benchmark_asks_for_and_a_folder_lacks_is_named(data, tmp_path, monkeypatch, capsys):
    tasks, lost = choose(suite.MAIN, data, languages=["ko"], names=["KLUE-STS", "SIB200Classification"])
    assert [task.name for task in tasks] == ["KLUE-STS"]
    assert [(task.name, set(task.subsets)) for task in lost] == [("SIB200Classification", {"kor_Hang"})]


def test_pairs_of_two_languages_count_for_neither(tmp_path):
    entry = {"name": "Tatoeba", "dir": "t", "eval_splits": ["test"], "subsets": {"spa-eng": "es"}}
    (tmp_path / "tasks.json").write_text(json.dumps([entry]))
    (task,), _ = choose(None, tmp_path, languages=["es"])
    assert task.subsets == {"spa-eng": ("es", "en")}
    scores = {"Tatoeba": {"spa-eng": 0.5}}
    assert not suite.language_means(scores, [task])
    assert suite.pair_means(scores, [task])["Tatoeba"] == suite.Mean(0.5, 1, 1)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([1], "entry 0 is no object"),
        ([{}], "entry 0 needs a 'name'"),
        ({"name": "x"}, "is not a list of tasks"),
        ([{"name": "KLUE-STS", "dir": "x", "eval_splits": "test", "subsets": {"default": "ko"}}], "'eval_splits'"),
        ([{"name": "KLUE-STS", "dir": "x", "eval_splits": ["test"], "subsets": []}], "'subsets' that is a dict"),
        ([{"name": "KLUE-STS", "dir": "x", "eval_splits": ["test"], "subsets": {"default": 3}}], "needs a language"),
    ],
)
def test_a_list_of_tasks_that_is_none_is_one_clear_line(tmp_path, entries, words):
    (tmp_path / "tasks.json").write_text(json.dumps(entries))
    with pytest.raises(LusiferError, match=words) as caught:
        choose(None, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_damaged_cache_is_set_aside(tmp_path):
    (tmp_path / "c.sqlite").write_bytes(b"not a database at all" * 100)
    cache = EmbeddingCache(tmp_path / "c.sqlite", lambda texts: np.ones((len(texts), 2), "f4"))
    assert cache(["a"]).shape == (1, 2) and (tmp_path / "c.damaged").is_file()


@pytest.mark.parametrize("content", ["STTS: Find it\n", "STS: {both: x}\n", "STS: {}\n"])
def test_prompts_that_match_nothing_are_refused(tmp_path, content):
    (tmp_path / "p.yaml").write_text(content)
    with pytest.raises(LusiferError, match="no task or type 'STTS'; STS|must map"):
        load_prompts(tmp_path / "p.yaml")


def test_long_texts_are_cut_to_what_an_encoder_reads(tiny_encoder):
    loaded = load_embedder(f"encoder:{tiny_encoder}", device="cpu")
    assert loaded.max_seq_length == 128 and loaded.embed(["the cat " * 500]).shape == (1, 32)
    with pytest.raises(LusiferError, match="no device 'nonsense'"):
        load_embedder(f"encoder:{tiny_encoder}", device="nonsense")


def test_an_encoder_that_is_a_model_of_sentences_keeps_its_pooling_and_prompts(tiny_encoder, tmp_path, call):
    folder = save_sentence_encoder(tiny_encoder, tmp_path)
    loaded, model = load_embedder(f"encoder:{folder}", device="cpu"), SentenceTransformer(folder, device="cpu")
    assert loaded.prompts == {"query": "the query: ", "document": "a passage: "}
    assert loaded.default_prompt_name == "query" and list(loaded.tokenizers) == ["encoder"]
    found = loaded.embed(["a passage: the cat"])
    np.testing.assert_allclose(found, model.encode(["the cat"], prompt_name="document"), atol=1e-6)
    seen = []
    language_profile(lambda texts: seen.extend(texts) or np.ones((len(texts), 2), "f4"), {}, "the query: ")
    assert seen and all(text.startswith("the query: ") for text in seen)
    code, out, _ = call("evaluate", f"encoder:{folder}", "--langs", "en,fr", "--json", "-q")
    expected = score(embedder(model), languages=["en", "fr"], progress=False)
    assert code == 0 and json.loads(out) == expected


@pytest.mark.parametrize("prompts", [{"query": "q: ", "document": "d: "}, {"query": "q: ", "passage": "p: "}, {}])
@pytest.mark.parametrize("default", [None, "query"])
def test_a_task_has_the_models_prompts_unless_one_is_given(tiny_st, prompts, default):
    tiny_st.prompts, tiny_st.default_prompt_name = dict(prompts), default if prompts else None
    embedder = Embedder(None, prompts=tiny_st.prompts, default_prompt_name=tiny_st.default_prompt_name)
    task = mteb.get_task("MLQARetrieval").metadata
    model = evaluation.CachedModel(None, {}, "local/some", embedder)
    side = mteb.types.PromptType
    asked = {side.query: tiny_st.encode_query, side.document: tiny_st.encode_document, None: tiny_st.encode}
    for role, encode in asked.items():
        prefix = model.prefix(task, role)
        np.testing.assert_allclose(tiny_st.encode([prefix + "the cat"], prompt=""), encode(["the cat"]), atol=1e-6)
        assert evaluation.CachedModel(None, {}, "local/some", embedder, prompt="").prefix(task, role) == ""


def test_a_prompt_for_every_text(data, tmp_path, monkeypatch):
    seen = counting(monkeypatch)
    tasks, _ = choose(None, data)
    evaluation.run("some/model", tasks, tmp_path / "out", data=data, prompt="say: ", progress=False)
    texts = [text for text in seen if "text" in text or "one" in text]
    assert texts and all(text.startswith("say: ") for text in texts if not text.startswith(tuple(everyday_texts())))
    with pytest.raises(LusiferError, match="prompts"):
        evaluation.run("some/model", tasks, tmp_path / "out", data=data, progress=False)
    with pytest.raises(LusiferError, match="no prompt 'odd'; there are none"):
        evaluation.run("some/model", tasks, tmp_path / "new", data=data, prompt_name="odd", progress=False)
    assert not (tmp_path / "new").exists()


def everyday_texts():
    return [text for texts in load_everyday().sentences.values() for text in texts]
