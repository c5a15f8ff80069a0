"""Simulation of batches of 1,000 to 10 million clips from measured figures; writes benchmarks/results/scale.json.

    python -m benchmarks.scale

A job is a clip of 12 frames of 512 x 512, tuned with SD 1.5 for 500 steps and edited four times. Times are those of an
H200 in benchmarks/results, the driver's time and memory per job those of benchmarks/results/batch.json. What is not
measured is an assumption, and named as one in ASSUMED.
"""

from __future__ import annotations

import heapq
import json
import random
from dataclasses import dataclass
from typing import Any

from benchmarks.tables import RESULTS as FIGURES

EDITS, STEPS, SAMPLING, INJECTED = 4, 500, 50, 0.6
SCALES = {1_000: (1, 8, 64), 100_000: (64, 256, 1024), 10_000_000: (1024, 4096, 16384)}
SIMULATED = 200_000  # jobs that are simulated one by one; of a larger batch this many, and the rest by proportion
START, BANDWIDTH, OBJECTS, FAILURES, MEMORY = 34.0, 10.0, 3500.0, 50.0, 16.0
ASSUMED = {
    "seconds to start a worker: imports, base, cached kernels": START,
    "GB a second that the storage takes from the whole batch": BANDWIDTH,
    "objects a second that the storage takes: one bucket prefix": OBJECTS,
    "days of a GPU between two failures of its node": FAILURES,
    "GB of memory of the driver": MEMORY,
}
# Measured, in docs/performance.md: checkpoints and adapter of a run; sizes in MB of adapters and of a checkpoint.
SAVING, ADAPTER, LOW_RANK, CHECKPOINT = 3.0, 148.8, 4.85, 892.0
CHECKPOINTS = 2  # of 500 steps, uploaded while they are current


@dataclass(frozen=True)
class Work:
    """Seconds of a job on a GPU, and what it writes."""

    tune: float
    invert: float
    edit: float
    other: float

    @property
    def seconds(self) -> float:
        return self.tune + self.invert + self.edit + self.other


def measured() -> Work:
    """Return the times of a job, from the measurements on an H200."""
    rows = json.loads((FIGURES / "nvidia-h200-levers.json").read_text())["rows"]

    def ms(**fields: Any) -> float:
        return next(row for row in rows if fields.items() <= row.items())["ms"] / 1e3

    plain, injected = ms(session=2, task="edit", lever="+ text"), ms(session=2, task="injected", lever="+ shared")
    invert = ms(session=2, task="invert", how="recorded", lever="+ text")
    decode, encode = ms(session=1, task="decode", lever="before"), ms(session=1, task="encode", lever="before")
    one = SAMPLING * (INJECTED * injected + (1 - INJECTED) * plain)
    return Work(STEPS * ms(session=3, task="tune"), SAMPLING * invert, EDITS * one, SAVING + encode + EDITS * decode)


def kept_megabytes(adapter: float) -> float:
    """Return the size of a run: adapter, latents, trajectory of the inversion, clip and edits (an upper bound)."""
    latents, raw = 12 * 4 * 64 * 64 * 4 / 1e6, 3 * 12 * 512 * 512 / 1e6
    return adapter + 2 * latents + (SAMPLING + 1) * latents + 0.25 * raw * (1 + 3 * EDITS)


def simulate(jobs: int, gpus: int, work: Work, per_job: float) -> float:
    """Return the hours of a batch: the driver serves one worker at a time, and nodes fail.

    Args:
        jobs: Number of jobs.
        gpus: Number of workers.
        work: Seconds of a job.
        per_job: Seconds of the driver for each job.
    """
    part = min(1.0, SIMULATED / jobs)
    count, workers, chance = round(jobs * part), max(1, round(gpus * part)), random.Random(0)
    rate = 1 / (86400 * FAILURES)
    free, driver, last = [START] * workers, 0.0, 0.0
    heapq.heapify(free)
    for _ in range(count):
        ready = heapq.heappop(free)
        driver = max(driver, ready) + per_job * part  # of a part, the driver has as much less to do
        seconds = work.seconds
        if chance.random() < seconds * rate:  # half of the steps between two checkpoints are done again
            seconds += START + work.tune / CHECKPOINTS / 2
        last = max(last, driver + seconds)
        heapq.heappush(free, driver + seconds)
    return last / 3600


