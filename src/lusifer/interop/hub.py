"""Sharing a checkpoint on a model hub: checked first, then uploaded in one commit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from safetensors import SafetensorError, safe_open

from lusifer.errors import LusiferError, first_line
from lusifer.model.card import CARD, is_hub_id, read_config, write_card
from lusifer.starter.fetch import PREFIX
from lusifer.trust import check_folder

_SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".md", ".jinja")
_MACHINE = re.compile(r'"(?:/(?:home|root|Users|tmp|mnt|data|work|workspace|scratch)/|[A-Za-z]:\\\\)[^"]*"')


def check_shareable(folder: Path) -> dict[str, Any]:
    """Checks that others could load a checkpoint, and that its folder holds nothing that should not leave the machine.

    Args:
        folder: The checkpoint.

    Returns:
        The checkpoint's configuration.

    Raises:
        LusiferError: If it is not complete, holds other files, links out of it or paths of this machine, or names
            backbones that only this machine has.
    """
    name = str(folder)
    if not (folder / "modules.json").is_file():
        raise LusiferError(f"no checkpoint at {name!r}: it has no modules.json")
    check_folder(repr(name), name)  # A link would be pushed as the file that it leads to.
    config = read_config(folder)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        inside = path.relative_to(folder)
        if path.suffix not in _SUFFIXES or any(part.startswith(".") for part in inside.parts):
            raise LusiferError(f"{str(inside)!r} in {name!r} is not part of a checkpoint; move it elsewhere")
        settings = path.suffix == ".json" and path.name != "tokenizer.json"  # A vocabulary may hold anything.
        if settings and (match := _MACHINE.search(path.read_text(encoding="utf-8", errors="replace"))):
            raise LusiferError(f"{str(inside)!r} in {name!r} contains a local path, {match[0]}; remove it")
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, "pt") as file:
                    file.keys()
            except (OSError, SafetensorError) as error:
                raise LusiferError(f"cannot read {str(inside)!r} in {name!r}: {first_line(error)}") from error
    if not config.get("standalone"):
        named = {"encoder": config.get("encoder"), "llm": config.get("llm")}
        named |= {f"adapter {i + 1} of the llm": n for i, n in enumerate(config.get("llm_base_adapters") or [])}
        for part, backbone in named.items():
            if not is_hub_id(str(backbone).split("@")[0]) and not str(backbone).startswith(PREFIX):
                raise LusiferError(
                    f"the {part} of {name!r} is {backbone!r}, which exists only on this machine: "
                    f"`lusifer merge {name} NEW` writes a standalone checkpoint"
                )
    return config


def push(
    folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Uploads a checkpoint in one commit: others see all of it or nothing.

    Endpoint and token are those of huggingface_hub: ``HF_ENDPOINT``, ``HF_TOKEN`` or ``hf auth login``.

    Args:
        folder: The checkpoint; gets a card if it has none.
        repo_id: ``owner/name``; created if it does not exist.
        private: Whether a new repository is private.
        revision: Branch; created if it does not exist.
        message: Commit message.
        create_pr: Open a pull request instead of writing to the branch.

    Returns:
        Address of the commit or pull request.

    Raises:
        LusiferError: If the checkpoint cannot be shared, or the hub refuses it or cannot be reached.
    """
    check_shareable(folder)
    if not (folder / CARD).is_file():
        write_card(folder, name=repo_id)
    api = HfApi()
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=revision,
            commit_message=message or "Add LUSIFER model",
            create_pr=create_pr,
        )
    except LocalTokenNotFoundError:
        raise LusiferError("no token: set HF_TOKEN or run `hf auth login`") from None
    except HFValidationError as error:
        raise LusiferError(f"{repo_id!r} is not a valid repository name: {first_line(error)}") from None
    except HfHubHTTPError as error:
        raise LusiferError(f"the hub refused {repo_id!r}: {_reason(error)}") from error
    except Exception as error:
        # Which HTTP library raises depends on the version of huggingface_hub.
        if not isinstance(error, OSError) and not type(error).__module__.startswith("httpx"):
            raise
        raise LusiferError(f"cannot reach the hub at {api.endpoint}: {first_line(error)}") from error
    return str(commit.pr_url or commit.commit_url)


def _reason(error: HfHubHTTPError) -> str:
    status = error.response.status_code if error.response is not None else None
    hints = {
        401: "the token is missing or not valid: set HF_TOKEN or run `hf auth login`",
        403: "the token may not write there",
        404: "there is no such repository, or the token may not see it",
        409: "the repository has just changed; try again",
    }
    if status in hints:
        return hints[status]
    return f"status {status}: {error.server_message or first_line(error)}"
