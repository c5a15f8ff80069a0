"""Workers on a Ray cluster: an actor for each device, or for each part of a GPU.

Ray places the actors, and starts them again when their process or node ends. The batch gives a job to each actor that
is ready, and lets the job of one that ended wait again.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from tuneavideo.batch.job_file import BatchJob
from tuneavideo.batch.pool import Message, Pool
from tuneavideo.batch.worker import RUN_JOB, function_at, prepare
from tuneavideo.errors import MissingExtra, RunError

GROW = 5.0  # seconds between two looks for new devices in the cluster
HEAD_LOST = 20.0  # seconds without an answer of the head node after which the batch ends
RUNNING = ("ready", "job")


class ClusterWorker:
    """Actor that runs one job at a time; other threads of it answer questions on the job."""

    def __init__(self, root: str, scores: bool, work: str, fraction: float) -> None:
        self.root, self.scores, self.work = root, scores, function_at(work)
        self.is_stopping, self.last = False, dict[str, Any]()
        if work == RUN_JOB:
            self.kept = prepare()
            self.kept.__enter__()
            _limit_memory(fraction)

    def ready(self) -> str:
        """Return the name of the worker, when it can take a job."""
        return f"{socket.gethostname()} {os.getpid()}"

    def run(self, message: dict[str, Any]) -> dict[str, Any]:
        """Run a job, and return its last message."""
        job, last = BatchJob.of_message(message), dict[str, Any]()
        for last in self.work(job, self.root, self.scores, lambda: self.is_stopping):
            self.last = {"job": job.id, **last}
        return last

    def progress(self) -> dict[str, Any]:
        """Return the last message of the job."""
        return self.last

    def stop(self) -> None:
        """Stop the job after its current step."""
        self.is_stopping = True


class ClusterRunner:
    """The actors, and the calls that they have not answered.

    Args:
        pool: The jobs.
        due: The same.
        root: Path or URL of the folder of the runs.
        address: Address of the cluster.
        scores: Whether to score the edits.
        workers: Number of actors; by default one for each device, or for each part of a GPU.
        work: Function that runs a job, as `module:function`.
    """

    def __init__(
        self, pool: Pool, due: Sequence[BatchJob], root: str, address: str, *, scores: bool,
        workers: int | None = None, work: str = RUN_JOB,
    ) -> None:  # fmt: skip
        if not importlib.util.find_spec("ray"):
            raise MissingExtra("a Ray cluster", "ray")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        self.ray, self.pool, self.workers = ray, pool, workers
        try:
            _check_answers(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise RunError(
                f"no Ray cluster answers at {address}: {' '.join(str(error).split())[:200]}; start one with 'ray start "
                "--head', or give another --ray"
            ) from None
        self.fraction = self._fraction(due)
        has_gpus = bool(ray.cluster_resources().get("GPU"))
        self.actor = ray.remote(ClusterWorker).options(
            num_cpus=1, num_gpus=self.fraction if has_gpus else 0, max_restarts=-1, max_concurrency=3,
            scheduling_strategy="SPREAD",
        )  # fmt: skip
        place = root if "://" in root else os.path.abspath(root)
        self.arguments = (place, scores, work, self.fraction)
        self.actors = list[Any]()
        self.names = dict[int, str]()
        self.idle = list[int]()
        self.calls = dict[Any, tuple[str, int, BatchJob | None]]()  # kind, number of the actor, job
        self._ended = threading.Event()

    def messages(self) -> Iterator[Message | None]:
        threading.Thread(target=self._watch_head, daemon=True).start()
        grown, asked = 0.0, 0.0
        try:
            while self._has_work():
                now = time.monotonic()
                if now - grown > GROW:
                    self._grow()
                    grown = now
                if now - asked > 1:
                    self._ask_progress()
                    asked = now
                done = self.ray.wait([*self.calls], num_returns=1, timeout=0.5)[0] if self.calls else []
                for call in done:
                    yield from self._answered(call)
                yield from self._assign()
                if not done:
                    yield None
        finally:
            self._ended.set()
            for actor in self.actors:
                self.ray.kill(actor)
            self.ray.shutdown()

    def stop(self) -> None:
        self.pool.is_stopped = True
        for actor in self.actors:
            actor.stop.remote()

    def kill(self) -> None:
        self.pool.is_stopped = True
        for actor in self.actors:
            self.ray.kill(actor)

    def _has_work(self) -> bool:
        return self.pool.has_more() or any(kind == "job" for kind, _, _ in self.calls.values())

    def _grow(self) -> None:
        """Add actors for devices that joined the cluster."""
        while len(self.actors) < (self.workers or self._devices()):
            self.actors.append(self.actor.remote(*self.arguments))
            self._call_ready(len(self.actors) - 1)

    def _devices(self) -> int:
        """Return the number of actors that the cluster has devices for: parts of GPUs, else nodes; at least one."""
        resources = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        gpus = sum(int(each.get("GPU", 0)) for each in resources) * round(1 / self.fraction)
        return max(gpus or sum(each.get("CPU", 0) >= 1 for each in resources), 1)

    def _call_ready(self, number: int) -> None:
        """Ask an actor for its name; Ray answers when the actor runs, however often it is started again."""
        call = self.actors[number].ready.options(max_task_retries=-1).remote()
        self.calls[call] = ("ready", number, None)

    def _ask_progress(self) -> None:
        asked = {number for kind, number, _ in self.calls.values() if kind == "progress"}
        for kind, number, job in [*self.calls.values()]:
            if kind == "job" and number not in asked:
                self.calls[self.actors[number].progress.remote()] = ("progress", number, job)

    def _answered(self, call: Any) -> Iterator[Message]:
        """Yield the messages that follow from an answer."""
        kind, number, job = self.calls.pop(call)
        try:
            answer = self.ray.get(call)
        except self.ray.exceptions.RayError as error:
            if kind == "job" and job:
                lost = {"state": "stopped"} if self.pool.is_stopped else self.pool.lost(job, type(error).__name__)
                yield {"job": job.id, "worker": self.names[number], **lost}
            if kind in RUNNING and not self.pool.is_stopped:
                self._call_ready(number)
            return
        if kind == "progress":
            if answer.get("state") == "running":
                yield {"worker": self.names[number], **answer}
            return
        if kind == "ready":
            self.names[number] = answer
        elif job:
            yield {"job": job.id, "worker": self.names[number], **answer}
            if answer.get("restart"):
                self.ray.kill(self.actors[number], no_restart=False)
                return self._call_ready(number)
        self.idle.append(number)

    def _assign(self) -> Iterator[Message]:
        """Give jobs to the actors that have none."""
        while self.idle and (job := self.pool.take()):
            number = self.idle.pop(0)
            self.calls[self.actors[number].run.remote(job.as_message())] = ("job", number, job)
            yield {"job": job.id, "worker": self.names[number], "state": "running", "stage": "begin"}

    def _fraction(self, due: Sequence[BatchJob]) -> float:
        """Return the part of a GPU that each actor gets, by the setting `memory` of the jobs."""
        needed = [job.settings.memory for job in due]
        if not all(needed) or not self.ray.cluster_resources().get("GPU"):
            return 1.0
        probe = self.ray.remote(num_gpus=0.01, num_cpus=0)(_gpu_memory)
        return gpu_fraction(max(each for each in needed if each), self.ray.get(probe.remote()))

    def _watch_head(self) -> None:
        """End the process with a line when the head node does not answer: Ray itself would abort it."""
        host, _, port = self.ray.get_runtime_context().gcs_address.rpartition(":")
        answered = time.monotonic()
        while not self._ended.wait(2):
            try:
                socket.create_connection((host, int(port)), 2).close()
                answered = time.monotonic()
            except OSError:
                if time.monotonic() - answered > HEAD_LOST:
                    print(
                        f"tuneavideo: the head node of the Ray cluster, {host}:{port}, does not answer; what was made "
                        "is kept; go on with the same command when the cluster is back",
                        file=sys.stderr, flush=True,
                    )  # fmt: skip
                    os._exit(2)


def _check_answers(address: str) -> None:
    """Raise OSError when nothing listens at HOST:PORT, for which Ray would wait a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), 10).close()


def gpu_fraction(needed_gb: float, total: int) -> float:
    """Return the part of a GPU of `total` bytes for jobs of `needed_gb` GB: 1 over the number that fit at once."""
    return 1 / max(1, int(total // (needed_gb * 1e9)))


def _gpu_memory() -> int:
    import torch

    return torch.cuda.mem_get_info()[1]


def _limit_memory(fraction: float) -> None:
    """Limit the memory of a process that has a part of a GPU."""
    import torch

    if fraction < 1 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(fraction)