def row(jobs: int, gpus: int, work: Work, driver: dict[str, Any]) -> dict[str, Any]:
    """Return hours, storage and how far each shared part is used; the largest of these is the bottleneck."""
    per_job = (driver["seconds_per_job_and_worker"] - driver["seconds_of_a_job"]) / driver["workers"]
    memory = driver["driver_peak_mb"] / 1e3 / driver["jobs"]
    hours = simulate(jobs, gpus, work, per_job)
    kept, passing = jobs * kept_megabytes(ADAPTER) / 1e3, jobs * CHECKPOINTS * CHECKPOINT / 1e3
    rate = jobs / (hours * 3600)
    used = {
        "GPUs": rate * work.seconds / gpus,
        "driver's time": rate * per_job,
        "reading of the job file": rate * driver["seconds_to_read"] / driver["jobs"],
        "driver's memory": jobs * memory / MEMORY,
        "bandwidth of the storage": (kept + passing) / (hours * 3600) / BANDWIDTH,
        "objects per second": rate * (10 + 4 * EDITS + CHECKPOINTS) / OBJECTS,
    }
    shared = {name: value for name, value in used.items() if name != "GPUs"}
    first = max(shared, key=lambda name: shared[name])
    return {
        "clips": jobs, "gpus": gpus,
        "hours": round(max(hours, (kept + passing) / BANDWIDTH / 3600), 1),
        "hours_without_checkpoints": round(max(hours, kept / BANDWIDTH / 3600), 1),
        "gpu_hours": round(jobs * work.seconds / 3600),
        "tb": round(jobs * kept_megabytes(ADAPTER) / 1e6, 2),
        "tb_low_rank": round(jobs * kept_megabytes(LOW_RANK) / 1e6, 2),
        "used": {name: round(value, 4) for name, value in used.items()}, "first_bottleneck": first,
    }  # fmt: skip


def table(result: dict[str, Any]) -> list[str]:
    """Return the lines of the results in Markdown."""
    work, rows = Work(**result["job"]), result["rows"]
    lines = [
        f"One job takes {work.seconds:.1f} s of an H200: {work.tune:.1f} s of tuning, {work.invert:.1f} s of "
        f"inversion, {work.edit:.1f} s of four edits, {work.other:.1f} s of encoding, decoding, checkpoints and the "
        "adapter.",
        "",
        "| clips | GPUs | hours | hours, no checkpoints uploaded | GPU hours | storage, whole matrices | "
        "with `lora_rank: 16` | most used shared part |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in rows:
        part = each["first_bottleneck"]
        lines.append(
            f"| {each['clips']:,} | {each['gpus']:,} | {each['hours']:,} | {each['hours_without_checkpoints']:,} | "
            f"{each['gpu_hours']:,} | {each['tb']:,} TB | {each['tb_low_rank']:,} TB | "
            f"{part} ({each['used'][part]:.0%}) |"
        )
    assumed = [f"- {name}: {value:g}" for name, value in result["assumed"].items()]
    return [*lines, "", "Assumed, not measured:", "", *assumed]


def main() -> None:
    work, driver = measured(), json.loads((FIGURES / "batch.json").read_text())
    many = driver.get("many on ray") or driver["many"]
    rows = [row(jobs, gpus, work, many) for jobs, numbers in SCALES.items() for gpus in numbers]
    result = {"job": vars(work), "assumed": ASSUMED, "rows": rows}
    (FIGURES / "scale.json").write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(table(result)))


if __name__ == "__main__":
    main()
