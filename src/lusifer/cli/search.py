"""Commands that search texts by meaning: ``lusifer index`` and ``lusifer search``."""

from __future__ import annotations

from dataclasses import asdict
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

import typer

from lusifer.cli.console import Device, Json, Quiet, comma_separated, emit, say
from lusifer.errors import LusiferError
from lusifer.quiet import quiet_libraries
from lusifer.terminal import visible, without_secrets

if TYPE_CHECKING:
    from lusifer.model.text_encoder import TextEncoder
    from lusifer.search.store import Store

index_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", help="Build and maintain an index of texts for semantic search."
)
Index = Annotated[
    str, typer.Argument(metavar="INDEX", help="A folder, or qdrant+http://HOST:6333/COLLECTION.", show_default=False)
]
Where = Annotated[
    str | None, typer.Option(help="Filter: \"lang = 'te' AND year >= 2000\"; also OR, NOT, IN (...), brackets.")
]
Found = Annotated[
    str,
    typer.Argument(
        metavar="INDEX",
        help="A folder, or qdrant+http://HOST:6333/COLLECTION; or one written by another tool: a folder of LanceDB, "
        "Qdrant or Chroma (FOLDER#NAME for one of several), Parquet, or vectors.npy+texts.jsonl.",
        show_default=False,
    ),
]
TextColumn = Annotated[
    str | None, typer.Option(help="Text column of an index written by another tool; detected by default.")
]
VectorColumn = Annotated[str | None, typer.Option(help="Vector column of such an index; detected by default.")]
PromptName = Annotated[str | None, typer.Option(help="Name of the model's prompt to use.")]


