"""Tables of README.md, docs and benchmarks/results/*.md, made from the JSON files of benchmarks/results.

    python -m benchmarks.tables --write      put the tables into the pages
    python -m benchmarks.tables --check      exit code 1, and the pages' names, if one is not up to date

A page names a table by a comment, `<!-- table: NAME ARGUMENTS -->`, which the table follows up to `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md", ROOT / "docs" / "batch.md")
BLOCK = re.compile(r"(<!-- table: (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)

Row = Mapping[str, Any]
BASES = {"sd15": "SD 1.5", "sd21": "SD 2.1", "xl": "SD XL", "miniature": "miniature"}
TASKS = {
    "tune": "tuning step",
    "invert": "inversion step",
    "edit": "guided denoising step",
    "inject": "guided denoising step with attention injection",
    "edits": "four edits in a tenth of the steps",
    "decode": "decoding the clip",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--write", action="store_true", help="put the tables into the pages")
    mode.add_argument("--check", action="store_true", help="exit with 1 if a page is not up to date")
    write = parser.parse_args().write
    pages = outdated()
    for page, text in pages.items():
        print(page.relative_to(ROOT))
        if write:
            page.write_text(text, encoding="utf-8")
    sys.exit(bool(pages) and not write)


def outdated() -> dict[Path, str]:
    """Return the pages whose tables differ from the JSON files, each with its new text."""
    current = {page: filled(page.read_text(encoding="utf-8")) for page in PAGES if page.is_file()}
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        if "machine" in result and isinstance(result.get("rows"), dict):
            current[path.with_suffix(".md")] = machine_page(result)
    return {page: text for page, text in current.items() if not page.is_file() or page.read_text("utf-8") != text}


def filled(text: str) -> str:
    """Return a page with its tables made anew."""

    def table(found: re.Match[str]) -> str:
        name, *arguments = found[2].split()
        return found[1] + "\n".join(TABLES[name](*arguments)) + "\n" + found[3]

    return BLOCK.sub(table, text)


def machine_page(result: Mapping[str, Any]) -> str:
    """Return all rows of one machine as a Markdown page."""
    return "\n".join([f"{result['machine']}", "", *row_table(result["rows"])]) + "\n"


def row_table(rows: Mapping[str, Row], tasks: Sequence[str] = ()) -> list[str]:
    """Return a table of benchmark rows, by default of all tasks; failed rows are named with their error."""
    names = [name for name, row in rows.items() if not tasks or row.get("task", "").removeprefix("reference-") in tasks]
    shares_cores = any(rows[name].get("busy_seconds") != rows[name].get("seconds") for name in names)
    columns = ["row", "time", *(["CPU time per core"] if shares_cores else []), "peak memory minus weights", "TFLOP"]
    columns += ["fraction of peak matmul throughput", "speedup over the baseline, same precision"]
    lines = [*_heading(columns)]
    for name in names:
        row = rows[name]
        if "failed" in row:
            lines.append(_line([name, f"failed: {row['failed']}", *[""] * (len(columns) - 2)]))
            continue
        busy = [_seconds(row["busy_seconds"])] if shares_cores else []
        lines.append(
            _line(
                [description(row), _seconds(row["seconds"]), *busy, _gib(row["peak_mb"] * 1e6), f"{row['tflop']:.3f}",
                 f"{row['share']:.0%}", _speedup(rows, name)]
            )
        )  # fmt: skip
    return lines


def description(row: Row) -> str:
    """Return what a row measured, in words."""
    task = row["task"].removeprefix("reference-")
    words = [
        f"{TASKS[task]}, {BASES.get(row['base'], row['base'])}, {row['frames']} x {row['pixels']}²",
        row["precision"],
    ]
    variants = {"checkpointing": "gradient checkpointing", "compiled": "compiled", "channels_last": "channels-last"}
    variants |= {"frozen": "down blocks frozen", "reused": "feature reuse", "fast": "preset `fast`"}
    words += [text for variant, text in variants.items() if row.get(variant)]
    words += [f"LoRAs of rank {rank}" for rank in [row.get("rank")] if rank]
    words += ["no attention injection"] * (not row.get("injected", True))
    words += [f"batch of {row['prompts']}"] * (row["prompts"] > 1)
    return f"{'*baseline:* ' if row['task'].startswith('reference-') else ''}{', '.join(words)}"


def speedup(rows: Mapping[str, Row], name: str, precision: str) -> tuple[float, list[float]] | None:
    """Return how many times as fast a row is as the baseline's: the median of the rounds, and each round.

    None for the baseline itself, and where either was not measured.
    """
    plain = re.sub(r"-(checkpointing|compiled|channels_last|reused|fast|not_injected|\d-prompts)", "", name)
    same = f"reference-{plain}"
    ours, theirs = rows[name], rows.get(same if precision != "fp32" else same.removesuffix("-bf16"))
    if not theirs or name.startswith("reference") or {"failed"} & (ours.keys() | theirs.keys()):
        return None
    as_many = 1 if ours["task"] == "edits" else ours["prompts"]
    rounds = [row.get("rounds", []) for row in (theirs, ours)]
    if len(rounds[0]) != len(rounds[1]) or not rounds[0]:
        rounds = [[row["busy_seconds"]] for row in (theirs, ours)]
    each = [their * as_many / our for their, our in zip(*rounds, strict=True)]
    return statistics.median(each), each


def _speedup(rows: Mapping[str, Row], name: str) -> str:
    found = speedup(rows, name, rows[name]["precision"])
    if found is None:
        return ""
    median, each = found
    return f"{median:.2f}x" + (f" ({', '.join(f'{ratio:.2f}' for ratio in each)})" if len(each) > 1 else "")


def _overview() -> Iterator[str]:
    """Yield README's table of time and memory."""
    commands = _read("cpu")
    yield from _heading(["what", "machine", "time", "peak memory", "baseline"])
    for name, what in {
        "demo": "`make demo`: 40 steps, four edits of 8 frames, miniature",
        "skiing-miniature": "`tuneavideo tune` with one edit, miniature, 8 frames, 40 steps",
    }.items():
        row = commands[name]
        yield _line([what, "2 CPU cores", _seconds(row["seconds"]), _gib(row["peak_mb"] * 2**20), ""])
    cpu, gpu = _read("2-cores-amx")["rows"], _read("nvidia-h200")["rows"]
    name = "tune-sd15-8x256-bf16"
    yield _line([description(cpu[name]), "2 CPU cores (AMX)", *_time_and_memory(cpu[name]),
                 ", ".join(_time_and_memory(cpu[f"reference-{name}"])).removesuffix(" *")])  # fmt: skip
    for name, row in _with_kernels().items():
        what = description(gpu[name] if name in gpu else gpu["edit-sd15-12x512-bf16"] | {"task": "inject"})
        theirs = gpu.get(f"reference-{name}")
        baseline = ", ".join(_time_and_memory(theirs)).removesuffix(" *") if theirs else ""
        yield _line([what, "H200", *_time_and_memory(row), baseline])


