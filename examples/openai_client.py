"""The openai client against `lusifer serve`, as in any program that uses OpenAI's embeddings API. pip install openai"""

import os
import sys

import numpy as np
from openai import OpenAI

QUESTIONS = ["Wo kann ich mein Gepäck lassen?", "¿A qué hora sale el último autobús?", "駅はどこですか。"]


def main(url: str = "http://127.0.0.1:8000/v1", model: str = "starter") -> list[int]:
    """Retrieves the English translation of each question from three."""
    client = OpenAI(base_url=url, api_key=os.environ.get("LUSIFER_API_KEY", "none"))
    english = ["Where is the station?", "Where can I leave my luggage?", "What time does the last bus leave?"]
    texts = [*QUESTIONS, *english]
    data = client.embeddings.create(model=model, input=texts).data
    vectors = np.array([item.embedding for item in data])
    best = (vectors[:3] @ vectors[3:].T).argmax(axis=1)
    for question, index in zip(QUESTIONS, best, strict=True):
        print(f"{question} -> {english[index]}")
    return best.tolist()


if __name__ == "__main__":
    main(*sys.argv[1:])
