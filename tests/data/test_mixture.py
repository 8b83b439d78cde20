"""The plan of a stage: proportions, homogeneous batches, epochs, and examples that depend on nothing but position."""

from __future__ import annotations

import json
import random
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, SequentialSampler

from lusifer import LusiferError
from lusifer.data.mixture import Mixture
from lusifer.recipes.schema import DataRecipe


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LUSIFER_CACHE", str(tmp_path / "cache"))


def pairs(path, count, **fields):
    rows = [
        {
            "query": f"{path.stem} q{i}",
            "positive": [f"{path.stem} p{i} {k}" for k in range(3)],
            "negative": [f"{path.stem} n{i} {k}" for k in range(4)],
            **{name: make(i) for name, make in fields.items()},
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def mixture(*sets, steps=20, batch_size=4, seed=0):
    return Mixture(list(sets), steps=steps, batch_size=batch_size, seed=seed)


def contrast(source, **fields):
    return DataRecipe(source=source, task="contrast", **fields)


def everything(made):
    return [made[position] for position in range(len(made))]


def number(example):
    """Row number of an example's query."""
    return int(example["query"].split(" q")[-1])


def test_an_example_of_each_task(tmp_path):
    source = pairs(tmp_path / "a.jsonl", 10)
    item = contrast(source, hard_negatives=2, instruction="Find it", in_batch_negatives=False)
    example = mixture(item)[7]
    i = number(example)
    assert example["query"] == f"Instruct: Find it\nQuery: a q{i}"
    assert example["positive"] in {f"a p{i} {k}" for k in range(3)}
    assert len(set(example["negatives"])) == 2 and set(example["negatives"]) <= {f"a n{i} {k}" for k in range(4)}
    assert {key: example[key] for key in ("task", "dataset", "position", "in_batch_negatives")} == {
        "task": "contrast", "dataset": source, "position": 7, "in_batch_negatives": False,
    }  # fmt: skip
    example = mixture(DataRecipe(source=source, task="complete"))[3]
    assert (
        set(example) == {"task", "dataset", "position", "source", "plain", "role", "target"}
        and example["task"] == "complete"
    )
    assert example["target"].startswith(example["source"].replace(" q", " p") + " ")
    example = mixture(DataRecipe(source=source, task="reconstruct"))[3]
    assert example["source"] == example["target"] and example["task"] == "reconstruct"
    example = mixture(DataRecipe(source=source, task="complete", instruction="Go on", reverse=1))[3]
    assert example["source"] == f"Instruct: Go on\nQuery: {example['plain']}" and " p" in example["plain"]
    assert example["role"] == "document" and " q" in example["target"]


def test_rows_with_fewer_negatives_repeat_all_of_them(tmp_path):
    made = mixture(contrast(pairs(tmp_path / "a.jsonl", 10), hard_negatives=6))
    for example in everything(made):
        assert sorted(Counter(example["negatives"]).values()) == [1, 1, 2, 2]


def test_sets_are_drawn_in_proportion_to_weight_times_rows(tmp_path):
    sets = [
        contrast(pairs(tmp_path / "a.jsonl", 100)),
        contrast(pairs(tmp_path / "b.jsonl", 50), weight=4.0),
        contrast(pairs(tmp_path / "c.jsonl", 90), cap=30),
    ]
    for seed in range(5):
        for steps in (1, 7, 33, 100):
            counts = np.bincount(mixture(*sets, steps=steps, seed=seed).plan, minlength=3)
            expected = steps * np.array([100, 200, 30]) / 330
            assert counts.sum() == steps
            # Systematic sampling rounds each share up or down; independent draws would stray by about 5 of 100.
            assert (abs(counts - expected) < 1).all()


def test_the_plan_is_shuffled_and_every_seed_has_its_own(tmp_path):
    sets = [contrast(pairs(tmp_path / f"{name}.jsonl", 100)) for name in "ab"]
    plans = [mixture(*sets, steps=200, seed=seed).plan for seed in (0, 0, 1)]
    assert (plans[0] == plans[1]).all() and (plans[0] != plans[2]).any()
    # A random order of 100 and 100 changes set about 100 times (standard deviation 7); a sorted one once.
    assert 70 < np.count_nonzero(np.diff(plans[0])) < 130


def test_a_rare_set_is_drawn_over_seeds_as_often_as_its_share(tmp_path):
    sets = [contrast(pairs(tmp_path / "a.jsonl", 95)), contrast(pairs(tmp_path / "b.jsonl", 5), weight=1.0)]
    drawn = [int((mixture(*sets, steps=4, seed=seed).plan == 1).sum()) for seed in range(300)]
    # Share 0.05 of 4 steps: mean 0.2, standard error 0.023.
    assert np.mean(drawn) == pytest.approx(0.2, abs=0.08)


def test_a_batch_holds_one_set(tmp_path):
    sets = [contrast(pairs(tmp_path / f"{name}.jsonl", 30)) for name in "abc"]
    made = everything(mixture(*sets, steps=40))
    for step in range(40):
        assert len({example["dataset"] for example in made[4 * step : 4 * step + 4]}) == 1


def test_a_batch_holds_one_cluster_and_clusters_count_by_their_rows(tmp_path):
    source = pairs(tmp_path / "a.jsonl", 60, cluster=lambda i: "abc"[min(i % 6, 2)])
    made = mixture(contrast(source), steps=60)
    seen = Counter()
    for step in range(60):
        clusters = {min(number(made[4 * step + k]) % 6, 2) for k in range(4)}
        assert len(clusters) == 1
        seen[clusters.pop()] += 1
    assert seen == {0: 10, 1: 10, 2: 40}
    # 60 steps of 4 are four epochs of 60 rows.
    assert set(Counter(number(example) for example in everything(made)).values()) == {4}


def test_clusters_smaller_than_a_batch_fill_it_one_after_the_other(tmp_path):
    """As published: k-means clusters of some 20 rows, and batches of 256."""
    source = pairs(tmp_path / "a.jsonl", 400, cluster=lambda i: i % 80)
    for item in (contrast(source), DataRecipe(source=source, task="complete")):
        made = mixture(item, steps=40, batch_size=20)
        assert len(made.strata) == 1
        orders = []
        for epoch in range(2):
            field = "plain_query" if item.task == "contrast" else "source"
            codes = [int(made[400 * epoch + k][field].split(" q")[1]) % 80 for k in range(400)]
            changes = sum(one != other for one, other in zip(codes, codes[1:], strict=False))
            # 80 runs of five; a row that the end of an epoch shares with its batch may have moved.
            assert Counter(codes) == dict.fromkeys(range(80), 5) and changes < 100
            orders.append(codes)
        assert orders[0] != orders[1]


def test_clusters_of_all_sizes_are_drawn_as_often_as_they_have_rows(tmp_path):
    source = pairs(tmp_path / "a.jsonl", 60, cluster=lambda i: "large" if i < 30 else f"c{i // 3}")
    made = Mixture([contrast(source)], steps=15 * 4, batch_size=4, seed=0, held_out=6)
    assert [stratum.cluster for stratum in made.strata] == ["large", None]
    held = {number(example) for examples in made.held_out_examples() for example in examples}
    counts = Counter(number(example) for example in everything(made))
    assert len(held) == 6 and held.isdisjoint(counts)
    assert len(counts) == 54 and max(counts.values()) - min(counts.values()) <= 1


def test_rows_are_held_out_also_of_many_sets(tmp_path):
    """Forty sets share 32 rows: less than the two that can be compared."""
    sets = [contrast(pairs(tmp_path / f"{k}.jsonl", 40), positives=3) for k in range(40)]
    made = Mixture(sets, steps=10, batch_size=96, seed=0, held_out=32)
    assert [len(examples) for examples in made.held_out_examples()] == [2] * 40


def test_a_record_makes_as_many_rows_as_the_recipe_says_each_with_another_positive(tmp_path):
    made = mixture(contrast(pairs(tmp_path / "a.jsonl", 12), positives=3, hard_negatives=4), steps=8, batch_size=7)
    for step in range(8):
        batch = [made[7 * step + place] for place in range(7)]
        assert [number(example) for example in batch] == [number(batch[first]) for first in (0, 0, 0, 3, 3, 3, 6)]
        for first in (0, 3):
            assert len({example["positive"] for example in batch[first : first + 3]}) == 3
        assert all(len(example["negatives"]) == 4 for example in batch)
    records = [number(made[7 * step + place]) for step in range(8) for place in (0, 3, 6)]
    assert Counter(records) == dict.fromkeys(range(12), 2)


def test_every_row_once_an_epoch_in_a_new_order_each_time(tmp_path):
    made = everything(mixture(contrast(pairs(tmp_path / "a.jsonl", 21)), steps=21, batch_size=4))
    epochs = [[number(example) for example in made[21 * e : 21 * e + 21]] for e in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(21))
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize(("rows", "batch_size"), [(21, 4), (5, 4), (8, 8), (9, 8), (13, 8), (15, 8)])
def test_no_batch_holds_a_row_twice_also_across_epochs(tmp_path, rows, batch_size):
    made = everything(mixture(contrast(pairs(tmp_path / "a.jsonl", rows)), steps=60, batch_size=batch_size))
    numbers = [number(example) for example in made]
    for step in range(60):
        assert len(set(numbers[batch_size * step : batch_size * (step + 1)])) == batch_size
    for epoch in range(60 * batch_size // rows):
        assert sorted(numbers[rows * epoch : rows * (epoch + 1)]) == list(range(rows))


def test_choices_change_between_epochs(tmp_path):
    made = everything(mixture(contrast(pairs(tmp_path / "a.jsonl", 4), hard_negatives=1), steps=30))
    for name in ("positive", "negatives"):
        found = Counter(str(example[name]) for example in made if number(example) == 0)
        assert len(found) == (3 if name == "positive" else 4)


@pytest.fixture
def varied(tmp_path):
    text = tmp_path / "t.jsonl"
    text.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(25)))
    return [
        contrast(pairs(tmp_path / "a.jsonl", 40), hard_negatives=2, weight=2.0),
        contrast(pairs(tmp_path / "b.jsonl", 30, cluster=lambda i: i % 3), end=0.5),
        contrast(pairs(tmp_path / "c.jsonl", 30), cap=10, streaming=True, start=0.25),
        DataRecipe(source=str(text), task="reconstruct"),
    ]


def test_any_position_alone_is_what_it_is_in_order(varied):
    made = mixture(*varied)
    expected = everything(made)
    order = list(range(len(made)))
    random.Random(0).shuffle(order)
    fresh = mixture(*varied)
    for position in order:
        assert fresh[position] == expected[position]


@pytest.mark.parametrize("done", [1, 37, 79])
def test_resuming_gives_the_same_examples_from_there_on(varied, done):
    expected = everything(mixture(*varied))
    fresh = mixture(*varied)
    assert [fresh[position] for position in range(done, len(fresh))] == expected[done:]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_slice_the_same_global_batch(varied, ranks):
    expected = everything(mixture(*varied))
    share = 4 // ranks
    for rank in range(ranks):
        fresh = mixture(*varied)
        for step in range(fresh.steps):
            mine = range(4 * step + rank * share, 4 * step + (rank + 1) * share)
            assert [fresh[position] for position in mine] == [expected[position] for position in mine]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_change_nothing(varied, workers):
    made = mixture(*varied)
    loader = DataLoader(
        made, batch_size=4, sampler=SequentialSampler(made), num_workers=workers, collate_fn=lambda rows: rows
    )
    assert [example for batch in loader for example in batch] == everything(mixture(*varied))


def test_workers_started_afresh_get_the_sets_by_path(varied):
    import pickle

    made = mixture(*varied)
    assert everything(pickle.loads(pickle.dumps(made))) == everything(made)


def test_sets_come_and_go_at_their_share_of_the_steps(tmp_path):
    sets = [
        contrast(pairs(tmp_path / "a.jsonl", 30), end=0.5),
        contrast(pairs(tmp_path / "b.jsonl", 30), start=0.25),
        contrast(pairs(tmp_path / "c.jsonl", 60), start=0.5, end=0.75),
    ]
    plan = mixture(*sets, steps=40).plan
    quarters = [np.bincount(plan[10 * k : 10 * k + 10], minlength=3) for k in range(4)]
    assert quarters[0].tolist() == [10, 0, 0]
    assert quarters[1].tolist() == [5, 5, 0]
    assert quarters[2][0] == 0 and abs(quarters[2][1] - 10 / 3) < 1
    assert quarters[3].tolist() == [0, 10, 0]


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_phases_shorter_than_a_step_leave_no_gap(tmp_path, steps):
    source = pairs(tmp_path / "a.jsonl", 30)
    sets = [contrast(source, end=0.3), contrast(source, start=0.3, end=0.35), contrast(source, start=0.35)]
    assert len(everything(mixture(*sets, steps=steps))) == 4 * steps


@pytest.mark.parametrize(("reverse", "low", "high"), [(0.0, 0, 0), (1.0, 400, 400), (0.25, 66, 134)])
def test_the_share_of_reversed_completions(tmp_path, reverse, low, high):
    item = DataRecipe(source=pairs(tmp_path / "a.jsonl", 50), task="complete", reverse=reverse)
    made = everything(mixture(item, steps=100))
    for example in made:
        sides = sorted((example["source"], example["target"]), key=lambda text: " q" not in text)
        assert sides[1].startswith(sides[0].replace(" q", " p") + " ")
    # 0.25 of 400: standard deviation 8.7, bounds four of them away.
    assert low <= sum(" p" in example["source"] for example in made) <= high


def test_no_global_random_state_is_read_or_changed(varied):
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = states()
    first = everything(mixture(*varied))
    assert states() == before
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    assert everything(mixture(*varied)) == first


def test_streaming_gives_the_rows_in_their_order_and_in_epochs(tmp_path):
    source = pairs(tmp_path / "a.jsonl", 30)
    made = everything(mixture(contrast(source, cap=10, streaming=True), steps=10))
    assert [number(example) for example in made] == list(range(10)) * 4
    local = everything(mixture(contrast(source), steps=30))
    by_row = {number(example): {**example, "position": 0, "positive": ""} for example in local}
    for example in made:
        assert {**example, "position": 0, "positive": ""} == by_row[number(example)]


def test_a_set_smaller_than_a_batch(tmp_path):
    source = pairs(tmp_path / "a.jsonl", 7)
    with pytest.raises(LusiferError, match=r"'.*a.jsonl' has 7 rows, fewer than the batch of 8.*lower batch_size"):
        mixture(contrast(source), batch_size=8)
    assert (
        len(mixture(contrast(source, in_batch_negatives=False, hard_negatives=1), batch_size=8)[100]["negatives"]) == 1
    )
    assert mixture(DataRecipe(source=source, task="complete"), batch_size=8)[100]
    clustered = pairs(tmp_path / "b.jsonl", 20, cluster=lambda i: "small" if i < 7 else "large")
    with pytest.raises(LusiferError, match=r"1 of 2 clusters of '.*b.jsonl', e.g. 'small', has 7 rows"):
        mixture(contrast(clustered), batch_size=8)


def test_positions_end_with_the_last_step(varied):
    made = mixture(*varied, steps=3)
    assert len(made) == 12
    for position in (-1, 12):
        with pytest.raises(IndexError):
            made[position]