def _time_and_memory(row: Row) -> tuple[str, str]:
    return _seconds(row["seconds"]), f"{_gib(row['peak_mb'] * 1e6)} *" if "peak_mb" in row else ""


def _with_kernels() -> dict[str, Row]:
    """Return the rows of nvidia-h200-levers.json with all kernels, in the form of benchmark rows."""
    measured = _read("nvidia-h200-levers")["rows"]

    def row(**fields: Any) -> Row:
        found = next(each for each in measured if fields.items() <= each.items())
        held = found.get("held_gb", found["peak_gb"] if "step_memory" in found else None)
        peak = found.get("step_memory", 0) / 1e9 or found.get("peak_gb")
        return {"seconds": found["ms"] / 1e3} | ({} if held is None else {"peak_mb": round(1e3 * (peak - held))})

    return {
        "tune-sd15-12x512-bf16": row(session=3, task="tune"),
        "tune-sd15-24x512-checkpointing-bf16": row(session=2, task="tune", frames=24),
        "edit-sd15-12x512-bf16": row(session=2, task="edit", lever="+ text"),
        "inject-sd15-12x512-bf16": row(session=2, task="injected", lever="+ shared"),
    }


def _commands() -> Iterator[str]:
    yield from _heading(["command", "time", "peak memory", "steps", "median step", "adapter"])
    for name, row in _read("cpu").items():
        if name != "machine":
            steps = [""] * 3
            if "steps" in row:
                steps = [str(row["steps"]), _seconds(row["median_step_seconds"]), f"{row['adapter_mb']} MB"]
            yield _line([name, _seconds(row["seconds"]), _gib(row["peak_mb"] * 2**20), *steps])


