"""Commands that score models: ``lusifer evaluate``, ``benchmark``, ``report`` and ``diagnose``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lusifer.cli.console import Json, Quiet, emit, print_table, say
from lusifer.errors import LusiferError
from lusifer.evaluation import benchmarks as suite
from lusifer.quiet import quiet_libraries

benchmark_app = typer.Typer(no_args_is_help=True, help="Show the tasks of the benchmarks.")


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="Any Sentence Transformers folder or hub id, `starter`, `mteb:NAME`, or a backbone alone: "
            "`encoder:NAME`, `llm:NAME` (attention in both directions), `llm-causal:NAME`.",
            show_default=False,
        ),
    ],
    benchmark: Annotated[
        str | None, typer.Option(help=f"{', '.join(suite.BENCHMARKS)}; see `lusifer benchmark show`.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with tasks.json, read without network; by itself, all its tasks.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="Own data: a YAML file (examples/tasks has one of every type) or a folder of them, several times; "
            "`everyday` is the bundled set."
        ),
    ] = None,
    langs: Annotated[str | None, typer.Option(help="Comma-separated codes.")] = None,
    types: Annotated[str | None, typer.Option(help="Comma-separated types: STS,Retrieval,...")] = None,
    tasks: Annotated[str | None, typer.Option(help="Comma-separated task names.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for results; default: runs/eval/MODEL.")] = None,
    prompts: Annotated[
        str, typer.Option(help="`none`: the model's own; `default`: the bundled instructions; or your own YAML file.")
    ] = "none",
    prompt: Annotated[
        str | None, typer.Option(help="Prompt for every text, queries and documents, instead of --prompts.")
    ] = None,
    prompt_name: Annotated[str | None, typer.Option(help="Name of one of the model's prompts, for every text.")] = None,
    device: Annotated[
        str | None,
        typer.Option(help="Torch device; default: the best available. Several share the tasks: cuda:0,cuda:1."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per forward pass.")] = 32,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Scores a model. After an interruption, run the command again to resume.

    Without `--benchmark`, `--data` and `--task`: the bundled everyday set (64 sentences, 23 languages), a matter of
    seconds. Otherwise mteb tasks, one result file each in `--out`, with what made it. A task that fails is recorded,
    the others go on, the exit code is 1, and the same command tries it again. Several commands may share one `--out`.

    Own data: name files and columns in a small YAML file, e.g. `type: classification`, `languages: {en: en.csv, de:
    de.csv}`, `columns: {text: message, label: topic}`. Types: classification, pair-classification, sts, retrieval,
    reranking, clustering, bitext. Everything is checked before the model loads; a task whose content changes is scored
    again.

    Examples:
    - `lusifer evaluate runs/quickstart/model --langs fr,ru,te`
    - `lusifer evaluate starter --task examples/tasks --task everyday`
    - `lusifer evaluate starter --data eval-data`
    - `lusifer evaluate encoder:starter:multilingual-e5-small --data eval-data --types STS`
    - `lusifer evaluate intfloat/multilingual-e5-small --benchmark LUSIFER --out runs/eval/e5`
    """
    quiet_libraries(quiet)
    codes = _listed(langs)
    if benchmark is None and data is None and not task:
        values = {"--types": types, "--tasks": tasks, "--out": out, "--device": device}
        given = [name for name, value in values.items() if value is not None] + ["--prompts"] * (prompts != "none")
        if given:
            raise LusiferError(
                f"{given[0]} needs --benchmark, --data or --task; without them the everyday set is scored"
            )
        _everyday(model, codes, prompt, prompt_name, as_json=as_json, quiet=quiet)
        return
    try:
        from lusifer.evaluation.mteb_model import load_prompts
        from lusifer.evaluation.own import open_tasks
        from lusifer.evaluation.run import run
        from lusifer.evaluation.tasks import choose
    except ModuleNotFoundError as error:
        raise LusiferError(f"needs {error.name}: pip install 'lusifer[evaluation]'") from error

    own, names = open_tasks(task or []), _listed(tasks)
    file = None if prompts == "default" else Path(prompts)
    instructions = {} if prompts == "none" else load_prompts(file, [one.name for one in own])
    chosen, lost = choose(benchmark, data, languages=codes, types=_listed(types), names=names, own=own)
    where = out or Path("runs/eval") / model.strip("./").replace("/", "-").replace(":", "-")
    records = run(
        model, chosen, where, data=data, prompts=instructions, prompt=prompt, prompt_name=prompt_name, absent=lost,
        device=device, batch_size=batch_size, progress=not quiet,
    )  # fmt: skip
    complete = _print_records(records, chosen, lost, benchmark, where, as_json=as_json)
    if not complete or (names and lost):
        raise SystemExit(1)


