"""Workers of this machine: one process for each device, started again when it ends."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from tuneavideo.batch.pool import Message, Pool
from tuneavideo.batch.worker import RUN_JOB
from tuneavideo.jobs.plan import visible_devices

OVER = ("done", "failed", "stopped")


class LocalRunner:
    """Worker processes, and a thread for each that gives it jobs.

    Args:
        pool: The jobs.
        root: Path or URL of the folder of the runs.
        logs: Folder for what the workers print.
        scores: Whether to score the edits.
        workers: Number of workers; by default one for each device.
        work: Function that runs a job, as `module:function`.
    """

    def __init__(
        self, pool: Pool, root: str, logs: Path, *, scores: bool, workers: int | None = None, work: str = RUN_JOB
    ) -> None:
        devices = visible_devices()
        count = workers or len(devices)
        self.devices = [devices[number % len(devices)] for number in range(count)]
        self.pool, self.logs = pool, logs
        words = [sys.executable, "-m", "tuneavideo.batch.worker", root, "--work", work]
        self.words: Sequence[str] = [*words, "--scores"] if scores else words
        self._processes: dict[int, subprocess.Popen[str]] = {}
        self._messages = queue.Queue[Message]()
        self._errors = list[BaseException]()

    def messages(self) -> Iterator[Message | None]:
        threads = [
            threading.Thread(target=self._serve, args=(number, device), daemon=True)
            for number, device in enumerate(self.devices)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) or not self._messages.empty():
            try:
                yield self._messages.get(timeout=0.5)
            except queue.Empty:
                yield None
        if self._errors:
            raise self._errors[0]

    def stop(self) -> None:
        self.pool.is_stopped = True
        for process in [*self._processes.values()]:
            _send(process, {"stop": True})

    def kill(self) -> None:
        self.pool.is_stopped = True
        for process in [*self._processes.values()]:
            process.kill()

    def _serve(self, number: int, device: str) -> None:
        """Give jobs to the worker of a device until none is left."""
        name = f"{device} {number}" if self.devices.count(device) > 1 else device
        try:
            while job := self.pool.take():
                process = self._started(number, device)
                about: Message = {"job": job.id, "worker": name}
                self._messages.put(about | {"state": "running", "stage": "begin"})
                _send(process, job.as_message())
                for line in process.stdout or ():
                    message = about | json.loads(line)
                    self._messages.put(message)
                    if message["state"] in OVER:
                        if message.get("restart"):
                            process.wait()
                        break
                else:
                    why = _ending(process.wait())
                    is_stopped = self.pool.is_stopped
                    self._messages.put(about | ({"state": "stopped"} if is_stopped else self.pool.lost(job, why)))
        except BaseException as error:
            self._errors.append(error)
        finally:
            if process := self._processes.get(number):
                if process.stdin:
                    with suppress(OSError):
                        process.stdin.close()
                process.wait()

    def _started(self, number: int, device: str) -> subprocess.Popen[str]:
        """Return the process of a worker, which is started if it does not run."""
        process = self._processes.get(number)
        if process and process.poll() is None:
            return process
        self.logs.mkdir(parents=True, exist_ok=True)
        own = {} if device in ("default", "cpu") else {"CUDA_VISIBLE_DEVICES": device}
        with (self.logs / f"worker-{device}-{number}.log").open("ab") as log:
            process = subprocess.Popen(
                self.words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env={**os.environ, **own}, start_new_session=True,  # a Ctrl-C on the terminal is for the batch
            )  # fmt: skip
        self._processes[number] = process
        if self.pool.is_stopped:
            _send(process, {"stop": True})
        return process


def _send(process: subprocess.Popen[str], message: Message) -> None:
    with suppress(OSError, ValueError):  # it has ended
        if process.stdin:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
