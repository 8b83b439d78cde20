"""Bulk encoding: any amount of texts into Parquet shards, to be interrupted and resumed at will.

`run` is the entrance: it asks `plan` for the shards of an input, keeps the manifest, and lets an engine
(`local_engine`, `ray_engine`) make what is missing; `shard` makes one shard; `job` holds the plain values they share.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lusifer.lazy import lazy

if TYPE_CHECKING:
    from lusifer.bulk.run import encode

__all__ = ["encode"]

__getattr__ = lazy(__name__, {"encode": "run"})