def _print_records(
    records: dict[str, dict[str, Any]], chosen: list[suite.Task], lost: list[suite.Task], benchmark: str | None,
    out: Path, *, as_json: bool,
) -> bool:  # fmt: skip
    """Prints scores and means, and what failed or is not there; whether all of ``chosen`` is scored."""
    from lusifer.evaluation.results import main_scores

    scores, asked, missing = main_scores(records), suite.joined([*chosen, *lost]), [task.name for task in lost]
    failed = {name: record["error"] for name, record in records.items() if record["status"] == "failed"}
    unscored = [t.name for t in chosen if t.name not in failed and not set(t.subsets) <= set(scores.get(t.name, {}))]
    means = suite.language_means(scores, asked) if benchmark not in (suite.CROSS_LINGUAL, suite.BITEXT) else {}
    pairs = suite.pair_means(scores, asked)
    if as_json:
        facts = {"out": str(out), "scores": scores, "failed": failed, "absent": unscored, "not in data": missing}
        facts["means"] = {key: mean.score for key, mean in means.items()}
        emit({**facts, "pair means": {key: mean.score for key, mean in pairs.items()}})
    else:
        _print_tables(scores, asked, means, out)
        for name, mean in pairs.items():
            score = "" if mean.score is None else f"{100 * mean.score:.2f} %, "
            say(f"{name}: {score}{mean.scored} of {mean.of} pairs")
        if missing:
            shown = ", ".join(missing[:8]) + " ..." * (len(missing) > 8)
            say(f"not in --data, or not all of it: {shown}", err=True)
        for name in unscored:
            say(f"{name}: not scored yet; another process is at it", err=True)
    for name, reason in failed.items():
        say(f"failed: {name}: {reason}", err=True)
    return not failed and not unscored


def _listed(text: str | None) -> list[str] | None:
    return [part.strip() for part in text.split(",") if part.strip()] if text else None


def _print_tables(scores: suite.Scores, chosen: list[suite.Task], means: dict[str, suite.Mean], where: Path) -> None:
    rows = []
    for task in chosen:
        row = scores.get(task.name, {})
        shown = sorted((">".join(codes), row[subset]) for subset, codes in task.subsets.items() if subset in row)
        cells = "  ".join(f"{code} {100 * value:.1f}" for code, value in shown[:40]) or "-"
        rows.append((task.name, task.type, cells + (f"  and {len(shown) - 40} more" if len(shown) > 40 else "")))
    print_table(("task", "type", "main scores, %"), rows)
    if means:
        rows = [(code, _percent(mean.score, 2), f"{mean.scored} of {mean.of}") for code, mean in means.items()]
        every = suite.overall(means)
        if every.score is not None:
            rows.append(("mean", _percent(every.score, 2), f"{every.scored} of {every.of} languages"))
        print_table(("language", "mean, %", "tasks scored"), rows)
    say(f"results: {where}")


def _percent(score: float | None, places: int = 1) -> str:
    return "-" if score is None else f"{100 * score:.{places}f}"


def _everyday(
    model: str, codes: list[str] | None, prompt: str | None, prompt_name: str | None, *, as_json: bool, quiet: bool
) -> None:
    from lusifer.data.everyday_set import load_everyday
    from lusifer.data.prompts import prompt_for
    from lusifer.evaluation.everyday import embedder, score
    from lusifer.loading import load_checkpoint
    from lusifer.model.backbone_alone import Embed, encoder_alone

    if model.startswith("encoder:"):
        if prompt is not None or prompt_name is not None:
            raise LusiferError("an encoder alone has at most a prompt of its own; leave --prompt and --prompt-name out")
        embed: Embed = encoder_alone(model.removeprefix("encoder:")).embed
    else:
        loaded = load_checkpoint(model)
        embed = embedder(loaded, prompt=prompt_for(loaded, None, prompt=prompt, prompt_name=prompt_name))
    scores = score(embed, languages=codes or list(load_everyday().sentences), progress=not quiet)
    if as_json:
        emit(scores)
        return
    translation, topic = scores["translation_retrieval"], scores["topic_retrieval"]
    rows = [(code, _percent(translation.get(code)), _percent(topic[code])) for code in topic]
    print_table(("language", "translation retrieval, %", "topic retrieval, %"), rows)


