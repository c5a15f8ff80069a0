"""Time of the page: its start, its answers, its events and cancelling, on the miniature.

python -m benchmarks.page
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from tests.page_server import BRIEF, Server, served
from tests.test_page_chaos import listening

LISTENERS = 200
SECONDS, TURNS = 60.0, 6  # with and without listeners, in turns, since the load of a computer changes


def main() -> None:
    """Print each figure as a line of JSON, with the computer's load beside it."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("first start", "second start", "third start"):
            with served(Path(folder)) as server:
                server.send("/")
                seconds = time.monotonic() - server.began
                times = psutil.Process(server.process.pid).cpu_times()
                show(name, seconds=seconds, cpu_seconds=times.user + times.system)
        with served(Path(folder)) as server:
            measure_whole_job(server)
            measure_listeners(server)


def measure_whole_job(server: Server) -> None:
    """Measure the time between events of a job from its request to its end: loading, training, an edit."""
    gaps, edit = Gaps(server), {"edit": "a cat is jumping on the grass"}
    server.send("/clips/dog-jumping/tune", BRIEF | {"max_train_steps": "60", "num_inference_steps": "20"} | edit)
    server.wait(1, ("running",))
    gaps.begin()
    server.wait(1)
    show("events of a job", longest_gap=gaps.longest(), events=len(gaps.times))


def measure_listeners(server: Server) -> None:
    """Measure answers, events and training with one and with many listeners in turns, and cancelling."""
    gaps = Gaps(server)
    server.send("/clips/dog-jumping/tune", BRIEF | {"max_train_steps": "9000"})
    while last_job(server).get("stage") != "tune":
        time.sleep(0.2)
    paces = {1: list[dict[str, float]](), LISTENERS: list[dict[str, float]]()}
    for count in (1, LISTENERS) * TURNS:
        streams = [listening(server) for _ in range(count)]
        threading.Thread(target=drain, args=(streams,), daemon=True).start()
        gaps.begin()
        made = pace(server, SECONDS / TURNS) | {"answer": answer(server), "longest_gap": gaps.longest()}
        paces[count].append(made)
        show(f"{count} listeners", **made)
        for stream in streams:
            stream.shutdown(socket.SHUT_RDWR)
    cpu = {count: statistics.median(each["cpu_per_step"] for each in made) for count, made in paces.items()}
    steps = {count: statistics.median(each["steps_per_second"] for each in made) for count, made in paces.items()}
    by_cpu, by_clock = cpu[LISTENERS] / cpu[1] - 1, steps[1] / steps[LISTENERS] - 1
    show("training with listeners", slower_by_cpu=by_cpu, slower_by_clock=by_clock)
    began = time.monotonic()
    server.send(f"/jobs/{last_job(server)['job']}/cancel", {})
    show("cancel", seconds=time.monotonic() - began, state=last_job(server)["state"])


def last_job(server: Server) -> dict[str, Any]:
    jobs = server.jobs()
    return jobs[max(jobs)]


class Gaps:
    """A browser that notes when events of jobs arrive."""

    def __init__(self, server: Server) -> None:
        self.times = list[float]()
        threading.Thread(target=self._listen, args=(listening(server),), daemon=True).start()

    def begin(self) -> None:
        self.times = [time.monotonic()]

    def longest(self) -> float:
        """Return the longest time between two events since `begin`, in seconds."""
        return max(b - a for a, b in zip(self.times, self.times[1:], strict=False))

    def _listen(self, stream: socket.socket) -> None:
        for part in parts(stream):
            if b"event: job" in part:
                self.times.append(time.monotonic())


def parts(stream: socket.socket) -> Iterator[bytes]:
    while part := stream.recv(2**16):
        yield part


def drain(streams: list[socket.socket]) -> None:
    """Read streams as browsers do, until they are closed; in one thread, which takes little time from the job."""
    with selectors.DefaultSelector() as selector:
        for stream in streams:
            selector.register(stream, selectors.EVENT_READ, stream)
        while selector.get_map():
            for key, _ in selector.select():
                if not key.data.recv(2**16):
                    selector.unregister(key.data)


def pace(server: Server, seconds: float) -> dict[str, float]:
    """Return the steps per second of the job that runs, and the CPU time that it, server and readers take."""
    processes = [server.workers()[0], psutil.Process(server.process.pid), psutil.Process()]

    def state() -> tuple[float, list[float]]:
        return last_job(server)["number"], [sum(each.cpu_times()[:2]) for each in processes]

    began, (first, before) = time.monotonic(), state()
    time.sleep(seconds)
    passed, (last, after) = time.monotonic() - began, state()
    worker, own, readers = (b - a for a, b in zip(before, after, strict=True))
    return {
        "steps_per_second": (last - first) / passed, "cpu_per_step": worker / (last - first),
        "server_cpu_per_second": own / passed, "reader_cpu_per_second": readers / passed,
    }  # fmt: skip


def answer(server: Server, count: int = 20) -> float:
    """Return the median time of the gallery, in seconds."""
    times = []
    for _ in range(count):
        began = time.monotonic()
        assert server.send("/")[0] == 200
        times.append(time.monotonic() - began)
    return statistics.median(times)


def show(name: str, **figures: Any) -> None:
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in figures.items()}
    print(json.dumps({"what": name, **rounded, "load": round(os.getloadavg()[0], 1)}), flush=True)


if __name__ == "__main__":
    main()
