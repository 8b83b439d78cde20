"""Qdrant: a collection in the client's local mode, with a language per vector. pip install qdrant-client"""

import sys

from qdrant_client import QdrantClient, models

import lusifer

NEWS = {
    "de": "Die Regierung beschließt ein Gesetz zum Klimaschutz.",
    "es": "El equipo ganó la final en los penaltis.",
    "zh": "科学家发现了一颗新的行星。",
    "ar": "ارتفعت أسعار النفط هذا الأسبوع.",
    "ko": "새로운 지하철 노선이 내일 개통됩니다.",
}


def main(model: str = "starter") -> list[str]:
    """Stores vectors with their language as payload and searches them."""
    embedder = lusifer.load(model)
    client = QdrantClient(":memory:")
    size = embedder.get_embedding_dimension()
    client.create_collection("news", vectors_config=models.VectorParams(size=size, distance=models.Distance.COSINE))
    vectors = embedder.encode_document(list(NEWS.values()))
    points = [
        models.PointStruct(id=i, vector=vector.tolist(), payload={"language": code, "text": text})
        for i, ((code, text), vector) in enumerate(zip(NEWS.items(), vectors, strict=True))
    ]
    client.upsert("news", points)
    found = []
    for query in ("oil prices", "football final", "astronomy"):
        hit = client.query_points("news", query=embedder.encode_query(query).tolist(), limit=1).points[0]
        found.append(hit.payload["text"])
        print(f"{query} -> [{hit.payload['language']}] {hit.payload['text']} ({hit.score:.2f})")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
