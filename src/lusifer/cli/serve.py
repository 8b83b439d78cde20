"""The command ``lusifer serve``."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lusifer.cli.console import AnyModel, Quiet, say
from lusifer.errors import LusiferError
from lusifer.quiet import quiet_libraries

if TYPE_CHECKING:
    import numpy as np

    from lusifer.data.prompts import Prompted
    from lusifer.model.text_encoder import TextEncoder
    from lusifer.search.store import Store
    from lusifer.serving.service import EmbeddingService


def serve(
    model: AnyModel,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for any free port.")] = 8000,
    name: Annotated[str | None, typer.Option(help="Model name in requests; default: MODEL.")] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="LUSIFER_API_KEY", help="Key that clients must send; repeatable, or several separated by spaces."
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Also accept this host name; repeatable; * for any. IP addresses are always accepted."
        ),
    ] = None,
    precision: Annotated[str, typer.Option(help="auto (measures the fastest), float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Torch device; default: the best available.")] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum tokens per batch; default: by device.")
    ] = None,
    queue_tokens: Annotated[
        int | None, typer.Option(min=1, help="Queued tokens above which requests get 429; default: eight batches.")
    ] = None,
    max_wait: Annotated[
        float, typer.Option(min=0.1, help="Seconds of queued work above which requests get 429.")
    ] = 5.0,
    max_body: Annotated[int, typer.Option(min=1024, help="Maximum bytes of a request.")] = 8 << 20,
    timeout: Annotated[float, typer.Option(min=0.1, help="Timeout of a request, in seconds.")] = 60.0,
    watchdog: Annotated[
        float | None,
        typer.Option(min=1, help="End the process if the model hangs or fails for this many seconds."),
    ] = None,
    ui: Annotated[str | None, typer.Option(metavar="INDEX", help="Also serve a search page over this index.")] = None,
    quiet: Quiet = False,
) -> None:
    """Serves any Sentence Transformers model over an OpenAI-compatible HTTP API.

    On Ctrl-C or SIGTERM, new requests get 503 and running ones finish.

    Examples:
    - `lusifer serve starter`
    - `lusifer serve runs/quickstart/model --name ours --port 9000`
    - `lusifer serve sentence-transformers/all-MiniLM-L6-v2`
    - `LUSIFER_API_KEY=secret lusifer serve starter --host 0.0.0.0`
    - `lusifer serve starter --ui news`
    """
    missing = [module for module in ("fastapi", "uvicorn", "prometheus_client") if find_spec(module) is None]
    if missing:
        raise LusiferError(f"serving needs {', '.join(missing)}: pip install 'lusifer[serving]'")
    from lusifer.serving.memory import keep_few_plans

    keep_few_plans()
    quiet_libraries(quiet)
    from lusifer.serving.server import listen

    keys = [key for given in api_key or [] for key in given.split()]
    if api_key and not keys:
        raise LusiferError("the API key is empty; give one, or omit --api-key and LUSIFER_API_KEY")
    _check_model(model)
    store = None
    if ui is not None:
        from lusifer.search.locations import open_any

        store = open_any(ui)
    listening = listen(host, port)
    where = _address(host, listening.getsockname()[1])
    if not keys and not _is_local(host):
        say(f"warning: {host} is reachable from the network without an API key", err=True)
    served = name or model
    if not quiet:
        say(_welcome(where, served, bool(keys)) + (_page_line(where, bool(keys)) if store else ""), err=True)
    from lusifer.serving.app import create_app
    from lusifer.serving.limits import Limits, Phase
    from lusifer.serving.server import run

    phase = Phase()
    app = create_app(
        _loader(model, precision, device, quiet, store),
        served,
        limits=Limits(max_body=max_body, timeout=timeout),
        phase=phase,
        batch_tokens=batch_tokens,
        queue_tokens=queue_tokens,
        max_wait=max_wait,
        api_keys=keys,
        allowed_hosts=[host, *(allowed_host or [])],
    )
    if store is not None:
        from lusifer.search.page import make_router

        app.include_router(make_router(store, Queries(store.info.dimension, app.state.service)))
    run(app, listening, phase, drain_timeout=timeout, watchdog=watchdog)
    if not quiet:
        say("stopped", err=True)


@dataclass
class Queries:
    """The served model as a search page uses it: its queries wait for their turn like everybody's."""

    dimension: int
    service: EmbeddingService

    @property
    def model(self) -> Prompted:
        """The loaded model."""
        return self.service.encoder.model

    async def embed(self, texts: Sequence[str]) -> np.ndarray:
        """(n, dim) float32 unit vectors of texts."""
        return await self.service.embed(texts)


def _loader(
    model: str, precision: str, device: str | None, quiet: bool, store: Store | None
) -> Callable[[], TextEncoder]:
    from lusifer.loading import load_checkpoint
    from lusifer.model.text_encoder import PRECISIONS, TextEncoder, set_precision

    if precision not in PRECISIONS:
        raise LusiferError(f"no precision {precision!r}; there are {', '.join(PRECISIONS)}")

    def load() -> TextEncoder:
        loaded = load_checkpoint(model, **({"device": device} if device else {}))
        chosen = set_precision(loaded, precision)
        encoder = TextEncoder(loaded)
        if store is not None:
            from lusifer.search.agreement import admit

            if (measured := admit(store, encoder, model)) and not quiet:
                say(measured, err=True)
        if not quiet:
            say(f"ready: {encoder.dimension} dimensions, {chosen}, {loaded.device}", err=True)
        return encoder

    return load


def _check_model(model: str) -> None:
    """Finds a missing folder before the server is up."""
    folder = Path(model)
    if model.startswith((".", "/", "~")) and not (folder / "modules.json").is_file():
        raise LusiferError(f"no checkpoint at {model!r}: it has no modules.json (train one, or check the path)")


def _address(host: str, port: int) -> str:
    shown = "127.0.0.1" if host in ("0.0.0.0", "") else "::1" if host == "::" else host
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _page_line(where: str, with_key: bool) -> str:
    return f"\nsearch page: {where}/" + ("  (any user name, the key as password)" if with_key else "")


def _welcome(where: str, served: str, with_key: bool) -> str:
    body = json.dumps({"model": served, "input": ["Guten Morgen", "good morning"]}, ensure_ascii=False)
    quoted = body.replace("'", "'\\''")
    key = " -H 'Authorization: Bearer KEY'" if with_key else ""
    return f"{where}/v1  (metrics: {where}/metrics)\ncurl {where}/v1/embeddings{key} -d '{quoted}'"