def _estimates() -> Iterator[str]:
    kinds = {"checkpointing_gb": "gradient checkpointing", "plain_gb": "none"}
    kinds |= {f"kernels_{name}": f"{words}, Triton kernels" for name, words in kinds.items()}
    yield from _heading(["frames", *kinds.values()])
    for frames, row in _read("memory")["frames"].items():
        yield _line([frames, *(f"{row[name]} GB" for name in kinds)])


def _batch() -> Iterator[str]:
    """Yield the table of throughput and of what a driver takes."""
    found = _read("batch")
    yield from _heading(["what", "measured", "load of the two cores"])

    def load(row: Row) -> str:
        return " to ".join(map(str, row["load_before_and_after"]))

    for name, row in found.get("throughput", {}).items():
        if isinstance(row, dict):
            kept, alone = row["base kept"], row["a process each"]
            times = f"{kept['seconds']:.1f} s ({kept['cpu_seconds']:.1f} s of CPU) a job in a worker, "
            times += f"{alone['seconds']:.1f} s ({alone['cpu_seconds']:.1f} s) as a process: "
            ratios = f"{row['ratio of seconds']:.1f} times, of CPU time {row['ratio of cpu_seconds']:.1f} times"
            yield _line([f"miniature, {name}", times + ratios, load(found["throughput"])])
    for name in ("ray", "many", "many on ray"):
        if row := found.get(name):
            what = f"{row['jobs']:,} jobs of {row['seconds_of_a_job']:g} s" + ", Ray" * ("ray" in name)
            times = f"first job after {row['seconds_to_first_job']:.1f} s, "
            times += f"{1e3 * row['seconds_per_job_and_worker']:.0f} ms a job and worker, driver at most "
            yield _line([what, f"{times}{row['driver_peak_mb']:.0f} MB, {row['rows']:,} rows", load(row)])


def _scale() -> Iterator[str]:
    from benchmarks import scale

    yield from scale.table(_read("scale"))


def _startup() -> Iterator[str]:
    yield from _heading(["base", "imports", "loading the base", "rest, up to the first step"])
    for name, row in _read("startup").items():
        if name != "packages":
            yield _line([name, *(_seconds(row[part]) for part in ("imports", "loading", "rest"))])


def _packages() -> Iterator[str]:
    """Yield the fraction of each package in the time of the imports."""
    times = _read("startup")["packages"]
    whole = times.pop("tuneavideo.jobs.tune")
    yield from _heading(["package, with what it imports first", "fraction of the imports"])
    for name, seconds in times.items():
        yield _line([f"`{name}`", f"{seconds / whole:.0%}"])


def _windows() -> Iterator[str]:
    yield from _heading(["windows", "at borders", "inside", "standard error at borders"])
    names = {"whole": "none: the whole clip at once", "overlap 2, moving": "overlap 2, moving (the default)"}
    for name, row in _read("windows")["seams"]["rows"].items():
        figures = (row[part] for part in ("border", "inside", "error_of_border"))
        yield _line([names.get(name, name), *(f"{figure:.2f}" for figure in figures)])


def _rows(file: str, *tasks: str) -> Iterable[str]:
    result = _read(file)
    return [f"{result['machine']}:", "", *row_table(result["rows"], tasks)]


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _heading(columns: Sequence[str]) -> Iterator[str]:
    yield _line(columns)
    yield "|" + "---|" * len(columns)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _seconds(value: float) -> str:
    return f"{value:#.3g} s" if value < 100 else f"{value:.0f} s"


def _gib(size: float) -> str:
    """Return bytes in GiB."""
    return f"{size / 2**30:.2f} GiB"


TABLES: dict[str, Callable[..., Iterable[str]]] = {
    "overview": _overview,
    "commands": _commands,
    "estimates": _estimates,
    "startup": _startup,
    "packages": _packages,
    "windows": _windows,
    "rows": _rows,
    "batch": _batch,
    "scale": _scale,
}

if __name__ == "__main__":
    main()
