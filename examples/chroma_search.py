"""Chroma: a collection with metadata. pip install chromadb"""

import sys

import chromadb
from chromadb.config import Settings
from chromadb.utils.embedding_functions import SentenceTransformerEmbeddingFunction

import lusifer

RECIPES = {
    "es": "Batir los huevos y freírlos con patatas y cebolla.",
    "it": "Cuocere il riso nel brodo con zafferano e burro.",
    "ja": "味噌を出汁に溶かし、豆腐を入れます。",
    "pl": "Pierogi nadziewa się kapustą i grzybami.",
    "th": "ผัดเส้นก๋วยเตี๋ยวกับกุ้งและไข่",
}


def main(model: str = "starter") -> list[str]:
    """Adds recipes, then searches all of them and only those in one language."""
    client = chromadb.EphemeralClient(Settings(anonymized_telemetry=False))
    function = SentenceTransformerEmbeddingFunction(lusifer.path(model))
    recipes = client.get_or_create_collection("recipes", embedding_function=function)
    recipes.upsert(
        ids=list(RECIPES), documents=list(RECIPES.values()), metadatas=[{"language": code} for code in RECIPES]
    )
    found = []
    for query, where in (("noodles with shrimp", None), ("rice with saffron", None), ("soup", {"language": "ja"})):
        result = recipes.query(query_texts=[query], n_results=1, where=where)
        found.append(result["documents"][0][0])
        print(f"{query} -> {found[-1]} ({1 - result['distances'][0][0]:.2f})")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
