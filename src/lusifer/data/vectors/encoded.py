"""What the Parquet of ``lusifer encode`` says of itself: which model made its vectors, and of what."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from pyarrow import parquet

FACTS = b"lusifer"  # Key of the facts in the metadata of a file.
MANIFEST = "_manifest.json"  # Beside the shards of a folder; readers of Parquet pass over names with an underscore.
FLOATS = ("float32", "float16")  # Those of its types that keep vectors as they are.


@dataclass(frozen=True)
class MadeBy:
    """How the vectors of a file were made.

    Attributes:
        model: Name of the model, as it was loaded.
        model_hash: See `lusifer.model.fingerprint.weights_hash`.
        dimension: Numbers of the model's vectors; the file may keep fewer.
        prompt: What stood in front of every text.
        document_prompt: What the model has for documents.
        output_dtype: How the vectors are stored: ``float32``, ``float16``, ``int8`` or ``ubinary``.
        text_column: Column of the input that is ``text`` here.
        id_column: Column of the input that is ``id`` here; None where rows are numbered.
        columns: Other columns of the input, and what they are called here.
    """

    model: str
    model_hash: str
    dimension: int
    prompt: str
    document_prompt: str
    output_dtype: str
    text_column: str
    id_column: str | None
    columns: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON."""
        return asdict(self)


def made_by(file: parquet.ParquetFile) -> MadeBy | bool:
    """How the vectors of an opened file were made; whether it is of ``lusifer encode`` at all where it does not say."""
    given = (file.metadata.metadata or {}).get(FACTS)
    if given is None:
        return False
    try:
        facts = json.loads(given)["made_by"]
        return MadeBy(**{one.name: facts[one.name] for one in fields(MadeBy)})
    except (ValueError, KeyError, TypeError):
        return True  # Of a version that did not write it.
