"""A model of numbers that fails or hangs when told to; run as a program, servers with it."""

from __future__ import annotations

import logging
import os
import threading
from types import SimpleNamespace

import numpy as np

HANGS, FAILS = 7, 13  # Token ids.


class Toy:
    """What the server needs of a model; a text's vector says how many tokens it has."""

    max_seq_length, token_budget = 64, 64
    model = SimpleNamespace(prompts={}, default_prompt_name=None)

    def __init__(self, dimension=4):
        self.dimension, self.number = dimension, 1 / dimension**0.5
        self.tokenizer = range(100)
        self.broken, self.go_on, self.calls = False, threading.Event(), 0

    def tokenize(self, texts):
        return [[1] * 8 for _ in texts]

    def encode_ids(self, ids):
        self.calls += 1
        if any(HANGS in row for row in ids):
            self.go_on.wait()
        if self.broken or any(FAILS in row for row in ids):
            raise RuntimeError("CUDA error: device-side assert triggered\nand so on")
        return np.full((len(ids), self.dimension), self.number, dtype=np.float32)


def main(*limits):
    """Serves in one process for each pair of drain limit and watchdog; prints their ids and ports, then exit codes."""
    from lusifer.serving import server
    from lusifer.serving.app import create_app
    from lusifer.serving.condition import Condition
    from lusifer.serving.limits import Phase

    Condition.least = 1.0
    logging.basicConfig(format="%(message)s")
    for drain, watchdog in limits:
        listening = server.listen("127.0.0.1", 0)
        # The imports above take longer than all the rest, so they are done once.
        if (process := os.fork()) == 0:
            phase = Phase()
            app = create_app(Toy, "toy", phase=phase)
            server.run(app, listening, phase, drain_timeout=drain, watchdog=watchdog)
            os._exit(0)
        print(process, listening.getsockname()[1], flush=True)
        listening.close()
    for _ in limits:
        process, status = os.wait()
        print(process, os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main((1.0, None), (60.0, None), (60.0, 1.5))
