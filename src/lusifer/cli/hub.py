"""The commands ``lusifer card`` and ``lusifer push``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lusifer.cli.console import Json, emit, say
from lusifer.quiet import quiet_libraries

if TYPE_CHECKING:
    from lusifer.evaluation.report.results import System
    from lusifer.model.card import CardScores

Folder = Annotated[Path, typer.Argument(help="A checkpoint folder.", show_default=False)]


def card(
    model: Folder,
    results: Annotated[Path | None, typer.Option(help="Output folder of `lusifer evaluate`.")] = None,
    licence: Annotated[str | None, typer.Option("--license", help="Licence identifier, e.g. apache-2.0.")] = None,
    name: Annotated[str | None, typer.Option(help="Repository name, e.g. acme/lusifer-small.")] = None,
) -> None:
    """Writes the model card, README.md in the folder: parts, training, recipe, scores, limits, licence.

    Every saved model has one; this adds scores, licence and name.

    Example: `lusifer card runs/mine/model --results runs/eval/mine --license apache-2.0 --name acme/lusifer-small`
    """
    from lusifer.evaluation.report.results import read
    from lusifer.model.card import write_card

    scores = None if results is None else _card_scores(read([results])[0])
    say(str(write_card(model, scores=scores, licence=licence, name=name)))


def _card_scores(system: System) -> CardScores:
    """The results of `lusifer evaluate` as a card shows them: languages with the most resources first."""
    from huggingface_hub import EvalResult

    from lusifer.model.card import CardScores

    languages = {
        code: (mean, len({row.task for row in system.rows if row.languages == (code,)}))
        for code, mean in system.by_language(system.cells()).items()
    }
    results = [
        EvalResult(
            row.kind, f"mteb/{row.task}", f"{row.task} ({row.subset})", "main_score", round(100 * row.value, 2),
            task_name=row.kind, dataset_config=row.subset, metric_name="main score",
        )
        for row in system.rows
    ]  # fmt: skip
    versions = sorted(system.settings.get("version of mteb", set()))
    return CardScores(languages, results, versions, list(system.failed))


def push(
    model: Folder,
    repository: Annotated[str, typer.Argument(help="Target repository, e.g. acme/lusifer-small.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Create a new repository as private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to write to.")] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    create_pr: Annotated[bool, typer.Option("--pr", help="Open a pull request instead.")] = False,
    as_json: Json = False,
) -> None:
    """Uploads a checkpoint to a model hub, in one commit.

    Checks first that others can load it. Endpoint and token: HF_ENDPOINT, HF_TOKEN or `hf auth login`.

    Example: `lusifer push runs/mine/model acme/lusifer-small --private`
    """
    quiet_libraries(True)
    from lusifer.interop.hub import push as upload

    url = upload(model, repository, private=private, revision=revision, message=message, create_pr=create_pr)
    emit({"url": url}) if as_json else say(url)
