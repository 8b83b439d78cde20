"""The command ``lusifer adapt``."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from lusifer.cli.console import Device, Json, Quiet, emit, say, say_next
from lusifer.quiet import quiet_libraries


def adapt(
    teacher: Annotated[
        str,
        typer.Argument(
            help="The English embedder (folder, hub id or starter name of a Sentence Transformers model); or an index "
            "or table of texts and their vectors, if the embedder is unavailable.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Argument(help="Folder for model/ and report.json.", show_default=False)],
    encoder: Annotated[
        str, typer.Option(help="The multilingual encoder: folder, hub id or starter name.")
    ] = "starter:multilingual-e5-small",
    texts: Annotated[
        list[str] | None, typer.Option(help="Your own English text: file, folder or glob; repeatable.")
    ] = None,
    general: Annotated[bool, typer.Option("--general/--no-general", help="Also use the bundled English text.")] = True,
    minutes: Annotated[
        float | None, typer.Option(min=0.1, help="Time budget; from 15 (2 on a GPU) the encoder is trained too.")
    ] = 10.0,
    max_texts: Annotated[int, typer.Option(min=1, help="Maximum number of texts to train on.")] = 200_000,
    encoder_steps: Annotated[
        int | None, typer.Option(min=0, help="Training steps of the encoder; default: as many as time allows.")
    ] = None,
    plain: Annotated[
        bool,
        typer.Option("--plain", help="One linear map of the last layer: needs only Sentence Transformers to load."),
    ] = False,
    precision: Annotated[
        str, typer.Option(help="float32 or bfloat16; auto picks bfloat16 if faster, once per run.")
    ] = "auto",
    text_column: Annotated[str | None, typer.Option(help="Text column of files and tables.")] = None,
    vector_column: Annotated[str | None, typer.Option(help="Vector column of tables.")] = None,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    restart: Annotated[bool, typer.Option("--restart", help="Discard unfinished work in OUTPUT.")] = False,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Adds languages to an English embedder and keeps its index: no labels, translations or new vectors.

    A multilingual encoder learns from English text alone to produce the embedder's own vectors. Queries in other
    languages then search the embedder's existing index. After an interruption, run the command again to resume.

    Examples:
    - `lusifer adapt starter:all-minilm-l6-v2 runs/adapted`
    - `lusifer adapt sentence-transformers/all-MiniLM-L6-v2 runs/adapted --texts docs/ --minutes 60`
    - `lusifer adapt my-index runs/adapted`
    - `lusifer search my-index "Wo ist der Bahnhof?" --model runs/adapted/model`
    """
    quiet_libraries(quiet)
    from lusifer.adapt import Options
    from lusifer.adapt import adapt as run
    from lusifer.adapt.report import summary

    options = Options(
        encoder=encoder,
        texts=tuple(texts or ()),
        general=general,
        text_column=text_column,
        vector_column=vector_column,
        minutes=minutes,
        most_texts=max_texts,
        encoder_steps=encoder_steps,
        plain=plain,
        precision=precision,
        device=device,
        seed=seed,
        restart=restart,
    )
    report = run(teacher, output, options, progress=not quiet)
    if as_json:
        emit(report)
        return
    for line in summary(report):
        say(line)
    model = output / "model"
    say(f"model: {model}")
    if not quiet:
        index = quote(teacher) if Path(teacher).is_dir() and not (Path(teacher) / "modules.json").is_file() else "INDEX"
        say_next([f'lusifer search {index} "..." --model {quote(str(model))}', f"lusifer evaluate {quote(str(model))}"])
