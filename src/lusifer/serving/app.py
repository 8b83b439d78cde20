"""Embeddings over HTTP as OpenAI's API has them: the FastAPI application that `lusifer serve` runs.

A request is received whole (`lusifer.serving.limits`), checked (`lusifer.serving.schema`), tokenised in a thread
(`lusifer.serving.service`), and waits for the model (`lusifer.serving.batcher`).
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from lusifer import __version__
from lusifer.data.prompts import prompt_for
from lusifer.errors import LusiferError
from lusifer.model.text_encoder import TextEncoder
from lusifer.serving import schema
from lusifer.serving.access import Access
from lusifer.serving.limits import OPEN_PATHS, ApiError, Guard, Limits, Phase
from lusifer.serving.metrics import Metrics
from lusifer.serving.service import EmbeddingService
from lusifer.serving.unread import Unread

_CODES = (400, 401, 404, 405, 408, 413, 421, 422, 429, 500, 503, 504)
_ERRORS: dict[int | str, dict[str, Any]] = {code: {"model": schema.ErrorResponse} for code in _CODES}


def _failed(error: ApiError) -> Response:
    return Response(error.body(), error.status, media_type="application/json", headers=error.headers)


def create_app(
    encoder: TextEncoder | Callable[[], TextEncoder],
    name: str,
    *,
    limits: Limits | None = None,
    phase: Phase | None = None,
    batch_tokens: int | None = None,
    queue_tokens: int | None = None,
    max_wait: float = 5.0,
    api_keys: Collection[str] = (),
    allowed_hosts: Collection[str] = (),
    routers: Sequence[APIRouter] = (),
    public: Collection[str] = (),
) -> FastAPI:
    """The application.

    Args:
        encoder: The model, or a function that loads it; the application answers 503 until it has.
        name: The model's name in requests.
        limits: Sizes and times of requests.
        phase: Shared with what runs the application, which sets ``draining``.
        batch_tokens: Most tokens of a batch; the encoder's own budget when None.
        queue_tokens: Tokens that may wait before requests are refused; eight batches when None.
        max_wait: Seconds that what waits may take before requests are refused.
        api_keys: Accepted keys; none means no authentication.
        allowed_hosts: Names in ``Host`` that are answered, besides ``localhost`` and addresses; ``*`` for any.
        routers: Further routes; they reach the model through ``request.app.state.service``.
        public: Paths of those routes that need no key.
    """
    limits, phase, metrics = limits or Limits(), phase or Phase(), Metrics()
    access = Access(keys=api_keys, hosts=allowed_hosts, public=OPEN_PATHS | set(public))
    unread = Unread(limits.max_unread)
    metrics.unread.set_function(lambda: unread.size)
    service = EmbeddingService(
        encoder,
        phase,
        metrics,
        batch_tokens=batch_tokens,
        queue_tokens=queue_tokens,
        max_wait=max_wait,
        timeout=limits.timeout,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        async with service.running():
            yield {"unread": unread}

    # The interactive pages would load scripts from another host.
    app = FastAPI(
        title="lusifer", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, responses=_ERRORS
    )
    app.state.service = service
    app.add_middleware(Guard, limits=limits, phase=phase, access=access, unread=unread, observe=metrics.request)

    @app.exception_handler(ApiError)
    async def own(request: Request, error: ApiError) -> Response:
        return _failed(error)

    @app.exception_handler(HTTPException)
    async def starlettes(request: Request, error: HTTPException) -> Response:
        message = str(error.detail)
        if error.status_code in (404, 405):
            message = f"{request.method} {request.url.path[:200]!r}: {message.lower()}"
        code = "rate_limit_exceeded" if error.status_code == 429 else None
        return _failed(ApiError(error.status_code, message, code=code, headers=dict(error.headers or {})))

    @app.exception_handler(RequestValidationError)
    async def fastapis(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return _failed(ApiError(422, f"{name}: {first['msg']}", param=name))

    app.include_router(_operations(phase, metrics))
    app.include_router(_openai(service, name))
    for router in routers:
        app.include_router(router)
    return app


def _operations(phase: Phase, metrics: Metrics) -> APIRouter:
    router = APIRouter(tags=["operations"])

    @router.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @router.get("/ready", responses={503: {"description": "Loading, shutting down, or the model fails."}})
    async def ready() -> Response:
        """Whether requests are taken, and answered by the model."""
        trouble = phase.model.trouble() if phase.ready else None
        state = "draining" if phase.draining else "failing" if trouble else "ready" if phase.ready else "loading"
        headers = {} if state == "ready" else {"retry-after": "5"}
        told = {"status": state} | ({"reason": trouble} if trouble and state == "failing" else {})
        return Response(json.dumps(told), 503 if headers else 200, headers, "application/json")

    @router.get("/metrics")
    async def prometheus() -> Response:
        """Counts and times, for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router


