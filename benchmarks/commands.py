"""Time and peak memory of whole commands; writes benchmarks/results/cpu.json."""

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
    """Return the measured commands by name."""
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
    """Run a command once; return seconds, peak memory and its output as JSON."""
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen([sys.executable, "-m", "tuneavideo", *words], stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        out.seek(0)
        output = out.read().strip()
    if status:
        raise SystemExit(f"tuneavideo {' '.join(words)} failed")
    row: dict[str, object] = {"seconds": round(seconds, 2), "peak_mb": round(usage.ru_maxrss / 1024)}
    if output.startswith("{"):
        result = json.loads(output)
        steps = [json.loads(line) for line in (Path(result["run"]) / "steps.jsonl").read_text().splitlines()]
        middle = sorted(step["seconds"] for step in steps)[len(steps) // 2]
        size = (Path(result["run"]) / "adapter" / "adapter.safetensors").stat().st_size
        row |= {"steps": result["steps"], "median_step_seconds": round(middle, 3), "edits": len(result["edits"])}
        row |= {"adapter_mb": round(size / 1e6, 1)}
    return row


def measure(clip: Path, base: Path, only: list[str]) -> None:
    """Measure the commands; with `only`, the others keep their earlier figures.

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
