"""From checkpoint to embeddings: the Sentence Transformers view of a model, and encoding of whole files."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Transformer
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from lusifer.adapters import parameters_by_part
from lusifer.errors import LusiferError
from lusifer.modeling import LusiferModel
from lusifer.released import resolve_model
from lusifer.textencoder import FastSentenceTransformer

logger = logging.getLogger(__name__)

_MODALITIES: Any = {"text": {"method": "forward", "method_output_name": "pooler_output"}}


class _InMemory(Transformer):
    """A Transformer module around a model that exists already, where the base class only loads from disk."""

    def __init__(self, folder: str, model: LusiferModel, **kwargs: Any) -> None:
        # nn.Module refuses sub-modules before its own constructor has run.
        self.__dict__["_ready"] = model
        super().__init__(folder, **kwargs)

    def _load_model(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__.pop("_ready")


def to_sentence_transformer(model: LusiferModel, tokenizer: PreTrainedTokenizerBase) -> SentenceTransformer:
    """Wraps a model in memory; saving the result gives a folder of built-in module classes only.

    Args:
        model: The model; shared, not copied.
        tokenizer: The encoder's tokenizer.
    """
    tokenizer.model_max_length = model.config.max_seq_length
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        module = _InMemory(folder, model, modality_config=_MODALITIES, module_output_name="sentence_embedding")
    # modules.json then names the built-in class, which loads without trust_remote_code.
    module.__class__ = Transformer
    return SentenceTransformer(modules=[module, Normalize()], device=str(model.connector.added_tokens.device))


def load_checkpoint(path: str, **kwargs: Any) -> SentenceTransformer:
    """Loads a checkpoint; see `lusifer.load`.

    Raises:
        LusiferError: If there is no readable LUSIFER checkpoint at ``path``.
    """
    path = resolve_model(path)
    folder = Path(path)
    looks_local = folder.is_dir() or path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not (folder / "modules.json").is_file():
        raise LusiferError(f"no checkpoint at {path!r}: it has no modules.json (train one, or check the path)")
    try:
        return FastSentenceTransformer(path, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise LusiferError(f"cannot read the checkpoint {path!r}: {reason}") from error


def lusifer_model(model: SentenceTransformer) -> LusiferModel:
    """The LusiferModel inside a loaded checkpoint.

    Raises:
        LusiferError: If it is another kind of model.
    """
    inner = getattr(model[0], "auto_model", None)
    if not isinstance(inner, LusiferModel):
        raise LusiferError(f"this is a {type(inner).__name__} model, not a LUSIFER checkpoint")
    return inner


def describe(path: str) -> dict[str, Any]:
    """What a checkpoint is made of: parameters by part, sizes, languages, provenance.

    ``trainable`` counts what training changed: adapters, connector, head, and the encoder if it was trained in full.

    Raises:
        LusiferError: If there is no readable LUSIFER checkpoint at ``path``.
    """
    path = resolve_model(path)
    model = lusifer_model(load_checkpoint(path))
    config = model.config
    if not config.standalone:
        model.set_trainable(
            encoder="full" if config.encoder_stored else "lora" if config.encoder_adapter else "frozen",
            connector=True,
            llm=bool(config.llm_adapter),
        )
    folder = Path(path)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
    return {
        "encoder": config.encoder,
        "llm": config.llm,
        "llm_layers": config.llm_config.num_hidden_layers,
        "dimension": config.hidden_size,
        "max_seq_length": config.max_seq_length,
        "pooling": config.pooling,
        "standalone": config.standalone,
        "checkpoint_mb": round(size / 1e6, 1),
        "parameters": parameters_by_part(model),
        "languages": getattr(config.encoder_config, "languages", None) or "those of the encoder",
        "provenance": config.provenance,
    }


def save_atomically(model: SentenceTransformer, folder: Path, **tokenizers: PreTrainedTokenizerBase) -> None:
    """Saves a model so that the folder is either complete or not there.

    Args:
        model: The model.
        folder: Where to; an older checkpoint there is replaced.
        **tokenizers: Further tokenizers, saved in a sub-folder of the keyword's name.

    Raises:
        LusiferError: If the disk is full or not writable; nothing half-written stays.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as staging:
            new, old = Path(staging) / "new", Path(staging) / "old"
            model.save_pretrained(str(new), create_model_card=False)
            for name, tokenizer in tokenizers.items():
                tokenizer.save_pretrained(new / name)
            try:
                if folder.exists():
                    os.replace(folder, old)
                os.replace(new, folder)
            except BaseException:
                if old.exists():
                    os.rename(old, folder)
                raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LusiferError(f"cannot write the checkpoint {str(folder)!r}: {reason}") from error


