"""Makes transformers know LUSIFER checkpoints, without importing transformers for those who do not use it.

transformers takes a second to import, which ``lusifer --help`` should not cost. So `register` waits for the module that
holds ``AutoConfig``: once somebody imports it, our configuration is registered there, and the configuration registers
the model's class when the first one is made.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_AUTO = "transformers.models.auto.configuration_auto"
_OURS = ("lusifer.model.configuration", "lusifer.adapt.configuration")


class _Registering(Loader):
    """Runs a module as its own loader would, then imports our configurations, which register themselves."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _import_ours()


def _import_ours() -> None:
    for name in _OURS:
        import_module(name)


class _Finder(MetaPathFinder):
    """Finds the one module that is waited for, once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AUTO:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


def register() -> None:
    """Registers LUSIFER with transformers now, if it has been imported, else as soon as it is."""
    if _AUTO in sys.modules:
        _import_ours()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
