"""Search by meaning: an index of texts and their vectors, in a folder or on a Qdrant server.

`indexing` reads a file and brings its texts into an index. An index is a `store.Store`, of which there are two,
`lance.LanceStore` and `qdrant.QdrantStore`; `locations` opens either by its name. `filters` is the language of
``--where``, `lexical` makes the words of BM25 and names the script of a text, `page` is the search page with its
map of the texts (`corpus_map`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lusifer.search.locations import create_store, open_store, store_exists
    from lusifer.search.store import Entry, Hit, IndexInfo, Store

_HOMES = {name: "locations" for name in ("create_store", "open_store", "store_exists")}
_HOMES |= {name: "store" for name in ("Entry", "Hit", "IndexInfo", "Store")}
__all__ = ["Entry", "Hit", "IndexInfo", "Store", "create_store", "open_store", "store_exists"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
