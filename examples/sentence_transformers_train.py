"""Sentence Transformers: mine hard negatives with a model, then train it further with their trainer and loss."""

import sys
import tempfile

from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.util import mine_hard_negatives

import lusifer

PAIRS = {
    "How do I reset my password?": "Click on 'forgot password' and follow the link in the mail.",
    "How do I change my password?": "Open the settings, choose security, and enter a new password twice.",
    "Where is my invoice?": "Invoices are in your account under billing, as PDF files.",
    "Can I pay by bank transfer?": "Bank transfers are accepted for orders above one hundred euros.",
    "How long does delivery take?": "Parcels arrive within three working days.",
    "Can I return an item?": "Items can be sent back within thirty days, free of charge.",
    "Do you ship abroad?": "We deliver to all countries of the European Union.",
    "How do I close my account?": "Write to support from the address you registered with.",
}


def main(model: str = "starter", steps: str = "4") -> float:
    """Mines hard negatives, trains for a few steps and returns how far an embedding has moved."""
    embedder = lusifer.load(model)
    pairs = Dataset.from_dict({"query": list(PAIRS), "answer": list(PAIRS.values())})
    mined = mine_hard_negatives(
        pairs, embedder, num_negatives=1, range_max=4, sampling_strategy="top", use_faiss=False, verbose=False
    )
    print(f"{mined[0]['query']} but not: {mined[0]['negative']}")
    before = embedder.encode("Wo ist meine Rechnung?")
    arguments = SentenceTransformerTrainingArguments(
        tempfile.mkdtemp(), max_steps=int(steps), per_device_train_batch_size=4, learning_rate=2e-4,
        report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    SentenceTransformerTrainer(embedder, arguments, mined, loss=MultipleNegativesRankingLoss(embedder)).train()
    moved = 1 - float(before @ embedder.encode("Wo ist meine Rechnung?"))
    print(f"cosine distance of an embedding to what it was: {moved:.4f}")
    return moved


if __name__ == "__main__":
    main(*sys.argv[1:])
