"""Several training runs in one group of processes: ``python ranks.py JOBS``, alone or under torchrun.

JOBS is a JSON list of objects: ``recipe``, ``output`` and ``overrides`` as for ``lusifer train``; ``cut``, a stage and
how many steps it gets before it stops; ``signal``, likewise, for a SIGTERM to the second process; ``llm_alone``, for
the baseline. Each process writes ``OUTPUT.RANK.json``: the class of the
trained model and how often the feed-forward net of the LLM's first layer ran, for each stage, and an error.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from lusifer.errors import LusiferError
from lusifer.publishing import write_json
from lusifer.recipes import load_recipe
from lusifer.training import stages, train
from lusifer.training.llm_baseline import train_llm_alone
from lusifer.training.processes import processes, wait_for_all

TRAIN = stages._train
STEPS = {loss: loss.step for loss in (stages.AlignmentLoss, stages.ContrastiveLoss)}


class Cut(Exception):
    """The run stops here."""


def watch(job):
    """Puts in place what stops and observes a job; returns what it will have seen."""
    seen = {"classes": [], "layers": []}

    def watched(recipe, name, model, loss, *arguments):
        calls, steps = [], []
        limit, signalled = (dict([job.get(key, ("", 0))]).get(name) for key in ("cut", "signal"))

        def step(self, *positional, **options):
            steps.append(None)
            if limit is not None and len(steps) > limit:
                raise Cut
            if len(steps) == signalled and processes().process_index == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return STEPS[type(loss)](self, *positional, **options)

        handle = model.llm.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(None))
        type(loss).step = step
        try:
            return TRAIN(recipe, name, model, loss, *arguments)
        finally:
            type(loss).step = STEPS[type(loss)]
            handle.remove()
            seen["classes"].append(type(model).__name__)
            seen["layers"].append(len(calls))

    stages._train = watched
    return seen


def main():
    state = processes()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        seen = watch(job)
        recipe = load_recipe(job["recipe"], [*job.get("overrides", ()), "--output", job["output"]])
        try:
            (train_llm_alone if job.get("llm_alone") else train)(recipe, progress=False)
        except Cut:
            assert "cut" in job
        except LusiferError as error:
            assert "signal" in job, error
            seen["error"] = str(error)
        write_json(Path(f"{job['output']}.{state.process_index}.json"), seen)
        wait_for_all()


if __name__ == "__main__":
    main()
