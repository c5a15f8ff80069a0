"""Time of the page: its start, its answers, its events and cancelling, on the miniature.

python -m benchmarks.page
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

from tests.page_server import BRIEF, Server, served
from tests.test_page_chaos import listening

LISTENERS = 200


def main() -> None:
    """Print each figure as a line of JSON."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("first start", "second start"):
            with served(Path(folder)) as server:
                server.send("/")
                show(name, seconds=time.monotonic() - server.began)
        with served(Path(folder)) as server:
            measure_jobs(server)


def measure_jobs(server: Server) -> None:
    """Measure answers, events and training with and without listeners, and cancelling."""
    server.send("/clips/dog-jumping/tune", BRIEF | {"max_train_steps": "2000"})
    while server.jobs()[1].get("stage") != "tune":
        time.sleep(0.2)
    show("one listener", **paces(server), answer=answer(server))
    streams = [listening(server) for _ in range(LISTENERS)]
    show(f"{LISTENERS} listeners", **paces(server), answer=answer(server))
    for stream in streams:
        stream.close()
    began = time.monotonic()
    server.send("/jobs/1/cancel", {})
    show("cancel", seconds=time.monotonic() - began, state=server.jobs()[1]["state"])


def paces(server: Server, seconds: float = 20) -> dict[str, float]:
    """Return the steps per second of the job that runs, and the longest time between two new numbers."""
    first, began = server.jobs()[1]["number"], time.monotonic()
    changed, longest, last = began, 0.0, first
    while time.monotonic() - began < seconds:
        number = server.jobs()[1]["number"]
        if number != last:
            longest, changed, last = max(longest, time.monotonic() - changed), time.monotonic(), number
        time.sleep(0.1)
    return {"steps_per_second": (last - first) / (changed - began), "longest_gap": longest}


def answer(server: Server, count: int = 20) -> float:
    """Return the median time of the gallery, in seconds."""
    times = []
    for _ in range(count):
        began = time.monotonic()
        assert server.send("/")[0] == 200
        times.append(time.monotonic() - began)
    return statistics.median(times)


def show(name: str, **figures: float | str) -> None:
    rounded = {key: round(value, 3) if isinstance(value, float) else value for key, value in figures.items()}
    print(json.dumps({"what": name, **rounded}), flush=True)


if __name__ == "__main__":
    main()
