"""Haystack: indexing and query pipelines. pip install haystack-ai sentence-transformers-haystack"""

import sys

from haystack import Document, Pipeline
from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
from haystack.components.writers import DocumentWriter
from haystack.document_stores.in_memory import InMemoryDocumentStore
from haystack_integrations.components.embedders.sentence_transformers import (
    SentenceTransformersDocumentEmbedder,
    SentenceTransformersTextEmbedder,
)

import lusifer

TEXTS = [
    "Das Passwort wird alle neunzig Tage geändert.",
    "La réunion est reportée à jeudi après-midi.",
    "Отчёт нужно отправить до конца месяца.",
    "プリンターは三階にあります。",
    "O refeitório fecha às duas da tarde.",
]


def main(model: str = "starter") -> list[str]:
    """Indexes documents in one pipeline and searches them in another."""
    path = lusifer.path(model)
    store = InMemoryDocumentStore(embedding_similarity_function="cosine")
    indexing = Pipeline()
    indexing.add_component("embedder", SentenceTransformersDocumentEmbedder(model=path, progress_bar=False))
    indexing.add_component("writer", DocumentWriter(store))
    indexing.connect("embedder", "writer")
    indexing.run({"embedder": {"documents": [Document(content=text) for text in TEXTS]}})
    search = Pipeline()
    search.add_component("embedder", SentenceTransformersTextEmbedder(model=path, progress_bar=False))
    search.add_component("retriever", InMemoryEmbeddingRetriever(store, top_k=1))
    search.connect("embedder.embedding", "retriever.query_embedding")
    found = []
    for query in ("Where is the printer?", "When is the meeting?", "Until when is the canteen open?"):
        document = search.run({"embedder": {"text": query}})["retriever"]["documents"][0]
        found.append(document.content)
        print(f"{query} -> {document.content} ({document.score:.2f})")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
