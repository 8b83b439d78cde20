"""Search by meaning: an index of texts and their vectors, in a folder or on a Qdrant server.

`indexing` brings the texts of a file into an index. An index is a `store.Store`, of which there are two,
`lance.LanceStore` and `qdrant.QdrantStore`; `locations` opens either by its name, or what something else made
(`foreign.TableStore`), and `agreement` says whether a model may query it. `filters` is the language of
``--where``, `lexical` makes the words of BM25, `page` is the search page with its map of the texts (`corpus_map`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lusifer.lazy import lazy

if TYPE_CHECKING:
    from lusifer.search.locations import create_store, open_any, open_store, store_exists
    from lusifer.search.store import Entry, Hit, IndexInfo, Store

__all__ = ["Entry", "Hit", "IndexInfo", "Store", "create_store", "open_any", "open_store", "store_exists"]

__getattr__ = lazy(
    __name__,
    dict.fromkeys(("Entry", "Hit", "IndexInfo", "Store"), "store")
    | dict.fromkeys(("create_store", "open_any", "open_store", "store_exists"), "locations"),
)
