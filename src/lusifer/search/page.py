"""A search page over an index: type in any language, see texts of all languages, and the corpus as a map."""

# Annotations are evaluated here: FastAPI reads those of the routes, and their names exist in one function only.
import base64
import hashlib
import re
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from importlib.resources import files
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from lusifer.data.prompts import Prompted, prompt_for
from lusifer.data.vectors.agreement import unit
from lusifer.errors import LusiferError
from lusifer.search.corpus_map import CorpusMap
from lusifer.search.filters import Filter, OneOf, Several
from lusifer.search.indexing import Encoder
from lusifer.search.store import Hit, Store
from lusifer.search.turns import BusyError, Turns

if TYPE_CHECKING:
    from fastapi import APIRouter

Result = TypeVar("Result")

MOST_RESULTS = 100
_LONGEST_QUERY = 2000


def find(
    store: Store,
    encoder: Encoder,
    query: str,
    *,
    k: int = 10,
    where: Any = None,
    exact: bool = False,
    hybrid: bool = False,
    prompt: str | None = None,
) -> list[Hit]:
    """Searches an index for a query in words, in any language.

    Args:
        store: The index.
        encoder: Its model.
        query: The query.
        k: Texts wanted.
        where: Only texts this filter keeps.
        exact: Compare with every vector.
        hybrid: Join with BM25.
        prompt: Put before the query for the model, not for BM25; the model's own query prompt when None.

    Raises:
        LusiferError: If the query is empty, the filter wrong, or the index unreadable.
    """
    vector = unit(encoder.encode([_asked(encoder, query, prompt)]))[0]
    return _nearest(store, vector, query, k=k, where=where, exact=exact, hybrid=hybrid)


def _nearest(
    store: Store, vector: np.ndarray, query: str, *, k: int, where: Any, exact: bool = False, hybrid: bool
) -> list[Hit]:
    if hybrid:
        return store.hybrid(vector, query, k=k, where=where, exact=exact)
    return store.search(vector, k=k, where=where, exact=exact)


def _asked(encoder: "Encoder | Embedder", query: str, prompt: str | None) -> str:
    """What the model reads of a query."""
    if not query.strip():
        raise LusiferError("the query is empty")
    return prompt_for(encoder.model, "query", prompt=prompt) + query


@runtime_checkable
class Embedder(Protocol):
    """A model that serves many callers by itself."""

    @property
    def model(self) -> Prompted:
        """The model, for its prompts."""

    @property
    def dimension(self) -> int:
        """Length of a vector."""

    async def embed(self, texts: Sequence[str]) -> np.ndarray:
        """(n, dim) float32 unit vectors of texts."""


def make_router(store: Store, encoder: "Encoder | Embedder", *, prompt: str | None = None) -> "APIRouter":
    """The page and what it asks for, to be included in any FastAPI app.

    ``GET /`` is the page. ``GET /search?q=...&k=10&lang=...&where=...&hybrid=false`` finds texts; ``lang`` may be given
    several times, ``where`` is a filter as in `lusifer.search.filters`. ``GET /map`` has ``status``, ``count``,
    ``languages``, ``columns``, ``model`` and, once computed, the points. Where more ask than can be answered within
    some seconds, the rest gets 429; a search whose caller leaves is dropped.

    Args:
        store: The index; `lusifer.search.agreement.admit` has been called.
        encoder: Its model. One query at a time goes through it, unless it is an `Embedder`.
        prompt: Put before every query; the model's own query prompt when None.

    Raises:
        LusiferError: If the encoder's vectors have another length, or FastAPI is not installed.
    """
    try:
        from fastapi import APIRouter, HTTPException, Query
        from fastapi.responses import HTMLResponse
    except ImportError as error:
        raise LusiferError("the search page needs FastAPI: pip install 'lusifer[search]'") from error
    if encoder.dimension != store.info.dimension:
        raise LusiferError(
            f"the index {store.location!r} holds vectors of {store.info.dimension} dimensions, the model makes "
            f"{encoder.dimension}; use {store.info.model!r}"
        )
    router = APIRouter()
    corpus_map = CorpusMap(store)
    one_at_a_time, turns = threading.Lock(), Turns()
    html, policy = _page()

    async def answer(begun: Callable[[], Awaitable[Result]]) -> Result:
        try:
            with turns.turn():
                return await begun()
        except BusyError as error:
            raise HTTPException(429, str(error), headers={"Retry-After": str(error.seconds)}) from error
        except LusiferError as error:
            raise HTTPException(400, str(error)) from error

    def search_alone(query: str, **options: Any) -> list[Hit]:
        assert not isinstance(encoder, Embedder)
        with one_at_a_time:
            return find(store, encoder, query, prompt=prompt, **options)

    async def search_together(query: str, **options: Any) -> list[Hit]:
        if not isinstance(encoder, Embedder):
            return await turns.run(partial(search_alone, query, **options))
        vector = unit(await encoder.embed([_asked(encoder, query, prompt)]))[0]
        return await turns.run(partial(_nearest, store, vector, query, **options))

    @router.get("/", response_class=HTMLResponse, include_in_schema=False)
    def page() -> HTMLResponse:
        return HTMLResponse(html, headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"})

    @router.get("/search")
    async def search(
        q: Annotated[str, Query(max_length=_LONGEST_QUERY)],
        k: Annotated[int, Query(ge=1, le=MOST_RESULTS)] = 10,
        lang: Annotated[list[str] | None, Query()] = None,
        where: Annotated[str, Query(max_length=_LONGEST_QUERY)] = "",
        hybrid: bool = False,
    ) -> dict[str, Any]:
        """Texts nearest to a query in any language."""
        begin = time.perf_counter()

        async def look() -> list[Hit]:
            return await search_together(q, k=k, where=_condition(store, lang, where), hybrid=hybrid)

        hits = await answer(look)
        took = round(1000 * (time.perf_counter() - begin), 1)
        return {"query": q, "hits": [hit.to_dict() for hit in hits], "milliseconds": took}

    @router.get("/map")
    async def the_map() -> dict[str, Any]:
        """The corpus in two dimensions; ask again while it is computed."""

        def look() -> dict[str, Any]:
            languages = store.languages()
            totals = {"count": sum(languages.values()), "languages": languages, "model": store.info.model or "unknown"}
            return {**totals, "columns": store.info.columns, **corpus_map.get()}

        return await answer(partial(turns.run, look))

    return router


def _condition(store: Store, langs: Sequence[str] | None, where: str) -> Filter | None:
    """What a text has to be to be found: of one of the languages, and kept by the filter."""
    asked = store.parsed(where) if where.strip() else None
    parts: list[Filter] = [OneOf("lang", tuple(langs))] if langs else []
    parts += [asked] if asked is not None else []
    return Several("AND", tuple(parts)) if len(parts) > 1 else next(iter(parts), None)


def _page() -> tuple[str, str]:
    """The page, and a policy that lets nothing run but its own script."""
    html = (files("lusifer") / "resources" / "search.html").read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode("utf-8")).digest()).decode()
    return html, (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'self'"
    )
