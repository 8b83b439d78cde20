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
            "or table of texts and their vectors, if the embedder is not at hand.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Argument(help="Where model/ and report.json are written.", show_default=False)],
    encoder: Annotated[
        str, typer.Option(help="The multilingual encoder: folder, hub id or starter name.")
    ] = "starter:multilingual-e5-small",
    texts: Annotated[
        list[str] | None, typer.Option(help="English text of your own: file, folder or glob; may be repeated.")
    ] = None,
    general: Annotated[
        bool, typer.Option("--general/--no-general", help="The bundled English text beside your own.")
    ] = True,
    minutes: Annotated[
        float | None, typer.Option(min=0.1, help="Time for everything; from 15 on, 2 on a GPU, the encoder learns too.")
    ] = 10.0,
    max_texts: Annotated[int, typer.Option(min=1, help="Most texts to learn from.")] = 200_000,
    encoder_steps: Annotated[
        int | None, typer.Option(min=0, help="Steps of the encoder; as many as the time allows when left out.")
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="One linear map of the last layer: loads in any Sentence Transformers.")
    ] = False,
    precision: Annotated[
        str, typer.Option(help="float32 or bfloat16; auto takes bfloat16 where it is faster, once a run.")
    ] = "auto",
    text_column: Annotated[str | None, typer.Option(help="Column of the text, in files and tables.")] = None,
    vector_column: Annotated[str | None, typer.Option(help="Column of the vectors, in tables.")] = None,
    seed: Annotated[int, typer.Option(help="Of order and chance.")] = 0,
    restart: Annotated[bool, typer.Option("--restart", help="Throw unfinished work in OUTPUT away.")] = False,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Adds languages to an English embedder and keeps its index: no labels, no translations, no new vectors.

    A multilingual encoder learns, from English text alone, to give the embedder's own vectors. Queries in other
    languages then find what the embedder put into its index. Call it again after an interruption and it goes on.

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
