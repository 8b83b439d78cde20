"""LlamaIndex: an index over notes in five languages. pip install llama-index-core llama-index-embeddings-huggingface"""

import sys

from llama_index.core import Document, VectorStoreIndex
from llama_index.embeddings.huggingface import HuggingFaceEmbedding

import lusifer

NOTES = {
    "de": "Bitte die Pflanzen zweimal in der Woche gießen.",
    "fr": "Le code du portail a changé la semaine dernière.",
    "ru": "Соседи вернутся из отпуска в пятницу.",
    "ja": "猫の餌は台所の棚にあります。",
    "tr": "Çöpler pazartesi sabahı toplanıyor.",
}


def main(model: str = "starter") -> list[str]:
    """Indexes the notes and searches them in English."""
    embedding = HuggingFaceEmbedding(model_name=lusifer.path(model), device="cpu")
    documents = [Document(text=text, metadata={"language": code}) for code, text in NOTES.items()]
    # The language is for filters and must not be part of the embedded text.
    for document in documents:
        document.excluded_embed_metadata_keys = ["language"]
    retriever = VectorStoreIndex.from_documents(documents, embed_model=embedding).as_retriever(similarity_top_k=1)
    found = []
    for query in ("Where is the cat food?", "What is the gate code?", "When are the neighbours back?"):
        node = retriever.retrieve(query)[0]
        found.append(node.text)
        print(f"{query} -> [{node.metadata['language']}] {node.text} ({node.score:.2f})")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
