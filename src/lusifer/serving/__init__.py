"""Embeddings over HTTP, as OpenAI's API has them: what `lusifer serve` runs.

1. `server` runs the application under uvicorn and drains it at the end; `ending` ends the process if the model hangs.
2. `limits` reads each request whole, within its size and time, and drops it when its client leaves; `access` checks its
   key and the name it asks for, `unread` counts what clients do not read.
3. `schema` says what a request and its answer hold.
4. `service` tokenises the texts in a thread; `batcher` collects many callers' texts into batches for the model;
   `condition` says how that does.
5. `app` puts these together as a FastAPI application; `metrics` counts for Prometheus.

FastAPI and prometheus-client come with ``lusifer[serving]`` and are imported with the first name taken from here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lusifer.lazy import lazy

if TYPE_CHECKING:
    from lusifer.serving.app import create_app
    from lusifer.serving.limits import ApiError, Limits

__all__ = ["ApiError", "Limits", "create_app"]

__getattr__ = lazy(__name__, {"ApiError": "limits", "Limits": "limits", "create_app": "app"})
