"""Tasks of the user's own data, scored by mteb: what ``lusifer evaluate --task`` takes.

`schema` is the YAML file, typed; `columns` reads and checks the files behind it through the one reader of data;
`content` makes of them what a task of its type holds, and its identity; `everyday` gives the bundled set as such tasks;
`tasks` makes mteb's objects of all of them. Only `tasks` imports mteb.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lusifer.lazy import lazy

if TYPE_CHECKING:
    from lusifer.evaluation.own.content import OwnTask
    from lusifer.evaluation.own.tasks import build, open_tasks

__all__ = ["OwnTask", "build", "open_tasks"]

__getattr__ = lazy(__name__, {"OwnTask": "content", "build": "tasks", "open_tasks": "tasks"})
