"""Python programs in processes of their own, forked from one that has imported the libraries already.

Importing takes most of the time of a small program. What a program sees is as in ``python ...``: its arguments, its
environment, its name ``__main__``, and nothing of the test's process. Libraries that read the environment when they
are imported read it again: each such environment has a server of its own.
"""

from __future__ import annotations

import atexit
import gc
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from importlib import import_module
from pathlib import Path

TESTS = Path(__file__).parents[1]
IMPORTED = (
    "lusifer.cli.app",
    "lusifer.bulk.run",
    "lusifer.search.indexing",
    "lusifer.starter.fetch",
    "lusifer.training.run",
)  # Not lancedb, whose threads do not survive a fork.
# Variables that the libraries above read when they are imported.
_EARLY = ("HF_", "TRANSFORMERS_", "OMP_", "MKL_", "ONEDNN_", "XDG_", "MTEB_", "PYTHONPATH", "HOME")
_LATE = ("HF_TOKEN",)
_GRACE = 30.0  # Seconds that other ranks have to end in when one has failed.
_servers: dict[str, subprocess.Popen[str]] = {}


def run(program, *, ranks=1, environment=None, timeout=300):
    """Runs what would stand behind ``python``.

    Args:
        program: ``-m MODULE``, ``-c CODE`` or a script's path, and arguments.
        ranks: How many processes, with the variables that torchrun sets.
        environment: The environment; this process's own when None.
        timeout: Seconds after which they are killed.

    Returns:
        ``subprocess.CompletedProcess`` with text; the exit code is that of the first to fail.
    """
    environment = dict(os.environ if environment is None else environment)
    with tempfile.TemporaryDirectory() as folder:
        job = {"program": [*map(str, program)], "ranks": ranks, "environment": environment, "timeout": timeout}
        job |= {"cwd": os.getcwd(), "out": f"{folder}/out", "err": f"{folder}/err"}
        server = _server(environment)
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        out, err = (Path(job[name]).read_text(encoding="utf-8", errors="replace") for name in ("out", "err"))
    return subprocess.CompletedProcess(program, code, out, err)


def context():
    """The standard library's own such server, for functions: one to a test's process, whoever starts it first."""
    forks = multiprocessing.get_context("forkserver")
    more = ("lusifer.bulk.local_engine", "lusifer.data.mining", "lusifer.evaluation.run", "support.crash")
    forks.set_forkserver_preload([*IMPORTED, *more])
    return forks


def _server(environment):
    early = {name: value for name, value in environment.items() if name.startswith(_EARLY) and name not in _LATE}
    key = json.dumps(early, sort_keys=True)
    if key not in _servers or _servers[key].poll() is not None:
        found = os.pathsep.join(filter(None, [str(TESTS), environment.get("PYTHONPATH", "")]))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        _servers[key] = subprocess.Popen([sys.executable, __file__], env={**environment, "PYTHONPATH": found}, **pipes)
    return _servers[key]


@atexit.register
def close():
    """Ends all servers."""
    for server in _servers.values():
        server.stdin.close()
        server.wait()
    _servers.clear()


# ------------------------------------------------------------------------------------------------------- the server


def serve():
    """Answers each job with an exit code; returns, in a forked process only, what that one is to run."""
    for name in IMPORTED:
        import_module(name)
    gc.freeze()
    for line in sys.stdin:
        job = json.loads(line)
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        pids = []
        for rank in range(job["ranks"]):
            if (pid := os.fork()) == 0:
                become(job, rank, port)
                return job["program"]
            pids.append(pid)
        print(ended(pids, job["timeout"]), flush=True)
    return None


def become(job, rank, port):
    """Makes this process what the job asks for."""
    os.setsid()
    for number, name in ((1, "out"), (2, "err")):
        handle = os.open(job[name], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, number)
        os.close(handle)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["ranks"], "LOCAL_WORLD_SIZE": job["ranks"]}
    ranks |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.clear()
    os.environ.update(job["environment"])
    if job["ranks"] > 1:
        os.environ.update({name: str(value) for name, value in ranks.items()})
    os.chdir(job["cwd"])


def ended(pids, timeout):
    """The exit code of the first process to fail, which ends the others; 0 when all have ended well."""
    left, code, until = set(pids), 0, time.monotonic() + timeout
    while left:
        for pid in list(left):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                left.remove(pid)
                failed = os.waitstatus_to_exitcode(status)
                if failed and not code:
                    code, until = failed, min(until, time.monotonic() + _GRACE)
                    kill(left, signal.SIGTERM)
        if time.monotonic() > until:
            kill(left, signal.SIGKILL)
            code = code or -signal.SIGKILL
        time.sleep(0.01)
    return code


def kill(pids, number):
    """Sends a signal to processes."""
    for pid in pids:
        os.kill(pid, number)


def main(program):
    """Runs a program as Python does."""
    kind, rest = program[0], program[1:]
    if kind == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = program, str(Path(kind).parent)
        runpy.run_path(kind, run_name="__main__")


def leave(program):
    """Runs a program, and ends as Python does but for taking down the libraries, which takes seconds."""
    code = 0
    try:
        main(program)
    except SystemExit as stop:
        if stop.code is not None and not isinstance(stop.code, int):
            print(stop.code, file=sys.stderr)
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


if __name__ == "__main__" and (asked := serve()) is not None:
    leave(asked)
