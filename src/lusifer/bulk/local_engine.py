"""Shards encoded on this machine: in this process, or in several, each with a model of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from lusifer.bulk.job import Job, Prepared, ShardFacts
from lusifer.bulk.shard import ShardEncoder, Tick
from lusifer.errors import LusiferError
from lusifer.quiet import quiet_libraries

_PATIENCE = 20.0  # Seconds for a batch: as long as a journal waits at most, so that more would not keep more.


class InProcess(ShardEncoder):
    """Encodes shards here, one after the other."""

    def close(self) -> None:
        """Nothing to end."""

    def make(self, numbers: Sequence[int], prepared: Prepared, tick: Tick) -> Iterator[ShardFacts]:
        """Encodes shards and yields their facts.

        Args:
            numbers: Of the shards.
            prepared: From `prepare`.
            tick: Called after each batch with the number of its texts.
        """
        return (self.encode(self.job.plan.slices[number], prepared, tick) for number in numbers)


class Processes:
    """Encodes shards in several processes; whoever is done takes the next one.

    Each process has a pipe of its own, so that one that is killed takes nothing with it but its unfinished shard.

    Args:
        job: The job.
        devices: Torch device of each process.
    """

    def __init__(self, job: Job, devices: Sequence[str | None]) -> None:
        self.job, self.devices = job, devices
        self._running: dict[Connection, Any] = {}
        self._at_work: dict[Connection, int] = {}

    def close(self) -> None:
        """Ends the processes; one at work notices it after its batch, and keeps what it has done of its shard."""
        for pipe in self._running:
            pipe.close()
        deadline = time.monotonic() + _PATIENCE
        for pipe, process in self._running.items():
            if pipe in self._at_work:
                process.join(max(0.0, deadline - time.monotonic()))
            process.terminate()
        for process in self._running.values():
            process.join()
        self._running.clear()

    def _start(self, device: str | None) -> Connection:
        context = _context()
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self.job, device, dict(os.environ)), daemon=True)
        with _interrupt_blocked():
            process.start()
            theirs.close()
            self._running[ours] = process
        return ours

    def prepare(self) -> Prepared:
        """See `ShardEncoder.prepare`; the first process does it, the others start afterwards."""
        pipe = self._start(self.devices[0])
        pipe.send(None)
        return self._receive(pipe, "the first one")

    def make(self, numbers: Sequence[int], prepared: Prepared, tick: Tick) -> Iterator[ShardFacts]:
        """As `InProcess.make`, shards as they are done.

        Raises:
            LusiferError: If a process reports one, or dies.
        """
        waiting = iter(numbers)
        for device in self.devices[len(self._running) : len(numbers)]:
            self._start(device)
        at_work, idle = self._at_work, list(self._running)
        while True:
            while idle and (number := next(waiting, None)) is not None:
                pipe = idle.pop()
                pipe.send((self.job.plan.slices[number], prepared))
                at_work[pipe] = number
            if not at_work:
                return
            for ready in wait(list(at_work)):
                assert isinstance(ready, Connection)
                answer = self._receive(ready, f"shard {at_work[ready]}")
                if isinstance(answer, int):
                    tick(answer)
                    continue
                del at_work[ready]
                idle.append(ready)
                yield answer

    def _receive(self, pipe: Connection, work: str) -> Any:
        try:
            answer = pipe.recv()
        except (EOFError, OSError) as error:
            self._running[pipe].join()
            died = f"the process at {work} died (exit code {self._running[pipe].exitcode}; out of memory?)"
            raise LusiferError(f"{died}: try fewer --processes; run the same command again to resume") from error
        if isinstance(answer, Exception):
            raise answer
        return answer


def _context() -> Any:
    """How processes start: on Linux forked from one that has done nothing but import the libraries, once for all."""
    if sys.platform != "linux":  # Frameworks of macOS do not survive a fork.
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


@contextmanager
def _interrupt_blocked() -> Iterator[None]:
    """Blocks Ctrl-C, also in a process started meanwhile, whose imports it would end with a traceback."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(pipe: Connection, job: Job, device: str | None, environment: dict[str, str]) -> None:
    """What a process does: encodes the shards it is sent until the pipe closes."""
    # It is forked from a process that was started at another time, with another environment perhaps.
    os.environ.clear()
    os.environ.update(environment)
    # Ctrl-C reaches every process of a terminal; the first one decides. What came since the start is dropped here.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    quiet_libraries(True)
    with suppress(EOFError, ConnectionError):  # The command is gone, which telling it of a mistake may find out, too.
        try:
            encoder = ShardEncoder(job, device)
            while True:
                task = pipe.recv()
                pipe.send(encoder.prepare() if task is None else encoder.encode(task[0], task[1], pipe.send))
        except LusiferError as error:
            pipe.send(LusiferError(str(error)))  # Without its cause, which may not survive pickling.
