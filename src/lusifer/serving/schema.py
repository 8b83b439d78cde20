"""Request and answer of ``POST /v1/embeddings``, as OpenAI has them."""

from __future__ import annotations

import json
from base64 import b64encode
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    Tag,
    ValidationError,
)
from pydantic_core import to_json

from lusifer.serving.limits import ApiError

# Names of input types that other services use, and ours.
INPUT_TYPES = {"search_query": "query", "search_document": "document", "passage": "document"}
_MAX_TEXTS = 2048  # OpenAI's limit.


def _input_kind(value: Any) -> str | None:
    """Which form of ``input`` a value has to have, judged by its first item."""
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list):
        return None
    first = value[0] if value else ""
    return "texts" if isinstance(first, str) else "token ids" if isinstance(first, int) else "token ids of texts"


# With `fail_fast` the first mistake ends the check, however large the request is.
_Text = Annotated[StrictStr, Field(min_length=1)]
_TokenIds = Annotated[list[Annotated[StrictInt, Field(ge=0)]], Field(fail_fast=True, min_length=1)]
_Input = Annotated[
    Annotated[_Text, Tag("text")]
    | Annotated[list[_Text], Field(fail_fast=True, min_length=1, max_length=_MAX_TEXTS), Tag("texts")]
    | Annotated[_TokenIds, Tag("token ids")]
    | Annotated[list[_TokenIds], Field(fail_fast=True, min_length=1, max_length=_MAX_TEXTS), Tag("token ids of texts")],
    Discriminator(
        _input_kind,
        custom_error_type="input_kind",
        custom_error_message="must be a string, a list of strings, or token ids",
    ),
]


class EmbeddingRequest(BaseModel):
    """The body of ``POST /v1/embeddings``."""

    model_config = ConfigDict(extra="forbid")

    input: _Input = Field(
        description="A text, texts, the token ids of a text, or those of texts (special tokens included)."
    )
    model: StrictStr | None = Field(None, description="The served model's name; may be left out.")
    encoding_format: Literal["float", "base64"] | None = Field("float", description="base64: little-endian float32.")
    dimensions: StrictInt | None = Field(None, ge=1, description="Keep the first so many, and normalise again.")
    input_type: StrictStr | None = Field(
        None, description="query or document (also search_query, search_document, passage): the model's prompt."
    )
    prompt_name: StrictStr | None = Field(None, description="Name of one of the model's prompts.")
    truncate: StrictBool | None = Field(
        True, description="Truncate texts to the model's window; false: an error instead."
    )
    user: StrictStr | None = Field(None, description="Accepted and not used.")

    def texts(self) -> list[str]:
        """The texts of ``input``; empty if it holds token ids."""
        if isinstance(self.input, str):
            return [self.input]
        return [text for text in self.input if isinstance(text, str)]

    def token_ids(self, *, vocabulary: int, window: int) -> list[list[int]]:
        """The token ids of ``input`` by text; empty if it contains texts.

        Args:
            vocabulary: Number of token ids the model knows.
            window: Most token ids of a text.

        Raises:
            ApiError: 400, naming the first text at fault.
        """
        if self.texts():
            return []
        rows: Any = [self.input] if isinstance(self.input[0], int) else self.input
        for row, ids in enumerate(rows):
            if len(ids) > window:
                message = f"input[{row}] has {len(ids)} tokens; the model reads {window}"
                raise ApiError(400, message, param="input", code="context_length_exceeded")
            if max(ids) >= vocabulary:
                message = f"input[{row}] holds what is no token id of this model: they are 0 to {vocabulary - 1}"
                raise ApiError(400, message, param="input")
        return rows


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


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def parse(body: bytes) -> EmbeddingRequest:
    """Reads a body.

    Raises:
        ApiError: 400, for the first mistake.
    """
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:200]}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object with 'input'", code="invalid_json")
    fields = EmbeddingRequest.model_fields
    for name in value:
        if name not in fields:
            raise ApiError(400, f"unknown field {name[:60]!r}; there are {', '.join(fields)}", param=name[:60])
    try:
        return EmbeddingRequest.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field, *inside = first["loc"]
        where = f"{field}{''.join(f'[{part}]' for part in inside if isinstance(part, int))}"
        raise ApiError(400, f"{where}: {first['msg'].replace(' after validation', '')}", param=str(field)) from None


def truncate_dimensions(vectors: np.ndarray, dimensions: int | None) -> np.ndarray:
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
    rows = vectors.astype("<f4")
    values: list[Any] = rows.tolist() if encoding_format == "float" else [b64encode(row).decode() for row in rows]
    data = [{"object": "embedding", "index": row, "embedding": value} for row, value in enumerate(values)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return to_json({"object": "list", "data": data, "model": model, "usage": usage})
