"""How good is a model, in which languages, and what is weak where it is not?

* `everyday`: 64 bundled sentences in 23 languages, scored in seconds; `diagnosis` says which part fails a language.
* `benchmarks` holds the tasks of the paper as data, `tasks` makes mteb's objects of them, `systems` loads whatever can
  be scored, and `run` scores it through mteb, resumably, into the files of `results`. `intervals` adds standard errors,
  `cache` keeps embeddings, `instructions` reads what stands in front of texts, `mteb_model` joins these for mteb.
* `report` puts results side by side.

mteb is imported by `instructions`, `intervals`, `mteb_model`, `results`, `run` and `tasks` alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "diagnose": "diagnosis",
    "choose": "tasks",
    "load_prompts": "instructions",
    "main_scores": "results",
    "score": "everyday",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Loads a public name at its first use, so that light modules stay light."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
