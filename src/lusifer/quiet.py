"""One place that sets what a command writes to standard error: our own lines, not those of the libraries beneath."""

from __future__ import annotations

import logging
import sys
import warnings


def quiet_libraries(quiet: bool) -> None:
    """Logs our own messages to standard error and silences the libraries beneath, whose bars drown ours.

    Args:
        quiet: Whether only warnings of ours are shown.
    """
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging as transformers_logging

    logging.basicConfig(
        level=logging.WARNING if quiet else logging.INFO, format="%(message)s", stream=sys.stderr, force=True
    )
    # What goes wrong inside datasets reaches the user as one line of ours.
    logging.getLogger("datasets").setLevel(logging.CRITICAL)
    for name in ("httpx", "sentence_transformers", "transformers", "filelock", "mteb"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bar()
    warnings.filterwarnings("ignore")
