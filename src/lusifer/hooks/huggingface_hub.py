"""What we use of huggingface_hub that is not public."""

from __future__ import annotations

import logging
import sys
import time
from functools import cache
from pathlib import Path

from huggingface_hub import constants, get_session
from huggingface_hub.errors import LocalEntryNotFoundError

from lusifer.errors import first_line

logger = logging.getLogger(__name__)

_TRIES, _WAIT = 2, 1.0  # Requests, and seconds between them.
_TIMEOUT = 10.0  # Seconds.


@cache
def settle_hub() -> bool:
    """Whether the hub can be reached, asked once a process; where it cannot, libraries use their caches from then on.

    They would ask for each file of a model six times, with pauses: three minutes before they give up. Sets
    ``huggingface_hub.constants.HF_HUB_OFFLINE``, which transformers follows too, and the copy of it that datasets has.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    for tried in range(_TRIES):
        if tried:
            time.sleep(_WAIT)
        try:
            get_session().head(constants.ENDPOINT, timeout=_TIMEOUT)
            return True
        except Exception as error:  # Of the HTTP library, which differs by version.
            reason = first_line(error)
    logger.warning("%s cannot be reached (%s): using cached files only", constants.ENDPOINT, reason)
    constants.HF_HUB_OFFLINE = True
    if "datasets.config" in sys.modules:
        vars(sys.modules["datasets.config"]).update(HF_HUB_OFFLINE=True, HF_DATASETS_OFFLINE=True)
    return False


def why_not_loaded(name: str, error: BaseException) -> str:
    """Why a model or a data set was not loaded, in one line.

    Args:
        name: Folder or hub id.
        error: What a library raised.
    """
    if constants.HF_HUB_OFFLINE and not Path(name).exists() and _is_absence(error):
        return "there is no such folder, and the hub cannot be reached"
    return first_line(error)


def _is_absence(error: BaseException | None) -> bool:
    """Whether something was neither cached nor asked for, rather than broken."""
    while error is not None:
        if isinstance(error, LocalEntryNotFoundError | ConnectionError):
            return True
        error = error.__cause__ or error.__context__
    return False
