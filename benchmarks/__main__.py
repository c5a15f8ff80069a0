"""Time, memory and operations of tuning and editing; writes benchmarks/results/<machine>.json and a table.

    python -m benchmarks [ROW ...] [--all] [--rounds 3] [--tiny] [--list] [--device cuda] [--name h100]
    python -m benchmarks --commands man-skiing.mp4 [NAME ...]      whole commands, as the README names them

Each row runs in its own process, with --one-process all in one, which saves time. Rows that are not measured now keep
their figures; ratios to the previous figures are printed. Of several rounds, in each of which every row is run, the
median is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.tables import machine_page, speedup

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="names of rows; by default the default set")
    parser.add_argument("--all", action="store_true", help="every row (hours)")
    parser.add_argument("--list", action="store_true", help="print the rows' names")
    parser.add_argument("--rounds", type=int, default=1, help="how often the rows are run, in turn")
    parser.add_argument("--one-process", action="store_true", help="run all rows in this process")
    parser.add_argument("--tiny", action="store_true", help="every base at a tiny size, to see that it runs")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--set", default="cpu", choices=("cpu", "gpu"), help="which registry of rows")
    parser.add_argument("--name", help="of the result; by default the machine's")
    parser.add_argument("--commands", type=Path, metavar="CLIP", help="measure whole commands with this clip")
    parser.add_argument("--base", type=Path, default=Path("build/sd15-sized"), help="of --commands; see random_base")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(_in_this_process(options.here, options.device, options.tiny)))
        return
    if options.commands:
        from benchmarks import commands

        commands.measure(options.commands, options.base, options.rows)
        return
    rows = _chosen(options)
    if options.list:
        print("\n".join(rows))
        return
    path = RESULTS / f"{options.name or machine_name(options.device)}{'-tiny' if options.tiny else ''}.json"
    before = json.loads(path.read_text()) if path.is_file() else {"rows": {}}
    result: dict[str, Any] = {"machine": machine(options.device), "rows": dict(before["rows"])}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in rows}
    for name in rows * options.rounds:
        run = _caught if options.one_process else _in_own_process
        row = run(name, options.device, options.tiny)
        found[name].append(row)
        result["rows"][name] = _median(found[name])
        print(f"{name:48} {_summary(row)}{_ratio_to(row, before['rows'].get(name))}", flush=True)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        path.with_suffix(".md").write_text(machine_page(result))
    print("\n".join(comparisons(result["rows"])))
    print(path)


def _chosen(options: argparse.Namespace) -> list[str]:
    known = _rows(options.set)
    if not options.rows:
        return [name for name, row in known.items() if options.all or row.default]
    for name in options.rows:
        if name not in known:
            raise SystemExit(f"no row is named {name!r}; --list names them")
    return options.rows


def _rows(which: str) -> dict[str, Any]:
    from benchmarks.rows import GPU_ROWS, ROWS

    return GPU_ROWS if which == "gpu" else ROWS


def _caught(name: str, device: str, tiny: bool) -> dict[str, Any]:
    """Run a row in this process; an error is its result."""
    try:
        return _in_this_process(name, device, tiny)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:300]}


def _in_this_process(name: str, device: str, tiny: bool) -> dict[str, Any]:
    from benchmarks.rows import GPU_ROWS, ROWS, described, matmul_rate, measured

    row = (ROWS | GPU_ROWS)[name]
    if tiny:
        row = replace(row, base="tiny", frames=min(row.frames, 4), pixels=64)
    rate = matmul_rate(device, row.precision)
    figures = measured(row, device=device)
    rate = max(rate, matmul_rate(device, row.precision))
    share = figures["gflop_per_second"] * 1e9 / rate
    return described(row) | figures | {"matmul_gflop_per_second": round(rate / 1e9), "share": round(share, 3)}


def _in_own_process(name: str, device: str, tiny: bool) -> dict[str, Any]:
    words = [sys.executable, "-W", "ignore", "-m", "benchmarks", "--here", name, "--device", device]
    done = subprocess.run([*words, *(["--tiny"] if tiny else [])], capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return {"failed": last[0][:300]}
    load = os.getloadavg()[0]
    return json.loads(done.stdout.strip().splitlines()[-1]) | {"load": round(load, 1)}


def _median(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the round with the median time, with the times of all rounds; the last round if any failed."""
    if any("failed" in row for row in rounds):
        return rounds[-1]
    ordered = sorted(rounds, key=lambda row: row["busy_seconds"])
    return ordered[len(ordered) // 2] | {"rounds": [row["busy_seconds"] for row in rounds]}


def _summary(row: dict[str, Any]) -> str:
    if "failed" in row:
        return row["failed"]
    return (
        f"{row['seconds']:8.3f} s ({row['busy_seconds']:.3f} s of CPU time per core)  {row['peak_mb']:6d} MB  "
        f"{row['tflop']:8.3f} TFLOP  {row['gflop_per_second']:8.1f} GFLOP/s  {row['share']:4.0%} of peak matmul rate"
    )


def _ratio_to(row: dict[str, Any], last: dict[str, Any] | None) -> str:
    if not last or "failed" in row or "failed" in last:
        return ""
    return f"  x{row['busy_seconds'] / last['busy_seconds']:.2f} of the previous time"


def comparisons(rows: dict[str, Any]) -> list[str]:
    """Return the speedups over the baseline in the same and in full precision, wherever both were measured."""
    lines = []
    for name, ours in rows.items():
        for precision in dict.fromkeys((ours.get("precision", "fp32"), "fp32")):
            if found := speedup(rows, name, precision):
                median, each = found
                rounds = f" ({', '.join(f'{ratio:.2f}' for ratio in each)})" if len(each) > 1 else ""
                lines.append(f"{name}: {median:.2f}x speedup{rounds} over the baseline in {precision}")
    return lines


def machine(device: str) -> str:
    import torch

    cores = f"{os.cpu_count()} cores, {platform.machine()}{_bf16() and f' with {_bf16()}'}"
    what = torch.cuda.get_device_name() if device == "cuda" else cores
    return f"{what}, {platform.system()}, Python {platform.python_version()}, torch {torch.__version__}"


def machine_name(device: str) -> str:
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} cores {_bf16()}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _bf16() -> str:
    """Return the name of the instructions by which this CPU computes bf16; empty if it has none."""
    import torch

    has = getattr(torch.cpu, "get_capabilities", dict)()
    known = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16"}
    return next((name for flag, name in known.items() if has.get(flag)), "")


if __name__ == "__main__":
    main()
