"""Records of data sets that `datasets` reads: those of the hub, and folders in its layout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from lusifer.data.reading import BLOCK_ROWS, Block
from lusifer.errors import LusiferError, first_line
from lusifer.recipes.schema import DataRecipe


def load_hub_set(item: DataRecipe, *, streaming: bool) -> Any:
    """A split of a data set as `datasets` gives it.

    Args:
        item: The set.
        streaming: Whether to read it over the network as it is asked for.

    Raises:
        LusiferError: If there is no such data set, subset or split, or it cannot be fetched.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        return load_dataset(item.source, item.subset, split=item.split, revision=item.revision, streaming=streaming)
    except (OSError, ValueError, DatasetGenerationError) as error:
        reason = first_line(error.__cause__ or error)
        raise LusiferError(f"cannot read the data set {item.source!r}: {reason}") from error


def hub_blocks(item: DataRecipe) -> Iterator[Block]:
    """The records of a set, in their order.

    Raises:
        LusiferError: If they cannot be read.
    """
    records = load_hub_set(item, streaming=item.streaming)
    done = 0
    try:
        for table in records.with_format("arrow").iter(batch_size=BLOCK_ROWS):
            numbers = range(done + 1, done + len(table) + 1)
            yield Block(item.source, 0, numbers, table, table.column_names, names_of=item.columns)
            done += len(table)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise LusiferError(f"{item.source}: cannot read on after row {done} ({first_line(error)})") from error
