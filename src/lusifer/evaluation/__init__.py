"""How good is a model, in which languages, and what is weak where it is not?

* `everyday`: 64 bundled sentences in 23 languages, scored in seconds; `diagnosis` says which part fails a language.
* `benchmarks` holds the tasks of the paper as data, `tasks` makes mteb's objects of them, `systems` loads whatever can
  be scored, and `run` scores it through mteb, resumably, into the files of `results`. `intervals` adds standard errors,
  `cache` keeps embeddings, `mteb_model` joins prompts and embeddings for mteb. `report` puts results side by side.

mteb is imported by `intervals`, `mteb_model`, `results`, `run` and `tasks` alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lusifer.lazy import lazy

if TYPE_CHECKING:
    from lusifer.evaluation.diagnosis import diagnose
    from lusifer.evaluation.everyday import score
    from lusifer.evaluation.mteb_model import load_prompts
    from lusifer.evaluation.results import main_scores
    from lusifer.evaluation.tasks import choose

__all__ = ["choose", "diagnose", "load_prompts", "main_scores", "score"]

_HOMES = {"choose": "tasks", "diagnose": "diagnosis", "load_prompts": "mteb_model", "main_scores": "results"}
__getattr__ = lazy(__name__, {**_HOMES, "score": "everyday"})