@index_app.command("add")
def add(
    index: Index,
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="A file, a folder or a glob of .txt (a text a line), .jsonl, .json, .csv, .tsv, .parquet; or with its "
            "vectors: what `lusifer encode` wrote, or vectors.npy+texts.jsonl.",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Any Sentence Transformers model: folder, hub id or `starter`. When left out, that of the index or of "
            "the vectors."
        ),
    ] = None,
    column: Annotated[str, typer.Option(help="Column of the text.")] = "text",
    id_column: Annotated[
        str | None,
        typer.Option(help="Id column; default: that given to `encode`, otherwise a hash of the text."),
    ] = None,
    metadata: Annotated[
        str | None,
        typer.Option(help="Comma-separated columns to keep and filter by; default: all that `encode` kept."),
    ] = None,
    vector_column: Annotated[
        str | None, typer.Option(help="Vector column of Parquet files written by other tools.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Prompt for every text; default: the model's document prompt.")
    ] = None,
    prompt_name: PromptName = None,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Adds the texts of a file, or updates those with the same id. Run the same command again to resume.

    Unchanged texts are not embedded again. A column `lang` gives the language; without one the script
    is used instead, as in `Latin script`. The first call creates the index (with `starter` if no model is given).

    Vectors from `lusifer encode` are used as they are, without a model, if they come from the index's model. Vectors
    from other tools are compared with those of `--model` on a sample.

    Examples:
    - `lusifer index add news news.jsonl --model starter --id-column url --metadata title,year`
    - `lusifer encode starter news.jsonl vectors/ --id-column url` and then `lusifer index add news vectors/`
    - `lusifer index add notes notes.txt`
    - `lusifer index add notes vectors.npy+notes.txt --model sentence-transformers/all-MiniLM-L6-v2`
    - `lusifer index add qdrant+http://localhost:6333/news news.parquet`
    """
    quiet_libraries(quiet)
    from lusifer.search.ready import Asked, add_vectors, has_vectors
    from lusifer.search.store import COLUMN_NAMES

    names = None if metadata is None else comma_separated(metadata)
    if not has_vectors(source, vector_column):
        store, counts, cut = _embed(
            index, source, column, id_column, names or [], model, prompt, prompt_name, device, quiet
        )
    else:
        text = None if column == "text" else column
        asked = Asked(text, id_column, names, vector_column, model, prompt, prompt_name, device)
        done = add_vectors(index, source, asked, progress=not quiet)
        store, counts, cut = done.store, done.counts, 0
        if done.left_out:
            say(f"warning: {done.left_out} rows without text or vector were left out", err=True)
        if done.columns:
            left = ", ".join(map(repr, done.columns))
            say(f"warning: {left} cannot be kept and is left out: {COLUMN_NAMES}", err=True)
    if cut:
        say(f"warning: {cut:,} texts were longer than the model's window and truncated", err=True)
    total = store.count()
    if as_json:
        emit({"index": without_secrets(index), "texts": total, **counts, "cut": cut})
    else:
        changes = ", ".join(f"{count:,} {kind}" for kind, count in counts.items())
        say(f"{changes} -> {without_secrets(index)}: {total:,} texts")


def _embed(
    index: str, source: str, column: str, id_column: str | None, names: list[str], model: str | None,
    prompt: str | None, prompt_name: str | None, device: str | None, quiet: bool,
) -> tuple[Store, dict[str, int], int]:  # fmt: skip
    """Embeds the texts of a file into an index; gives it, what changed, and how many texts were truncated."""
    from lusifer.data.prompts import prompt_for
    from lusifer.model.fingerprint import weights_hash
    from lusifer.search.indexing import add as run
    from lusifer.search.indexing import check_columns, read_entries
    from lusifer.search.locations import create_store, open_store, store_exists, writing
    from lusifer.search.store import IndexInfo

    folder = None if "://" in index else index
    entries, types = read_entries(source, text=column, id=id_column, metadata=names, index=folder)
    with writing(index):
        store = open_store(index) if store_exists(index) else None
        if store is not None:
            check_columns(store, types)
        name = model or (store.info.model if store else "starter")
        encoder = _load(name, device)
        before = prompt_for(encoder.model, "document", prompt=prompt, prompt_name=prompt_name)
        made_by = (name, weights_hash(encoder.model), encoder.dimension)
        if store is None:
            store = create_store(index, IndexInfo(*made_by, types, before))
        else:
            store.check_model(*made_by)
            store.check_prompt(before, explicit=prompt is not None or prompt_name is not None)
        counts = run(store, encoder, entries, progress=not quiet)
    return store, counts, encoder.cut


@index_app.command("delete")
def delete(
    index: Index,
    ids: Annotated[list[str] | None, typer.Option(metavar="ID", help="Id of a text; repeatable.")] = None,
    where: Where = None,
    as_json: Json = False,
) -> None:
    """Deletes texts by id or by filter.

    Examples:
    - `lusifer index delete news --ids a17 --ids b4`
    - `lusifer index delete news --where "lang = 'te'"`
    """
    from lusifer.search.locations import open_store

    if bool(ids) == (where is not None):
        raise LusiferError("choose what to delete: either --ids or --where")
    store = open_store(index)
    with store.writing():
        deleted = store.delete(ids=ids or None, where=where)
        store.tidy()
    facts = {"index": without_secrets(index), "deleted": deleted, "texts": store.count()}
    emit(facts) if as_json else say(f"{deleted:,} deleted, {facts['texts']:,} texts left")


@index_app.command("repair")
def repair(
    index: Annotated[str, typer.Argument(metavar="INDEX", help="A folder.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Restores the last readable version of a damaged index, as after a power cut.

    To restore texts added since, run the same `lusifer index add`: it embeds only those that are missing. No other
    command may be writing to the index.

    Example: `lusifer index repair news`
    """
    from lusifer.search.locations import repair_store

    store, back = repair_store(index)
    facts = {"index": index, "versions_back": back, "texts": store.count()}
    done = f"went back {back} versions" if back else "the newest version is readable; nothing changed"
    emit(facts) if as_json else typer.echo(f"{done}: {facts['texts']:,} texts")


