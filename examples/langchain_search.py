"""LangChain: a vector store over texts in five languages. pip install langchain-huggingface"""

import sys

from langchain_core.vectorstores import InMemoryVectorStore
from langchain_huggingface import HuggingFaceEmbeddings

import lusifer

TEXTS = [
    "Der Zug nach Hamburg fährt um neun Uhr ab.",
    "El museo está cerrado los lunes.",
    "今日はとても寒いです。",
    "Где можно купить билеты на концерт?",
    "여기서 공항까지 얼마나 걸려요?",
]


def main(model: str = "starter") -> list[str]:
    """Embeds the texts and searches them in English."""
    embeddings = HuggingFaceEmbeddings(model_name=lusifer.path(model))
    store = InMemoryVectorStore.from_texts(TEXTS, embeddings)
    found = []
    for query in ("When does the train leave?", "Is the museum open today?", "How far is the airport?"):
        document, score = store.similarity_search_with_score(query, k=1)[0]
        found.append(document.page_content)
        print(f"{query} -> {document.page_content} ({score:.2f})")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
