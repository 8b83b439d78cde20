"""The same texts and vectors as everybody keeps them: Parquet, NumPy, LanceDB, Qdrant, Chroma."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

DIM = 8
KINDS = ("parquet", "npy", "lance", "qdrant", "chroma")


def vectors(rows, dim=DIM, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)


def texts(rows):
    return [f"text number {row}" for row in range(rows)]


def fixed(matrix):
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), matrix.shape[1])


def arrow(given, matrix, text="content", **more):
    return pa.table({text: given, "vector": fixed(matrix), **more})


def write(kind, folder, given, matrix):
    """Makes a table of a kind below a folder and returns its location."""
    folder.mkdir(parents=True, exist_ok=True)
    return {"parquet": _parquet, "npy": _npy, "lance": lance, "qdrant": qdrant, "chroma": chroma}[kind](
        folder, given, matrix
    )


def _parquet(folder, given, matrix):
    half = len(given) // 2
    parquet.write_table(arrow(given[:half], matrix[:half]), folder / "part-0.parquet")
    parquet.write_table(arrow(given[half:], matrix[half:]), folder / "part-1.parquet")
    return str(folder)


def _npy(folder, given, matrix):
    np.save(folder / "vectors.npy", matrix)
    lines = "".join(json.dumps({"id": f"n{row}", "body": text}) + "\n" for row, text in enumerate(given))
    (folder / "texts.jsonl").write_text(lines)
    return f"{folder / 'vectors.npy'}+{folder / 'texts.jsonl'}"


def lance(folder, given, matrix, name="docs", **more):
    lancedb = pytest.importorskip("lancedb")
    lancedb.connect(str(folder)).create_table(name, arrow(given, matrix, **more))
    return str(folder)


def qdrant(folder, given, matrix, payload=lambda text: {"page_content": text, "metadata": {"source": "a.pdf"}}):
    library = pytest.importorskip("qdrant_client")
    client = library.QdrantClient(path=str(folder))
    size = {"size": matrix.shape[1], "distance": library.models.Distance.COSINE}
    client.create_collection("docs", vectors_config=library.models.VectorParams(**size))
    points = [
        library.models.PointStruct(id=row, vector=vector, payload=payload(text))
        for row, (text, vector) in enumerate(zip(given, matrix.tolist(), strict=True))
    ]
    for begin in range(0, len(points), 500):
        client.upsert("docs", points[begin : begin + 500])
    client.close()
    return str(folder)


def chroma(folder, given, matrix, how="documents", name="docs"):
    """In a process of its own: one process opens a folder of Chroma with one set of settings."""
    pytest.importorskip("chromadb")
    code = (
        "import sys, json, chromadb; from chromadb.config import Settings\n"
        "folder, how, name, given, matrix = json.load(sys.stdin)\n"
        "client = chromadb.PersistentClient(folder, settings=Settings(anonymized_telemetry=False))\n"
        "docs = client.get_or_create_collection(name, embedding_function=None)\n"
        "what = {'documents': given} if how == 'documents' else {'metadatas': [{how: one} for one in given]}\n"
        "if given: docs.add(ids=[f'c{i}' for i in range(len(given))], embeddings=matrix, **what)\n"
    )
    given_in = json.dumps([str(folder), how, name, given, matrix.tolist()])
    subprocess.run([sys.executable, "-c", code], input=given_in, text=True, check=True, capture_output=True)
    return str(folder)