@index_app.command("info")
def info(index: Index, as_json: Json = False) -> None:
    """Shows an index's contents: texts by language, model, columns.

    Example: `lusifer index info news`
    """
    from lusifer.search.locations import open_store

    store = open_store(index)
    about, total, approximate, languages = store.info, store.count(), store.approximate(), store.languages()
    if as_json:
        emit({"texts": total, **asdict(about), "approximate": approximate, "languages": languages})
        return
    columns = ["id", "text", "lang", *(f"{name} ({kind})" for name, kind in about.columns.items())]
    say(f"texts: {total:,}")
    say(f"model: {about.model} (hash {about.model_hash}), {about.dimension} dimensions")
    if about.prompt:
        say(f"document prompt: {about.prompt!r}")
    say(f"columns: {', '.join(columns)}")
    say(f"search: {'approximate, exact with --exact' if approximate else 'exact'}")
    say("languages: " + ", ".join(f"{tag} {count:,}" for tag, count in languages.items()))


@index_app.command("build")
def build(index: Index, quiet: Quiet = False) -> None:
    """Builds or rebuilds the index for approximate search; `add` does it automatically from 50,000 texts.

    Example: `lusifer index build news`
    """
    from lusifer.search.locations import open_store

    store = open_store(index)
    with store.writing():
        store.build()
    if not quiet:
        say(f"approximate index over {store.count():,} texts -> {without_secrets(index)}")


