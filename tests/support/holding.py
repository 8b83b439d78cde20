"""Another process that is at work in a place."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager

_CODE = """
import sys
from lusifer.locks import alone_at
with alone_at(sys.argv[1]):
    print("holding", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held(place):
    """Has another process hold a place while a block runs; gives that process, which may be killed."""
    with subprocess.Popen(
        [sys.executable, "-c", _CODE, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "holding\n"
        try:
            yield process
        finally:
            process.stdin.close()
