"""Bulk encoding: any amount of texts into a folder of Parquet shards, to be interrupted and resumed at will.

The input is read once to check it and lay out shards; what a run shares is measured once. The manifest holds both
before the first shard is made, and refuses to go on with anything else. Shards are then made in any order, by any
number of processes, each whole: the same call does what is missing, and the bytes do not depend on how often that took.
What was done of unfinished shards is in their journals.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lusifer.bulk.job import OUTPUT_DTYPES, Job, Plan, Prepared, Settings, ShardFacts, read_facts, schema, shard_name
from lusifer.bulk.journal import kept_rows, pieces, remove
from lusifer.bulk.plan import make_plan
from lusifer.data.prompts import explicit_prompt
from lusifer.data.rows import Columns
from lusifer.data.sources import InputFile, find_files
from lusifer.data.vectors.encoded import MANIFEST
from lusifer.errors import LusiferError
from lusifer.loading import resolve
from lusifer.locks import alone_at
from lusifer.model.fingerprint import model_hash
from lusifer.progress import bar
from lusifer.storage import Folder, is_remote
from lusifer.terminal import without_secrets

ENGINES = ("local", "ray")
_FORMAT = 1


def _is_single(output: str) -> bool:
    """Whether an output is one file rather than a folder of shards; refuses a name that can be neither."""
    path = Path(output)
    if output.endswith("/") or path.is_dir():
        return False
    if path.suffix in (".parquet", ".npy"):
        if not is_remote(output) and not path.parent.is_dir():
            raise LusiferError(f"cannot write into {str(path.parent)!r}: no such folder")
        return True
    if path.suffix:
        raise LusiferError(f"cannot write {output!r}: name it .parquet or .npy, or end a folder's name with /")
    return False


def encode(
    model: str,
    source: str,
    output: str,
    settings: Settings | None = None,
    *,
    engine: str = "local",
    processes: int = 1,
    device: str | None = None,
    threads: int | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Embeds the texts of files.

    Args:
        model: Checkpoint folder, hub id, or ``starter``.
        source: A file, a folder or a glob, here or in a store.
        output: A folder for shards and ``_manifest.json``, or a file ``.parquet`` or ``.npy``.
        settings: What to make of it.
        engine: ``local``, or ``ray`` for a cluster.
        processes: Processes that hold a model.
        device: Torch device; several, comma-separated, get a process each.
        threads: Torch threads of a process; by default what there is, shared.
        progress: Whether to show bars.

    Returns:
        ``texts`` embedded, ``dimension``, ``cut`` (texts longer than the model's window), ``skipped`` bad rows,
        ``output``, and ``shards`` of a folder.

    Raises:
        LusiferError: If input, model, settings or output are not as they must be. A folder holds complete shards
            whatever happens, and the same call resumes.
        KeyboardInterrupt: As it came, with what is kept, in words.
    """
    settings = settings or Settings()
    _check(settings, engine)
    single = _is_single(output)
    if single and (processes > 1 or engine != "local" or (device and "," in device)):
        raise LusiferError("several processes need a folder as output, not a file")
    files = find_files(source, output=output)
    folder = resolve(model)
    run = {"model": folder, "name": model, "files": files, "settings": settings, "single": single}
    run["output"] = output.rstrip("/")
    options = {"engine": engine, "processes": processes, "device": device, "threads": threads, "progress": progress}
    if not single:
        return _encode_folder(model, run, **options)
    with nullcontext() if is_remote(output) else alone_at(output):
        try:
            return _encode_file(run, **options)
        except KeyboardInterrupt as stop:
            lost = "nothing is kept, because the output is one file; a folder as output can be resumed"
            raise KeyboardInterrupt(lost) from stop


def _check(settings: Settings, engine: str) -> None:
    explicit_prompt(settings.prompt, settings.instruction)  # Refuses both.
    for name, value, known in (("output dtype", settings.output_dtype, OUTPUT_DTYPES), ("engine", engine, ENGINES)):
        if value not in known:
            raise LusiferError(f"no {name} {value!r}; there are {', '.join(known)}")
    for name, number in (("dim", settings.dim), ("shard rows", settings.shard_rows)):
        if number is not None and number < 1:
            raise LusiferError(f"{name} must be at least 1, not {number}")


