"""Training in processes of its own, as torchrun starts it, and by torchrun itself."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from support import forked
from support.forked import TESTS

# Stops like a power cut, in the middle of a step behind the first checkpoint.
CUT = """
import os, sys
import lusifer.training.stages as t
loss = getattr(t, {"align": "AlignmentLoss", "contrast": "ContrastiveLoss"}[sys.argv.pop(1)])
real, calls = loss.step, [0]
def step(self, *args, **kwargs):
    calls[0] += 1
    if calls[0] == 5:
        os._exit(9)
    return real(self, *args, **kwargs)
loss.step = step
from lusifer.cli.app import main
main()
"""


def start(program, *, ranks=1, torchrun=False, **variables):
    """Runs Python with these arguments, on several ranks as torchrun does, or by torchrun itself."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **variables}
    if not torchrun:
        return forked.run(program, ranks=ranks, environment=environment, timeout=400)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(port)]
    command = [sys.executable, *launcher, *program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)


def run(recipe, output, *, ranks=1, cut=None, overrides=(), torchrun=False):
    program = ["-m", "lusifer"]
    if cut:
        script = recipe.parent / "cut.py"
        script.write_text(CUT)
        program = [str(script), cut]
    program += ["train", str(recipe), "-q", "--output", str(output), *overrides]
    return start(program, ranks=ranks, torchrun=torchrun, LUSIFER_CACHE=str(recipe.parent / "cache"))


def run_jobs(folder, jobs, *, ranks):
    """Runs several recipes one after the other in one group of processes, see `support.ranks`."""
    listed = folder / f"jobs-{ranks}-{len(list(folder.glob('jobs-*')))}.json"
    listed.write_text(json.dumps(jobs))
    done = start([str(TESTS / "support" / "ranks.py"), str(listed)], ranks=ranks, LUSIFER_CACHE=str(folder / "cache"))
    assert done.returncode == 0, done.stderr[-4000:]


def seen(output, rank=0):
    """What `support.ranks` saw of a job on one rank."""
    return json.loads(Path(f"{output}.{rank}.json").read_text())