def _openai(service: EmbeddingService, name: str) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["OpenAI"])
    card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "lusifer"}

    def check_name(given: str, status_param: str | None) -> None:
        if given != name:
            message = f"no model {given[:100]!r}; this server has {name!r}"
            raise ApiError(404, message, code="model_not_found", param=status_param)

    @router.get("/models")
    async def models() -> dict[str, Any]:
        """The served model."""
        return {"object": "list", "data": [card]}

    @router.get("/models/{model_id:path}")
    async def model(model_id: str) -> dict[str, Any]:
        """The served model, by its name."""
        check_name(model_id, None)
        return card

    body = {"application/json": {"schema": schema.EmbeddingRequest.model_json_schema()}}
    extra = {"requestBody": {"required": True, "content": body}}

    @router.post("/embeddings", response_model=schema.EmbeddingResponse, openapi_extra=extra)
    async def embeddings(request: Request) -> Response:
        """Embeds texts, or their token ids."""
        return await _embeddings(service, await request.body(), check_name, name)

    return router


async def _embeddings(
    service: EmbeddingService, body: bytes, check_name: Callable[[str, str | None], None], name: str
) -> Response:
    encoder = service.encoder
    service.check_load()

    def read() -> tuple[schema.EmbeddingRequest, list[list[int]]]:
        request = schema.parse(body)
        if request.model is not None:
            check_name(request.model, "model")
        if request.dimensions is not None and request.dimensions > encoder.dimension:
            message = f"dimensions: the model has {encoder.dimension}, not {request.dimensions}"
            raise ApiError(400, message, param="dimensions")
        return request, request.token_ids(vocabulary=len(encoder.tokenizer), window=encoder.max_seq_length)

    request, ids = await service.run_json(len(body), read)
    prompt = _prompt(encoder, request)
    if ids and prompt:
        message = "a prompt cannot go in front of token ids; send text, or put the prompt's tokens there"
        raise ApiError(400, message, param="prompt_name" if request.prompt_name is not None else "input_type")
    truncated = 0
    if not ids:
        texts = [prompt + text for text in request.texts()]
        ids, truncated = await service.tokenize(texts, truncate=request.truncate is not False)
    vectors = schema.truncate_dimensions(await service.embed_ids(ids), request.dimensions)

    def write() -> bytes:
        encoding_format = request.encoding_format or "float"
        return schema.write(vectors, encoding_format=encoding_format, model=name, tokens=sum(map(len, ids)))

    answer = await service.run_json(vectors.size, write)
    return Response(answer, media_type="application/json", headers={"x-truncated-texts": str(truncated)})


def _prompt(encoder: TextEncoder, request: schema.EmbeddingRequest) -> str:
    """The prompt that a request asks for, by name or by the role of its texts; else the model's default prompt."""
    if request.input_type is not None and request.prompt_name is not None:
        raise ApiError(400, "give input_type or prompt_name, not both", param="prompt_name")
    field = "prompt_name" if request.input_type is None else "input_type"
    model: Any = encoder.model
    name = request.prompt_name if request.input_type is None else request.input_type
    try:
        if name is not None and name not in model.prompts and field == "input_type":
            name = schema.INPUT_TYPES.get(name, name)
        return prompt_for(model, None, prompt_name=name)
    except LusiferError as error:
        raise ApiError(400, f"{field}: {error}", param=field) from error