def _encode_file(run: dict[str, Any], **options: Any) -> dict[str, Any]:
    from lusifer.bulk.shard import ShardEncoder

    if run["output"].endswith(".npy"):  # Which holds vectors and nothing else.
        run["settings"] = replace(run["settings"], metadata=[])
    plan = _plan(run["files"], run["settings"], None, options["progress"])
    job = Job(**run, plan=plan, threads=options["threads"] or _threads(1))
    encoder = ShardEncoder(job, options["device"])
    prepared = encoder.prepare()
    with bar(plan.rows, "encoding", "text", show=options["progress"]) as shown:
        shard = encoder.encode(plan.slices[0], prepared, shown.update)
    return _summary([shard._asdict()], prepared.dimension, plan.bad, job.output)


def _encode_folder(model: str, run: dict[str, Any], **options: Any) -> dict[str, Any]:
    target = Folder(run["output"])
    identity = {
        "format": _FORMAT,
        "model": model,
        "model_hash": model_hash(run["model"]),
        "settings": asdict(run["settings"]),
        "input": without_secrets([asdict(file) for file in run["files"]]),
    }
    with _locked(target):
        manifest, done = _resume(target, identity, options["threads"])
        if manifest.get("complete"):
            return _summary_of_folder(manifest, run["output"])
        if manifest.get("plan") is None:
            # Written before hours of work: a store that refuses us shall do so now.
            target.write_json(MANIFEST, manifest)
            plan = _plan(run["files"], run["settings"], run["settings"].shard_rows, options["progress"])
            manifest["threads"] = options["threads"] or _threads(options["processes"])
            manifest["plan"] = {name: value for name, value in asdict(plan).items() if name != "shard_rows"}
            target.write_json(MANIFEST, manifest)
        plan = Plan(**manifest["plan"], shard_rows=run["settings"].shard_rows)
        job = Job(**run, plan=plan, threads=manifest["threads"])
        facts = [read_facts(target, number) for number in sorted(done)]
        try:
            facts += _make_missing(target, job, manifest, done, **options)
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(_kept(target, plan, facts)) from stop
        return _finish(target, job, manifest, facts)


def _kept(target: Folder, plan: Plan, known: Sequence[ShardFacts]) -> str:
    """What an interrupted run leaves to go on with, in words."""
    names = target.names()
    done = {part.number for part in plan.slices if shard_name(part.number) in names}
    new = done - {facts.number for facts in known}
    rows = sum(facts.rows for facts in known) + sum(read_facts(target, number).rows for number in new)
    rows += kept_rows(names, done)
    kept = f"{rows:,} of {plan.rows - plan.bad:,} rows are kept" if rows else "no row is encoded yet"
    return f"{kept}; the same command resumes there"


def _make_missing(
    target: Folder, job: Job, manifest: dict[str, Any], done: set[int], *, progress: bool, **options: Any
) -> list[ShardFacts]:
    """Makes the shards that are not there."""
    slices = job.plan.slices
    missing = [part.number for part in slices if part.number not in done]
    if not missing:
        return []
    with closing(_engine(job, **options)) as engine:
        if manifest["prepared"] is None:
            manifest["prepared"] = asdict(engine.prepare())
            target.write_json(MANIFEST, manifest)
        prepared = Prepared(**manifest["prepared"])
        before = sum(slices[number].rows for number in done) + kept_rows(target.names(), done)
        with bar(job.plan.rows, "encoding", "text", done=before, show=progress) as shown:
            return list(engine.make(missing, prepared, shown.update))


def _engine(job: Job, *, engine: str, processes: int, device: str | None, threads: int | None) -> Any:
    from lusifer.bulk.local_engine import InProcess, Processes
    from lusifer.bulk.ray_engine import RayCluster

    if engine == "ray":
        return RayCluster(job, processes, device)
    devices: list[str | None] = [part.strip() for part in device.split(",")] if device else [None]
    if len(devices) > 1 and processes > 1:
        raise LusiferError("several devices get a process each; leave --processes out")
    return Processes(job, devices * processes) if len(devices) * processes > 1 else InProcess(job, devices[0])