def read_inputs(path: Path, column: str = "text") -> list[str]:
    """Reads the texts of a file to encode.

    Args:
        path: ``.txt`` (one text per line), ``.jsonl`` or ``.parquet``.
        column: Column that holds the text in the latter two.

    Raises:
        LusiferError: If the file cannot be read, has another format, lacks the column, holds no
            text, or a text is missing, empty or not valid Unicode; the message names the row.
    """
    readers = {".txt": _read_lines, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise LusiferError(f"cannot read {str(path)!r}: name it {', '.join(readers)}")
    if not path.is_file():
        raise LusiferError(f"no such file: {str(path)!r}")
    texts = []
    for row, text in enumerate(readers[path.suffix](path, column), start=1):
        if not isinstance(text, str):
            raise LusiferError(f"{path}, row {row}: {column!r} must be text, not {type(text).__name__}")
        if not text.strip():
            raise LusiferError(f"{path}, row {row}: the text is empty; remove the row")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            raise LusiferError(
                f"{path}, row {row}: lone surrogate U+{code:04X} at character {error.start + 1}; replace it"
            ) from error
        texts.append(text)
    if not texts:
        raise LusiferError(f"{str(path)!r} holds no texts")
    return texts


def _read_lines(path: Path, column: str) -> Iterator[Any]:
    with path.open("rb") as file:
        for row, line in enumerate(file, start=1):
            try:
                # Windows editors open a file with a byte order mark.
                yield line.decode("utf-8-sig" if row == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise LusiferError(f"{path}, row {row}: not valid UTF-8 ({error.reason})") from error


def _read_jsonl(path: Path, column: str) -> Iterator[Any]:
    for row, line in enumerate(_read_lines(path, column), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise LusiferError(f"{path}, row {row}: not valid JSON ({error.msg})") from error
        if not isinstance(record, dict) or column not in record:
            raise LusiferError(f"{path}, row {row}: no {column!r}; choose another with --column")
        yield record[column]


def _read_parquet(path: Path, column: str) -> Iterator[Any]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        if column not in file.schema_arrow.names:
            known = ", ".join(file.schema_arrow.names)
            raise LusiferError(f"{str(path)!r} has no column {column!r}; it has {known} (choose with --column)")
        for batch in file.iter_batches(columns=[column]):
            yield from batch.column(0).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = f"not valid UTF-8 ({error.reason})" if isinstance(error, UnicodeDecodeError) else error
        raise LusiferError(f"cannot read {str(path)!r}: {str(reason).splitlines()[0]}") from error


def encode_texts(
    model: SentenceTransformer,
    texts: list[str],
    *,
    batch_size: int = 32,
    window: int = 4096,
    progress: bool = True,
) -> tuple[np.ndarray, int]:
    """Embeds texts, sorted by length in tokens within a window, order restored.

    Sorting by characters, as Sentence Transformers does, leaves a third of the tokens to padding
    when scripts differ; the token counts are known after tokenising, so they are used.

    Args:
        model: A loaded model.
        texts: The texts.
        batch_size: Texts per forward pass.
        window: Texts sorted together.
        progress: Whether to show a progress bar.

    Returns:
        (n, dim) float32 unit vectors, and how many texts were longer than the model's window and cut.
    """
    limit = model.max_seq_length or 512
    found = np.empty((len(texts), model.get_embedding_dimension() or 0), dtype=np.float32)
    cut = 0
    with tqdm(total=len(texts), desc="encoding", unit="text", disable=not progress) as bar:
        for begin in range(0, len(texts), window):
            chunk = texts[begin : begin + window]
            lengths = [len(ids) for ids in model.tokenizer(chunk, truncation=False, verbose=False)["input_ids"]]
            cut += sum(length > limit for length in lengths)
            order = sorted(range(len(chunk)), key=lambda row: -lengths[row])
            for first in range(0, len(order), batch_size):
                rows = order[first : first + batch_size]
                vectors = model.encode([chunk[row] for row in rows], batch_size=batch_size, show_progress_bar=False)
                found[[begin + row for row in rows]] = vectors
                bar.update(len(rows))
    return found, cut


def write_embeddings(path: Path, texts: list[str], embeddings: np.ndarray) -> None:
    """Writes embeddings whole or not at all.

    Args:
        path: ``.parquet`` (columns ``id``, ``text``, ``embedding``) or ``.npy``.
        texts: The texts, for Parquet.
        embeddings: (n, dim) float32.

    Raises:
        LusiferError: If the format is unknown or the file cannot be written.
    """
    import pyarrow as pa
    from pyarrow import parquet

    check_output(path)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as staging:
            new = Path(staging) / path.name
            if path.suffix == ".npy":
                np.save(new, embeddings)
            else:
                flat = pa.array(embeddings.reshape(-1))
                vectors = pa.FixedSizeListArray.from_arrays(flat, embeddings.shape[1])
                table = pa.table({"id": list(range(len(texts))), "text": texts, "embedding": vectors})
                parquet.write_table(table, new)
            os.replace(new, path)
    except OSError as error:
        raise LusiferError(f"cannot write {str(path)!r}: {error.strerror or error}") from error


def check_output(path: Path) -> None:
    """Refuses an output that could not be written, before the work starts.

    Raises:
        LusiferError: If the format is unknown or the folder is missing or not writable.
    """
    if path.suffix not in (".parquet", ".npy"):
        raise LusiferError(f"cannot write {str(path)!r}: name it .parquet or .npy")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise LusiferError(f"cannot write into {str(path.parent)!r}: no such folder, or not writable")
