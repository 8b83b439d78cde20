"""MTEB: score a model on a custom task or on one of mteb's. pip install mteb"""

import sys

import mteb
from datasets import Dataset, DatasetDict
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata

import lusifer

ROWS = [
    ("Der Hund schläft.", "The dog is asleep.", 5.0),
    ("Der Hund schläft.", "The dog is barking.", 2.0),
    ("Die Banane ist gelb.", "Trains are late again.", 0.0),
    ("Ich trinke gern Tee.", "I like to drink tea.", 5.0),
    ("Ich trinke gern Tee.", "I like to drink coffee.", 3.0),
    ("Es regnet seit gestern.", "My shoes are too small.", 0.0),
]


class GermanEnglish(AbsTaskSTS):
    """Six pairs, German to English."""

    metadata = TaskMetadata(
        name="GermanEnglishSixPairs", description="Six pairs.", reference=None, type="STS", category="t2t",
        modalities=["text"], eval_splits=["test"], eval_langs=["deu-Latn", "eng-Latn"], main_score="cosine_spearman",
        dataset={"path": "local", "revision": "1"}, date=None, domains=None, task_subtypes=None, license=None,
        annotations_creators=None, dialect=None, sample_creation=None, bibtex_citation="",
    )  # fmt: skip
    min_score, max_score = 0, 5

    def load_data(self, *args: object, **kwargs: object) -> None:
        """Uses the rows instead of downloading."""
        columns = dict(zip(("sentence1", "sentence2", "score"), map(list, zip(*ROWS, strict=True)), strict=True))
        self.dataset, self.data_loaded = DatasetDict(test=Dataset.from_dict(columns)), True


def main(model: str = "starter") -> float:
    """Scores the model; pass ``mteb.get_tasks(["STS17"])`` instead to score it on one of mteb's tasks."""
    results = mteb.evaluate(lusifer.load(model), [GermanEnglish()], cache=None, show_progress_bar=False)
    score = results.task_results[0].get_score()
    print(f"{results.task_results[0].task_name}: {100 * score:.1f}")
    return float(score)


if __name__ == "__main__":
    main(*sys.argv[1:])