@index_app.command("verify")
def verify(
    index: Found,
    model: Annotated[
        str, typer.Option(help="Any Sentence Transformers model: folder, hub id or `starter`.", show_default=False)
    ],
    sample: Annotated[int, typer.Option(min=1, max=100_000, help="Maximum number of texts to compare.")] = 256,
    text_column: TextColumn = None,
    vector_column: VectorColumn = None,
    prompt: Annotated[
        str | None, typer.Option(help="Prompt for every text; default: the model's document prompt.")
    ] = None,
    prompt_name: PromptName = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Checks whether a model may query an index of another model's vectors. Exit code 0: yes; 1: no.

    Texts of the index are embedded with the model. The check passes if nine in ten find their own stored vector.

    Examples:
    - `lusifer index verify news --model adapted`
    - `lusifer index verify chroma-folder --model sentence-transformers/all-MiniLM-L6-v2 --json`
    """
    quiet_libraries(True)
    from lusifer.data.prompts import prompt_for
    from lusifer.search.agreement import measure
    from lusifer.search.locations import open_any

    store = open_any(index, text=text_column, vector=vector_column)
    encoder = _load(model, device)
    asked = prompt is not None or prompt_name is not None
    before = prompt_for(encoder.model, "document", prompt=prompt, prompt_name=prompt_name) if asked else None
    agreement = measure(store, encoder, sample=sample, prompt=before)
    sentence = agreement.sentence(model, without_secrets(index))
    if as_json:
        emit({"index": without_secrets(index), "model": model, **agreement.to_dict(), "sentence": sentence})
    else:
        say(f"cosine: mean {agreement.mean_cosine:.3f}, 5th percentile {agreement.low_cosine:.3f}")
        ranks = f"rank: mean {agreement.mean_rank:.1f}, median {agreement.median_rank:.0f}"
        say(f"own vector nearest: {agreement.found:.1%} of {agreement.texts} texts; {ranks}")
        say(sentence)
    if not agreement.may_query:
        raise typer.Exit(1)


def search(
    index: Found,
    query: Annotated[str | None, typer.Argument(help="The query, in any language.", show_default=False)] = None,
    k: Annotated[int, typer.Option("--k", "-k", min=1, max=1000, help="Number of results.")] = 10,
    where: Where = None,
    exact: Annotated[bool, typer.Option("--exact", help="Exact search: compare with every vector.")] = False,
    hybrid: Annotated[
        bool, typer.Option("--hybrid", help="Combine with BM25, which also finds rare words and names.")
    ] = False,
    prompt: Annotated[str | None, typer.Option(help="Prompt for the query; default: the model's query prompt.")] = None,
    prompt_name: PromptName = None,
    instruction: Annotated[str | None, typer.Option(help="Task instruction, used as prompt for the query.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Any Sentence Transformers model; default: that of the index.")
    ] = None,
    text_column: TextColumn = None,
    vector_column: VectorColumn = None,
    device: Device = None,
    ui: Annotated[bool, typer.Option("--ui", help="Serve a search page on this machine instead.")] = False,
    port: Annotated[int, typer.Option(help="Port of the page.")] = 8000,
    as_json: Json = False,
) -> None:
    """Finds texts by meaning, across languages.

    Examples:
    - `lusifer search news "Where is the station?"`
    - `lusifer search news "駅はどこですか" --where "lang IN ('en', 'fr')" --k 5`
    - `lusifer search news "Zeppelin NT 07" --hybrid`
    - `lusifer search news --ui`
    - `lusifer search chroma-folder "où est la gare ?" --model adapted`
    """
    if ui == (query is not None):
        raise LusiferError('give either a query or --ui: lusifer search INDEX "query"')
    if ui:
        from lusifer.serving.memory import keep_few_plans

        keep_few_plans()
    quiet_libraries(True)
    from lusifer.data.prompts import explicit_prompt, prompt_for
    from lusifer.search.agreement import admit
    from lusifer.search.locations import open_any
    from lusifer.search.page import find

    asked = explicit_prompt(prompt, instruction)
    store = open_any(index, text=text_column, vector=vector_column)
    condition = store.parsed(where)
    if hybrid and not store.has_words:
        raise LusiferError(f"{index!r} was not made by lusifer and has no index of words; leave --hybrid out")
    if not (name := model or store.info.model):
        raise LusiferError(
            f"{index!r} does not record the model of its vectors; give --model, see `lusifer index verify`"
        )
    encoder = _load(name, device)
    if measured := admit(store, encoder, name):
        say(measured, err=True)
    before = prompt_for(encoder.model, "query", prompt=asked, prompt_name=prompt_name)
    if ui:
        _serve(store, encoder, before, port)
        return
    assert query is not None
    hits = find(store, encoder, query, k=k, where=condition, exact=exact, hybrid=hybrid, prompt=before)
    if as_json:
        emit({"query": query, "hits": [hit.to_dict() for hit in hits]})
        return
    for hit in hits:
        ranks = "".join(f"  {name} {rank}" for name, rank in hit.ranks.items())
        line = f"{hit.entry.lang}  {hit.entry.text}  [{hit.entry.id}{ranks}]"
        say(f"{hit.score:.3f}  {visible(line, lines=False)}")
    if not hits:
        say("nothing found", err=True)


def _load(name: str, device: str | None) -> TextEncoder:
    from lusifer.loading import load_for_inference
    from lusifer.model.text_encoder import TextEncoder

    return TextEncoder(load_for_inference(name, device=device))


def _serve(store: Store, encoder: TextEncoder, prompt: str, port: int) -> None:
    missing = [module for module in ("fastapi", "uvicorn", "prometheus_client") if find_spec(module) is None]
    if missing:
        raise LusiferError(f"the search page needs {', '.join(missing)}: pip install 'lusifer[search]'")
    from lusifer.cli.serve import Queries
    from lusifer.search.page import make_router
    from lusifer.serving.app import create_app
    from lusifer.serving.limits import Phase
    from lusifer.serving.server import listen, run

    phase, listening = Phase(), listen("127.0.0.1", port)  # Only this machine: the page has no accounts.
    app = create_app(encoder, store.info.model or "model", phase=phase)
    app.include_router(make_router(store, Queries(encoder.dimension, app.state.service), prompt=prompt))
    say(f"http://127.0.0.1:{listening.getsockname()[1]}  (Ctrl-C ends it)", err=True)
    run(app, listening, phase, drain_timeout=5)
