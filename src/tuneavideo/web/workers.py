"""Supervision of the workers: one process for each device, started again when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from typing import Any

from tuneavideo.jobs.plan import visible_devices
from tuneavideo.web.events import Events
from tuneavideo.web.queue import CANCELLED, DONE, FAILED, PAUSED, WAITING, Queue, Request

GRACE = 1.5  # seconds in which a cancelled job may end by itself
FIRST = 1.0  # seconds before workers start: the first page goes before
LONGEST_WAIT = 10.0  # seconds between two starts of a worker that ends at once


class Workers:
    """The workers of a root folder, and the last message on each job that runs."""

    def __init__(self, queue: Queue, events: Events) -> None:
        self.queue, self.events = queue, events
        self.running: dict[int, dict[str, Any]] = {}
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._tasks = list[asyncio.Task[None]]()

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._supervise(device)) for device in visible_devices()]

    async def stop(self) -> None:
        """End the workers' input, upon which they stop after their current steps."""
        for task in self._tasks:
            task.cancel()
        for process in self._processes.values():
            if process.stdin:
                process.stdin.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*(each.wait() for each in self._processes.values())), 5)

    def wake(self) -> None:
        """Let idle workers look at the queue."""
        for process in self._processes.values():
            _send(process, {})

    def request(self, kind: str, run: str, settings: dict[str, Any], *, is_new: bool = False) -> Request:
        """Add a job to the queue, see `Queue.add`; measurements give way to it."""
        for other in self.queue.waiting() if kind != "measure" else ():
            if other.kind == "measure":
                self._stop(other.id, CANCELLED)
        made = self.queue.add(kind, run, settings, is_new=is_new)
        self.publish(made)
        self.wake()
        return made

    def retry(self, number: int) -> Request:
        """Let a job that failed, was paused or was cancelled wait again."""
        request = self.queue.get(number)
        if request.state in (FAILED, PAUSED, CANCELLED):
            self.queue.set_state(number, WAITING)
        self.publish(self.queue.get(number))
        self.wake()
        return request

    async def cancel(self, number: int) -> Request:
        """Cancel a job; the worker is killed when the job does not end within `GRACE` seconds."""
        request = self._stop(number, CANCELLED)
        end = time.monotonic() + GRACE
        while number in self.running and time.monotonic() < end:
            await asyncio.sleep(0.05)
        message = self.running.get(number)
        if message and (process := self._processes.get(message["device"])):
            process.kill()
        return request

    def pause(self, number: int) -> Request:
        """Let a job end after its current step and keep what it has made."""
        return self._stop(number, PAUSED)

    def _stop(self, number: int, state: str) -> Request:
        request = self.queue.get(number)
        if request.state not in (DONE, FAILED, CANCELLED):
            self.queue.set_state(number, state)
        for process in self._processes.values():
            _send(process, {"stop": number})
        self.publish(self.queue.get(number))
        return request

    def publish(self, request: Request) -> None:
        """Send the state of a job to the browsers."""
        self.events.publish("job", self.state(request))

    def state(self, request: Request) -> dict[str, Any]:
        """Return the state of a job as the browsers get it."""
        own = {"job": request.id, "run": request.run, "kind": request.kind, "error": request.error}
        running = self.running.get(request.id, {}) if request.state not in (DONE, FAILED) else {}
        state = "stopping" if running and request.state in (PAUSED, CANCELLED) else request.state
        return {"state": state} | running | own | ({"state": state} if state == "stopping" else {})

    async def _supervise(self, device: str) -> None:
        wait = 0.2
        await asyncio.sleep(FIRST)
        while True:
            began = time.monotonic()
            own = {} if device in ("default", "cpu") else {"CUDA_VISIBLE_DEVICES": device}
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tuneavideo.web.worker", str(self.queue.root), device,
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env={**os.environ, **own},
            )  # fmt: skip
            self._processes[device] = process
            assert process.stdout, "it has a pipe"
            async for line in process.stdout:
                self._note(json.loads(line) | {"device": device})
            await process.wait()
            for number in [number for number, message in self.running.items() if message["device"] == device]:
                del self.running[number]
                self.publish(self.queue.get(number))
            wait = 0.2 if time.monotonic() - began > LONGEST_WAIT else min(2 * wait, LONGEST_WAIT)
            await asyncio.sleep(wait)

    def _note(self, message: dict[str, Any]) -> None:
        number = message["job"]
        if message["state"] == "running":
            once = {name: message.pop(name) for name in ("steps", "made") if name in message}
            self.running[number] = {**self.running.get(number, {}), **message}
            self.events.publish("job", self.running[number] | once)
        else:
            self.running.pop(number, None)
            self.publish(self.queue.get(number))


def _send(process: asyncio.subprocess.Process, message: dict[str, Any]) -> None:
    if process.stdin and not process.stdin.is_closing():
        process.stdin.write(json.dumps(message).encode() + b"\n")