@benchmark_app.command("show")
def show(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(suite.BENCHMARKS)}.")] = suite.MAIN,
    tasks: Annotated[bool, typer.Option("--tasks", help="List every task instead of counts.")] = False,
    as_json: Json = False,
) -> None:
    """Lists the tasks of a benchmark; needs neither mteb nor network.

    Examples:
    - `lusifer benchmark show LUSIFER`
    - `lusifer benchmark show LUSIFER-xling --tasks`
    """
    if name not in suite.BENCHMARKS:
        raise LusiferError(f"there is no benchmark {name!r}; there are {', '.join(suite.BENCHMARKS)}")
    listed, newer = suite.tasks(name), suite.superseded()
    if as_json:
        facts: dict[str, Any] = {"tasks": {task.name: sorted(task.subsets) for task in listed}}
        emit({**facts, "counts": suite.counts()} if name == suite.MAIN else facts)
        return
    if name == suite.MAIN and not tasks:
        groups = ["Classification", "Clustering", "Retrieval", "STS", "Reranking", "all"]
        counts = suite.counts().items()
        print_table(("language", *groups), [[code, *[str(row.get(key, 0)) for key in groups]] for code, row in counts])
        say(f"{len({task.published_name for task in listed})} data sets, {len(listed)} mteb tasks")
        return
    rows = []
    for task in listed:
        codes = sorted({">".join(languages) for languages in task.subsets.values()})
        shown = " ".join(codes) if len(codes) <= 16 else f"{len(codes)} pairs"
        rows.append((task.name, task.group, ",".join(task.splits), shown, newer.get(task.name, "")))
    print_table(("task", "group", "split", "scores", "superseded in mteb by"), rows)


def report(
    results: Annotated[list[Path], typer.Argument(help="Output folders of `lusifer evaluate`.")],
    out: Annotated[Path, typer.Option(help="Folder for report.html and report.md.")] = Path("runs/report"),
    baseline: Annotated[
        list[str] | None, typer.Option(help="Folder name of a system to compare with; repeatable.")
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Add the paper's Tables 1 and 2, not measured here.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Puts results side by side: one self-contained HTML page, which prints to about two pages, and Markdown.

    The result and its uncertainty come first, details are folded away. Takes any number of systems; compares only what
    all of them have scored, and lists what is missing, failed or damaged.

    Example: `lusifer report runs/eval/starter runs/eval/encoder --baseline encoder`
    """
    from lusifer.evaluation.report import read, write

    paths = write(read(results), out, baseline or (), published=published)
    emit({"files": [str(path) for path in paths]}) if as_json else say("\n".join(str(path) for path in paths))


def diagnose(
    model: Annotated[str, typer.Argument(help="A LUSIFER checkpoint, or `starter`.", show_default=False)],
    lang: Annotated[str, typer.Option(help="Code of one of the bundled languages.", show_default=False)],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Shows which part fails for a language: encoder, connector or LLM.

    Compares 64 everyday sentences with their English translations at every point of the model.

    Example: `lusifer diagnose starter --lang te`
    """
    quiet_libraries(quiet)
    from lusifer.evaluation.diagnosis import diagnose as run
    from lusifer.evaluation.systems import llm_tokenizer
    from lusifer.loading import load_checkpoint
    from lusifer.model.sentence_transformer import lusifer_model

    loaded = load_checkpoint(model)
    facts = run(loaded, lang, llm_tokenizer(lusifer_model(loaded).config.llm))
    if as_json:
        emit(facts)
        return
    rows = [
        (row["point"], f"{100 * row['accuracy']:.1f}", f"{row['cka']:.2f}", f"{row['anisotropy']:.2f}")
        for row in facts["points"]
    ]
    print_table(("point", "finds its translation, %", "CKA with English", "anisotropy"), rows)
    for part, row in facts["tokens"].items():
        say(
            f"{part} tokenizer: {row['per sentence']:.1f} tokens a sentence, {row['times English']:.1f} times English, "
            f"{100 * row['unknown']:.1f} % unknown"
        )
    say(f"weak part: {facts['weak']}. {facts['why']}.")
