"""Shards encoded by a Ray cluster: Ray Data gives them to a pool of actors, and those of lost actors to others.

Actors read the input and write the output themselves, so both must be seen from every machine: an object store, or a
folder they share. Shards are those of one machine.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

from lusifer.bulk.job import Job, Prepared, ShardFacts
from lusifer.bulk.shard import ShardEncoder, Tick
from lusifer.errors import LusiferError, first_line


class _Actor:
    """A model in a process of the cluster, started by Ray."""

    def __init__(self, job: Job, prepared: Prepared, device: str | None) -> None:
        self.prepared = prepared
        self.encoder = ShardEncoder(job, device)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        slices = self.encoder.job.plan.slices
        shards = [self.encoder.encode(slices[int(number)], self.prepared) for number in batch["id"]]
        return {name: [getattr(facts, name) for facts in shards] for name in ShardFacts._fields}


def _prepare(job: Job, device: str | None) -> Prepared:
    return ShardEncoder(job, device).prepare()


class RayCluster:
    """Encodes shards on a Ray cluster: the one ``RAY_ADDRESS`` names, else the one running here, else a new one.

    Args:
        job: The job.
        actors: Processes of the cluster that hold a model.
        device: ``cuda`` gives each actor a GPU; otherwise it computes on a CPU.

    Raises:
        LusiferError: If Ray is not installed or its cluster does not answer.
    """

    def __init__(self, job: Job, actors: int, device: str | None = None) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray warns of every actor that could not restart without its driver, in the middle of our bar.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise LusiferError("--engine ray needs Ray: pip install 'lusifer[ray]'") from error
        self.ray, self.job, self.actors = ray, job, actors
        self.device = device or "cpu"
        if self.device not in ("cpu", "cuda"):
            raise LusiferError(f"with --engine ray, --device is cpu or cuda (a GPU each), not {device!r}")
        self.resources: dict[str, Any] = {"num_cpus": job.threads, "num_gpus": int(self.device == "cuda")}
        self._own = not ray.is_initialized()
        if self._own:
            try:
                # Without an address Ray takes a running cluster if there is one, else starts one.
                ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise LusiferError(f"cannot reach the Ray cluster: {first_line(error)}") from error

    def close(self) -> None:
        """Leaves the cluster, unless somebody else joined it."""
        if self._own:
            self.ray.shutdown()

    def prepare(self) -> Prepared:
        """See `ShardEncoder.prepare`; done where shards will be encoded, not here.

        Raises:
            LusiferError: As there, or if no machine has the resources.
        """
        task = self.ray.remote(**self.resources)(_prepare)
        try:
            return self.ray.get(task.remote(self.job, self.device))
        except self.ray.exceptions.RayError as error:
            raise _as_one_line(error) from error

    def make(self, numbers: Sequence[int], prepared: Prepared, tick: Tick) -> Iterator[ShardFacts]:
        """As `lusifer.bulk.local_engine.InProcess.make`, shards as they are done; ``tick`` hears of each.

        Raises:
            LusiferError: If an actor reports one, or the cluster is gone. Ray encodes shards of lost actors again.
        """
        data = self.ray.data
        context = data.DataContext.get_current()
        context.enable_progress_bars = False  # They would be drawn over ours.
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        size = min(self.actors, len(numbers))
        shards = data.from_items([{"id": number} for number in numbers], override_num_blocks=len(numbers)).map_batches(
            _Actor,
            batch_size=1,
            compute=data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1),
            fn_constructor_args=(self.job, prepared, self.device),
            **self.resources,
        )
        try:
            for row in shards.iter_rows():
                facts = ShardFacts(*(int(row[name]) for name in ShardFacts._fields))
                tick(self.job.plan.slices[facts.number].rows)
                yield facts
        except self.ray.exceptions.RayError as error:
            raise _as_one_line(error) from error


def _as_one_line(error: Exception) -> LusiferError:
    """What an actor raised, or what Ray says of its loss, as one line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, LusiferError):
            return LusiferError(first_line(getattr(cause, "cause", cause)))
        cause = getattr(cause, "cause", None) or cause.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return LusiferError(f"the Ray cluster gave up: {lines[-1]}; run the same command again to resume")
