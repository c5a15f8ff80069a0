"""Whole commands, measured from outside: wall seconds and the largest resident memory (benchmarks/results/cpu.json)."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "cpu.json"
EDIT = "spider man is skiing on the beach, cartoon style"


def commands(clip: Path, base: Path, work: Path) -> dict[str, list[str]]:
    """The commands measured, by name."""
    tune = ["tune", str(clip), "--prompt", "a man is skiing", "--edit", EDIT]
    tiny = ["--base", str(base), "--num-frames", "4", "--resolution", "128", "--max-train-steps", "10"]
    return {
        "help": ["--help"],
        "tune-help": ["tune", "--help"],
        "demo": ["demo", "--out", str(work / "demo"), "--json"],
        "skiing-miniature": [*tune, "--out", str(work / "skiing"), "--json"],
        "skiing-sd15-sized": [*tune, *tiny, "--num-inference-steps", "10", "--num-inv-steps", "10",
                              "--out", str(work / "sized"), "--json"],
    }  # fmt: skip


def measured(words: list[str]) -> dict[str, object]:
    """Run the command line once; wall seconds, peak memory and what it printed as JSON."""
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen([sys.executable, "-m", "tuneavideo", *words], stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        out.seek(0)
        said = out.read().strip()
    if status:
        raise SystemExit(f"tuneavideo {' '.join(words)} failed")
    row: dict[str, object] = {"seconds": round(seconds, 2), "peak_mb": round(usage.ru_maxrss / 1024)}
    if said.startswith("{"):
        told = json.loads(said)
        steps = [json.loads(line) for line in (Path(told["run"]) / "steps.jsonl").read_text().splitlines()]
        middle = sorted(step["seconds"] for step in steps)[len(steps) // 2]
        size = (Path(told["run"]) / "adapter" / "adapter.safetensors").stat().st_size
        row |= {"steps": told["steps"], "median_step_seconds": round(middle, 3), "edits": len(told["edits"])}
        row |= {"adapter_mb": round(size / 1e6, 1)}
    return row


def measure(clip: Path, base: Path, only: list[str]) -> None:
    """Measure what the README names; commands that are not among `only` keep their last figures, if it names any.

    Args:
        clip: man-skiing.mp4 of the published code's data folder.
        base: Folder that `benchmarks.random_base` wrote.
        only: Names of commands.
    """
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    machine = (f"{os.cpu_count()} cores", platform.machine(), platform.system(), f"Python {platform.python_version()}")
    results["machine"] = ", ".join(machine)
    with tempfile.TemporaryDirectory() as work:
        for name, words in commands(clip, base, Path(work)).items():
            if not only or name in only:
                results[name] = measured(words)
                print(name, json.dumps(results[name]), flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
