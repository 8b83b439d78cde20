"""The command ``lusifer encode``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lusifer.cli.console import AnyModel, Json, Quiet, comma_separated, emit, say
from lusifer.quiet import quiet_libraries
from lusifer.terminal import without_secrets


def encode(
    model: AnyModel,
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="A file, a folder or a glob of .txt (a text a line), .jsonl, .json, .csv, .tsv (also .gz, .bz2, .zst) "
            "or .parquet; on this machine, s3://, gs:// or hf://.",
            show_default=False,
        ),
    ],
    output: Annotated[
        str,
        typer.Argument(
            help="A folder for Parquet shards, or one file: .parquet (id, text, other columns, embedding) or .npy."
        ),
    ],
    column: Annotated[str, typer.Option(help="Text column; not needed for .txt.")] = "text",
    id_column: Annotated[str | None, typer.Option(help="Id column; default: row numbers from 0.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Prompt for every text; default: the model's document prompt.")
    ] = None,
    prompt_name: Annotated[str | None, typer.Option(help="Name of one of the model's prompts, e.g. query.")] = None,
    instruction: Annotated[str | None, typer.Option(help="Task instruction, used as prompt for every text.")] = None,
    text: Annotated[bool, typer.Option("--text/--no-text", help="Store the texts beside their embeddings.")] = True,
    metadata: Annotated[
        str | None,
        typer.Option(help="Comma-separated columns to keep beside the text; default: all; '' for none."),
    ] = None,
    dim: Annotated[int | None, typer.Option(min=1, help="Keep only this many leading dimensions (Matryoshka).")] = None,
    output_dtype: Annotated[
        str, typer.Option(help="Type of the embeddings: float32, float16, int8, or ubinary (one bit per dimension).")
    ] = "float32",
    precision: Annotated[
        str, typer.Option(help="Type of the computation: float32, bfloat16, float16; auto picks the fastest.")
    ] = "auto",
    shard_rows: Annotated[int, typer.Option(min=1, help="Rows per shard, which is one Parquet file.")] = 50_000,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Padded tokens per forward pass; default: by device.")
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Skip empty and broken rows, and count them.")] = False,
    engine: Annotated[str, typer.Option(help="local, or ray for a Ray cluster.")] = "local",
    processes: Annotated[int, typer.Option(min=1, help="Number of processes, each with its own model.")] = 1,
    device: Annotated[
        str | None,
        typer.Option(help="Torch device; default: the best available. cuda:0,cuda:1 starts one process each."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads per process; default: all, divided among them.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Embeds the texts of files, in any language and any number, with any Sentence Transformers model. They are
    documents unless `--prompt-name query` or another prompt says otherwise.

    A folder receives shards one by one, with all columns of the input; `lusifer index add` reads it directly. Interrupt
    it whenever you like: the same command resumes where it stopped, and the files end up the same, byte for byte. On a
    finished folder it does nothing.

    Examples:
    - `lusifer encode runs/quickstart/model sentences.txt vectors.npy`
    - `lusifer encode runs/quickstart/model docs.jsonl docs.parquet --column body`
    - `lusifer encode starter 's3://corpus/*.jsonl.gz' s3://vectors/corpus --id-column id --output-dtype int8`
    - `lusifer encode starter corpus/ vectors/ --device cuda:0,cuda:1 --no-text`
    """
    quiet_libraries(quiet)
    from lusifer.bulk.job import Settings
    from lusifer.bulk.run import encode as run

    settings = Settings(
        column=column, id_column=id_column, instruction=instruction, prompt=prompt, prompt_name=prompt_name, text=text,
        dim=dim, output_dtype=output_dtype, precision=precision, shard_rows=shard_rows, batch_tokens=batch_tokens,
        skip_bad=skip_bad,
        metadata=None if metadata is None else comma_separated(metadata),
    )  # fmt: skip
    hardware: dict[str, Any] = {"engine": engine, "processes": processes, "device": device, "threads": threads}
    facts = run(model, source, output, settings, **hardware, progress=not quiet)
    if facts["cut"]:
        say(
            f"warning: {facts['cut']:,} of {facts['texts']:,} texts were longer than the model's window and truncated",
            err=True,
        )
    if facts["skipped"]:
        say(f"warning: {facts['skipped']} bad rows were left out", err=True)
    facts = without_secrets(facts)
    emit(facts) if as_json else say(f"{facts['texts']} texts, {facts['dimension']} dimensions -> {facts['output']}")
