"""Throughput of batches, and what the driver of a large one takes; writes benchmarks/results/batch.json.

    python -m benchmarks.batch throughput [--jobs 6]     base kept against a process for each job, on the miniature
    python -m benchmarks.batch ray [--jobs 200]          Ray's time per job, by jobs that do nothing
    python -m benchmarks.batch many [--jobs 10000] [--ray]     start-up, memory and results of many jobs that sleep

Times of a machine with other load differ; the load is recorded beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from tuneavideo import miniature
from tuneavideo.batch.batch import Batch
from tuneavideo.batch.job_file import BatchJob

RESULTS = Path(__file__).parent / "results/batch.json"
STUB = "benchmarks.batch:stub"
SIZES = {
    "5 steps, one edit of 5 steps": {"max_train_steps": 5, "num_inference_steps": 5},
    "40 steps, one edit of 25 steps": {},
}


def stub(job: BatchJob, root: str, scores: bool, stopping: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """Sleep for the seconds that the prompt names."""
    time.sleep(float(job.settings.prompt))
    row = {"job": job.id, "run": job.name, "state": "done", "video": job.video, "prompt": job.settings.prompt}
    yield {"state": "done", "rows": [row], "seconds": float(job.settings.prompt)}


def throughput(count: int, sizes: int) -> dict[str, Any]:
    """Compare the time and CPU time of a job in a worker and in a process of its own."""
    clip, found = miniature.clips()[0], dict[str, Any]()
    for name, settings in [*SIZES.items()][:sizes]:
        edit = {"edit": [clip["edits"][0]["prompt"]]}
        common = {"video": str(clip["path"]), "prompt": clip["caption"], "stride": 2, "num_frames": 8}
        with tempfile.TemporaryDirectory() as place:
            file = Path(place, "jobs.json.yaml")
            file.write_text(json.dumps({"clips": [common | edit | settings], "grid": {"seed": [*range(count + 1)]}}))
            batch, ends, cpu = Batch.of(file, place), list[float](), list[float]()
            for message in batch.run(batch.runner([*batch.jobs.values()], workers=1)):
                if message and message["state"] == "done":
                    ends.append(time.perf_counter())
                    cpu.append(sum(_cpu(child) for child in psutil.Process().children(recursive=True)))
            assert len(ends) == count + 1, batch.failures()
            kept = {"seconds": (ends[-1] - ends[0]) / count, "cpu_seconds": (cpu[-1] - cpu[0]) / count}
            alone = [_alone(common | edit | settings, Path(place, f"alone-{number}")) for number in range(3)]
        own = {key: statistics.median(each[key] for each in alone) for key in ("seconds", "cpu_seconds")}
        found[name] = {"base kept": kept, "a process each": own, "jobs": count}
        found[name] |= {f"ratio of {key}": own[key] / kept[key] for key in own}
    return found


def _alone(values: dict[str, Any], out: Path) -> dict[str, float]:
    """Run a job by the command `tune`, as a process of its own."""
    words = [sys.executable, "-m", "tuneavideo", "tune", values["video"], "--out", str(out), "--json"]
    for name, value in values.items():
        if name != "video":
            words += [f"--{name.replace('_', '-')}", str(value[0] if isinstance(value, list) else value)]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(words, check=True, capture_output=True)
    after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - began
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu}


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def many(count: int, seconds: float, address: str | None) -> dict[str, Any]:
    """Run jobs that sleep, and measure the driver."""
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, "jobs.csv")
        lines = [f"{number}.mp4,{seconds},a cat|a fox,{number % 7}" for number in range(count)]
        file.write_text("\n".join(["video,prompt,edit,seed", *lines]))
        began = time.perf_counter()
        batch = Batch.of(file, place)
        due = batch.due()
        read = time.perf_counter() - began
        runner, first, ends = batch.runner(due, ray=address, workers=2, work=STUB), 0.0, list[float]()
        for message in batch.run(runner):
            now = time.perf_counter() - began
            first = first or (now if message and message["state"] == "running" else 0.0)
            if message and message["state"] == "done":
                ends.append(now)
        from pyarrow import parquet

        rows = parquet.read_table(Path(place, "results.parquet")).to_pylist()
    assert len({row["job"] for row in rows if row["state"] == "done"}) == count, "the results are complete"
    half = len(ends) // 2
    return {
        "jobs": count, "seconds_of_a_job": seconds, "workers": 2, "seconds_to_read": read,
        "seconds_to_first_job": first,
        "seconds_to_first_result": ends[0], "seconds": ends[-1], "rows": len(rows),
        "seconds_per_job_and_worker": (ends[-1] - ends[half]) / (len(ends) - 1 - half) * 2,
        "driver_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }  # fmt: skip


def in_cluster(work: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """Do work on a Ray cluster of two nodes on this machine."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    words = [sys.executable, "-m", "benchmarks.batch", "cluster"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as cluster:
        assert cluster.stdin and cluster.stdout, "it has pipes"
        try:
            return work(cluster.stdout.readline().strip())
        finally:
            cluster.stdin.close()


def cluster() -> None:
    """Keep a cluster until stdin ends; it is a process of its own so that its memory is not the driver's."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    made = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    made.add_node(**node)
    print(made.address, flush=True)
    sys.stdin.read()
    made.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("throughput", "ray", "many", "cluster"))
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="of throughput: number of sizes of a job")
    parser.add_argument("--ray", action="store_true", help="run many jobs on a Ray cluster")
    options = parser.parse_args()
    if options.what == "cluster":
        return cluster()
    name, load = options.what, [round(os.getloadavg()[0], 1)]
    if options.what == "throughput":
        found = throughput(options.jobs or 6, options.sizes)
    elif options.what == "ray":
        found = in_cluster(lambda address: many(options.jobs or 200, 0.0, address))
        found["fraction_of_a_job_of_30_s"] = found["seconds_per_job_and_worker"] / 30
    elif options.ray:
        name, found = "many on ray", in_cluster(lambda address: many(options.jobs or 10_000, 0.02, address))
    else:
        found = many(options.jobs or 10_000, 0.02, None)
    load.append(round(os.getloadavg()[0], 1))
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    results[name] = found | {"load_before_and_after": load, "cores": os.cpu_count()}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results[name], indent=1))


if __name__ == "__main__":
    main()
