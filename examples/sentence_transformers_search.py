"""Sentence Transformers: two processes, fewer dimensions, one byte or one bit per dimension."""

import sys

import numpy as np
from sentence_transformers.util import quantize_embeddings, semantic_search

import lusifer

TEXTS = [
    "Die Bibliothek öffnet um zehn Uhr.",
    "Mi hermana vive en una casa pequeña cerca del mar.",
    "Le train de nuit pour Vienne est complet.",
    "Она учится играть на скрипке.",
    "この川には魚がたくさんいます。",
    "Meu carro precisa de pneus novos.",
]
QUERIES = ["When does the library open?", "There are many fish in the river.", "She is learning the violin."]


def main(model: str = "starter") -> list[str]:
    """Encodes with one and two processes, searches, and prints the hits and the size of smaller vectors."""
    embedder = lusifer.load(model)
    one = embedder.encode(TEXTS)
    two = embedder.encode(TEXTS, device=["cpu", "cpu"], chunk_size=3)
    print(f"two processes: least cosine with one {(one * two).sum(axis=1).min():.6f}")
    queries = embedder.encode(QUERIES)
    found = []
    for query, hits in zip(QUERIES, semantic_search(queries, one, top_k=1), strict=True):
        found.append(TEXTS[hits[0]["corpus_id"]])
        print(f"{query} -> {found[-1]} ({hits[0]['score']:.2f})")
    half = one[:, : one.shape[1] // 2]
    forms = {"float32": one, "half the dimensions": half}
    for precision in ("int8", "ubinary"):
        forms[precision] = quantize_embeddings(one, precision, calibration_embeddings=np.concatenate([one, queries]))
    for name, vectors in forms.items():
        print(f"{name}: {vectors.nbytes // len(vectors)} bytes a text")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
