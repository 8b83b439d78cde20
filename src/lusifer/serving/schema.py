"""What an embeddings request says, checked by hand: the first mistake ends it, however large the request is."""

from __future__ import annotations

import base64
import json
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError, WithJsonSchema

from lusifer.serving.limits import ApiError

# Names of input types that other services use, and ours.
INPUT_TYPES = {"search_query": "query", "search_document": "document", "passage": "document"}
_ROWS = 16  # Vectors written as JSON in one go; other threads run in between.

_TEXTS = {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1, "maxItems": 2048}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_INPUT = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        _TEXTS,
        _IDS,
        {"type": "array", "items": _IDS, "minItems": 1, "maxItems": 2048},
    ],
    "description": "A text, texts, the token ids of a text, or those of texts (special tokens included).",
}


class EmbeddingRequest(BaseModel):
    """The body of ``POST /v1/embeddings``."""

    model_config = ConfigDict(extra="forbid")

    input: Annotated[Any, WithJsonSchema(_INPUT)]
    model: StrictStr | None = Field(None, description="The served model's name; may be left out.")
    encoding_format: Literal["float", "base64"] | None = Field("float", description="base64: little-endian float32.")
    dimensions: StrictInt | None = Field(None, ge=1, description="Keep the first so many, and normalise again.")
    input_type: StrictStr | None = Field(
        None, description="query or document (also search_query, search_document, passage): the model's prompt."
    )
    prompt_name: StrictStr | None = Field(None, description="Name of one of the model's prompts.")
    truncate: StrictBool | None = Field(True, description="Cut texts to the model's window; false: an error instead.")
    user: StrictStr | None = Field(None, description="Accepted and not used.")


class Usage(BaseModel):
    """Tokens that the model has read."""

    prompt_tokens: int
    total_tokens: int


class Embedding(BaseModel):
    """One vector."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingResponse(BaseModel):
    """The answer of ``POST /v1/embeddings``."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class ErrorBody(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Every answer that is an error."""

    error: ErrorBody


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def parse(body: bytes) -> EmbeddingRequest:
    """Reads a body; of ``input`` only its presence is checked, see `texts_or_ids`.

    Raises:
        ApiError: 400, for the first mistake.
    """
    try:
        found = json.loads(body, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:200]}", code="invalid_json") from None
    if not isinstance(found, dict):
        raise ApiError(400, "the body must be a JSON object with 'input'", code="invalid_json")
    known = EmbeddingRequest.model_fields
    for name in found:
        if name not in known:
            raise ApiError(400, f"unknown field {name[:60]!r}; there are {', '.join(known)}", param=name[:60])
    try:
        return EmbeddingRequest.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = str(first["loc"][0])
        raise ApiError(400, f"{where}: {first['msg']}", param=where) from None


def texts_or_ids(value: Any, *, most: int, vocabulary: int, window: int) -> tuple[list[str], list[list[int]]]:
    """The texts, or the token ids by text, of ``input``; the other list is empty.

    Args:
        value: The field's JSON.
        most: Most texts.
        vocabulary: Number of token ids there are.
        window: Most token ids of a text.

    Raises:
        ApiError: 400, naming the first text at fault.
    """
    items = value if isinstance(value, list) else [value]
    if items and isinstance(items[0], int):
        items = [items]
    if not items:
        raise _wrong("input is empty; give at least one text")
    if len(items) > most:
        raise _wrong(f"input has {len(items)} texts; at most {most} go into one request")
    if isinstance(items[0], list):
        for row, ids in enumerate(items):
            _check_ids(ids, row, vocabulary, window)
        return [], items
    for row, text in enumerate(items):
        _check_text(text, row)
    return items, []


def _wrong(message: str, code: str | None = None) -> ApiError:
    return ApiError(400, message, param="input", code=code)


def _check_text(text: Any, row: int) -> None:
    if not isinstance(text, str):
        raise _wrong(f"input[{row}] is no string; input is a string, a list of strings, or token ids")
    if not text:
        raise _wrong(f"input[{row}] is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _wrong(f"input[{row}] has half of a surrogate pair at character {error.start}: not Unicode") from None


def _check_ids(ids: Any, row: int, vocabulary: int, window: int) -> None:
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise _wrong(f"input[{row}] is no list of token ids, where the others are")
    if not ids:
        raise _wrong(f"input[{row}] is empty")
    if len(ids) > window:
        raise _wrong(f"input[{row}] has {len(ids)} tokens; the model reads {window}", "context_length_exceeded")
    wrong = next((token for token in ids if not 0 <= token < vocabulary), None)
    if wrong is not None:
        # A number of thousands of digits must not become text.
        shown = wrong if abs(wrong) < 1 << 63 else "a number"
        raise _wrong(f"input[{row}] has {shown}, which is no token id of this model: they are 0 to {vocabulary - 1}")


def choose_prompt(prompts: dict[str, str], default: str | None, request: EmbeddingRequest) -> str:
    """The instruction in front of every text.

    Args:
        prompts: The model's, by name.
        default: The name that holds where the request names none.
        request: The request.

    Raises:
        ApiError: 400 if there is no such name, or two are given.
    """
    if request.input_type is not None and request.prompt_name is not None:
        raise ApiError(400, "give input_type or prompt_name, not both", param="prompt_name")
    given = request.prompt_name if request.prompt_name is not None else request.input_type
    field = "prompt_name" if request.prompt_name is not None else "input_type"
    name = default if given is None else given
    if name is None:
        return ""
    if field == "input_type" and name not in prompts:
        name = INPUT_TYPES.get(name, name)
    if name not in prompts:
        known = ", ".join(sorted(prompts)) or "none"
        raise ApiError(400, f"{field}: the model has no prompt {name[:60]!r}; there are {known}", param=field)
    return prompts[name]


def cut_dimensions(vectors: np.ndarray, dimensions: int | None) -> np.ndarray:
    """The first ``dimensions`` of unit vectors, as unit vectors again (Matryoshka, arXiv 2205.13147).

    Args:
        vectors: (n, dim) float32.
        dimensions: How many to keep; all when None.

    Returns:
        (n, dimensions) float32.
    """
    if dimensions is None or dimensions == vectors.shape[1]:
        return vectors
    kept = vectors[:, :dimensions]
    return kept / np.maximum(np.linalg.norm(kept, axis=1, keepdims=True), 1e-12)


def write(vectors: np.ndarray, *, encoding_format: str, model: str, tokens: int) -> bytes:
    """The JSON of an answer.

    Args:
        vectors: (n, dim) float32.
        encoding_format: ``float`` or ``base64``.
        model: The served name.
        tokens: Tokens read.
    """
    parts = []
    for begin in range(0, len(vectors), _ROWS):
        rows = vectors[begin : begin + _ROWS].astype("<f4")
        values = [base64.b64encode(row.tobytes()).decode() for row in rows]
        found = values if encoding_format == "base64" else rows.tolist()
        data = [{"object": "embedding", "index": begin + row, "embedding": value} for row, value in enumerate(found)]
        parts.append(json.dumps(data, separators=(",", ":"))[1:-1])
    tail = json.dumps({"model": model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})
    return f'{{"object":"list","data":[{",".join(parts)}],{tail[1:]}'.encode()