def _threads(processes: int) -> int:
    import torch

    return max(1, torch.get_num_threads() // processes)


@contextmanager
def _locked(target: Folder) -> Iterator[None]:
    """Keeps a second command out of a folder of this machine; in a store both would write the same shards."""
    target.make()
    if target.staging is None:
        yield
        return
    with alone_at(target.root):
        # Of a command that was killed, whose processes may be about to end.
        shutil.rmtree(target.staging, ignore_errors=True)
        target.make()
        try:
            yield
        finally:
            shutil.rmtree(target.staging, ignore_errors=True)


def _resume(target: Folder, identity: dict[str, Any], threads: int | None) -> tuple[dict[str, Any], set[int]]:
    """The manifest to go on with and the shards that are there; refuses a folder that holds another run."""
    fresh = {**identity, "plan": None, "prepared": None, "complete": False}
    names = target.names()
    known = target.read_json(MANIFEST) if MANIFEST in names else None
    shards = {name for name in names if name.startswith("part-")}
    begun = bool(shards or pieces(names))
    if known is None:
        if begun:
            raise LusiferError(f"{target.url!r} holds shards without a {MANIFEST}; choose another folder, or empty it")
        return fresh, set()
    changed = _difference(known, {**identity, "threads": threads})
    if changed and (begun or known.get("complete")):
        raise LusiferError(f"{target.url!r} holds another run: {changed}; choose another folder, or remove it")
    if changed or known.get("plan") is None:
        return fresh, set()
    return known, {number for number in range(len(known["plan"]["starts"])) if shard_name(number) in shards}


def _difference(known: dict[str, Any], asked: dict[str, Any]) -> str:
    """What of a run is not as it was, in words; nothing if all is."""
    if known.get("format") != asked["format"]:
        return f"its manifest has format {known.get('format')!r}, this version writes {asked['format']!r}"
    if known["model_hash"] != asked["model_hash"]:
        return f"its model was {known['model']!r} with other content"
    for name, value in asked["settings"].items():
        if (before := known["settings"].get(name)) != value:
            return f"{name} was {before!r} and is {value!r}"
    if asked["threads"] is not None and known.get("threads") not in (None, asked["threads"]):
        return f"threads was {known['threads']!r} and is {asked['threads']!r}"
    before, now = ({file["url"]: file for file in without_secrets(side["input"])} for side in (known, asked))
    for url in sorted(before.keys() | now.keys()):
        if before.get(url) != now.get(url):
            how = "is new" if url not in before else "is gone" if url not in now else "has changed"
            return f"its input was another, {url} {how}"
    return ""


def _finish(target: Folder, job: Job, manifest: dict[str, Any], facts: Sequence[ShardFacts]) -> dict[str, Any]:
    """Writes the final manifest: the same whoever made the shards, and when."""
    form = schema(job.settings, job.plan, manifest["prepared"]["dimension"])
    remove(target, target.names())
    manifest["columns"] = {field.name: str(field.type) for field in form}
    manifest["shards"] = [{"file": shard_name(number), "rows": rows, "cut": cut} for number, rows, cut in sorted(facts)]
    manifest["complete"] = True
    target.write_json(MANIFEST, manifest)
    return _summary_of_folder(manifest, job.output)


def _summary(shards: Sequence[dict[str, Any]], dimension: int, bad: int, output: str) -> dict[str, Any]:
    texts, truncated = (sum(shard[name] for shard in shards) for name in ("rows", "cut"))
    return {"texts": texts, "dimension": dimension, "cut": truncated, "skipped": bad, "output": output}


def _summary_of_folder(manifest: dict[str, Any], output: str) -> dict[str, Any]:
    shards = manifest["shards"]
    summary = _summary(shards, manifest["prepared"]["dimension"], manifest["plan"]["bad"], output)
    return {**summary, "shards": len(shards)}


def _plan(files: Sequence[InputFile], settings: Settings, shard_rows: int | None, progress: bool) -> Plan:
    from lusifer.model.text_encoder import PRECISIONS

    if settings.precision not in PRECISIONS:
        raise LusiferError(f"no precision {settings.precision!r}; there are {', '.join(PRECISIONS)}")
    total, columns = sum(file.size for file in files), Columns(settings.column, settings.id_column)
    kept: dict[str, Any] = {"metadata": settings.metadata, "skip_bad": settings.skip_bad}
    with bar(total, "checking", "B", show=progress, keep=False) as shown:
        return make_plan(files, columns, shard_rows=shard_rows, **kept, tick=shown.update)
