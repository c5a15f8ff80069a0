"""Jobs on the terminal: progress bars, results, and interruption."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

from tuneavideo.job import Job
from tuneavideo.jobs.plan import TOY
from tuneavideo.progress import Events, Progress, Step, TimeLeft

WIDE = 100  # columns from which bars are long


class Show:
    """Progress of a job on the terminal; the first Ctrl-C or SIGTERM ends the job after the current step."""

    def __init__(self, quiet: bool, resumable: bool = True) -> None:
        self.resumable = resumable
        self.quiet = quiet or os.environ.get("RANK", "0") != "0"
        self.interrupted, self.broken_off = 0, False  # number of the first signal; whether there was a second
        self.done: dict[str, Any] = {"run": None, "edits": [], "files": []}
        self.tasks: dict[str, Any] = {}
        self.at = ("", "")
        self.time_left = TimeLeft()
        self.began = time.perf_counter()

    def run(self, job: Job | Events) -> dict[str, Any]:
        """Run the job to its end, and return the run folder, the edits and other files by name."""
        before = {each: signal.signal(each, self._interrupt) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            with self._bar() as bar:
                for number, each in enumerate(job):
                    self.time_left.note(each, time.perf_counter())
                    self._show(bar, each)
                    self._note(bar, each)
                    if not number:  # the line on the base is shown before libraries are loaded
                        from tuneavideo.models import quiet

                        quiet.silence_libraries()
                    if self.interrupted:
                        job.close()
                        break
        except KeyboardInterrupt:
            job.close()
        except Exception:
            if not self.broken_off:
                raise
        finally:  # another Ctrl-C must not interrupt the advice
            for each, handler in before.items():
                signal.signal(each, signal.SIG_IGN if self.interrupted else handler)
        if self.interrupted:
            stopped(self.done["run"] if self.resumable else None, self.interrupted)
        return self.done | {"seconds": round(time.perf_counter() - self.began, 1)}

    def _interrupt(self, number: int, _: Any) -> None:
        if self.interrupted:
            self.broken_off = True  # libraries may raise another error: torch does for a file that is cut short
            raise KeyboardInterrupt
        self.interrupted = number
        os.write(
            2, b"stopping after the current step; Ctrl-C again stops at once\n"
        )  # print is not safe in a signal handler

    def _bar(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar
        from rich.table import Column

        console, whole = Console(stderr=True), Column(no_wrap=True)
        rest = Column(no_wrap=True, overflow="ellipsis", ratio=1)  # the remaining width
        return Bar(
            TextColumn("{task.description:<8}", markup=False, table_column=whole),
            BarColumn(bar_width=40 if console.width >= WIDE else 12),
            MofNCompleteColumn(table_column=whole),
            TextColumn("{task.fields[left]}", markup=False, table_column=whole),
            TextColumn("{task.fields[note]}", markup=False, table_column=rest),
            console=console, expand=True, disable=self.quiet or not console.is_terminal,
        )  # fmt: skip

    def _show(self, bar: Any, each: Progress) -> None:
        """Update the bar of the stage, which is reset for every prompt."""
        name = (each.stage, each.about if each.stage in ("edit", "preview") else "")
        if each.total and not each.path:
            if each.stage not in self.tasks:
                for task in self.tasks.values():
                    bar.update(task, left="")
                self.tasks[each.stage] = bar.add_task(each.stage, total=each.total, note="", left="")
            elif name != self.at and each.stage != "tune":
                bar.reset(self.tasks[each.stage], total=each.total)
            self.at = name
            left = clock(self.time_left.seconds())
            bar.update(self.tasks[each.stage], completed=each.number, note=_details(each), left=left)
            if bar.disable and each.number * 10 // each.total > (each.number - 1) * 10 // each.total:
                self._print(
                    bar, "  ".join(filter(None, (f"{each.stage} {each.number}/{each.total}", left, _details(each))))
                )

    def _print(self, bar: Any, line: str) -> None:
        if not self.quiet:
            bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _note(self, bar: Any, each: Progress) -> None:
        if each.step:
            self.done |= {"steps": each.step.number, "loss": each.step.loss}
        if each.stage in ("plan", "memory") and each.about:
            self._print(bar, each.about)
        if each.stage == "open":
            self.done["base"] = each.about
        if not each.path:
            return
        if each.stage in ("open", "encode", "tune"):
            self.done["run"] = str(each.path)
        else:
            self.done["edits" if each.stage == "edit" else "files"].append(str(each.path))
        if each.stage != "open":  # the folder is removed if loading fails
            self._print(bar, f"{_MADE[each.stage]}: {each.path}")


_MADE = {
    "encode": "run",
    "tune": "tuned",
    "preview": "preview",
    "invert": "inversion",
    "edit": "edit",
    "picture": "picture",
    "evaluate": "scores",
    "results": "results",
}


def _details(each: Progress) -> str:
    if each.step is None:
        return " ".join(each.about.split())
    relative = each.step.relative_loss
    ratio = "" if relative is None else f" ({relative:.2f} of untuned)"
    return f"loss {each.step.loss:.4f}{ratio}  {_pace(each.step)}  {each.step.memory / 2**30:.1f} GiB"


def _pace(step: Step) -> str:
    return f"{1 / step.seconds:.1f} steps/s" if step.seconds < 1 else f"{step.seconds:.1f} s/step"


def clock(seconds: float | None) -> str:
    """Format the time left; empty if it is unknown."""
    if seconds is None:
        return ""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02} left" if hours else f"{minutes}:{seconds:02} left"


def report_done(as_json: bool, done: Mapping[str, Any], **more: Any) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        print(json.dumps({**done, **more}))
    else:
        made = [*done["edits"], *done["files"]]
        where = more.get("picture") or (made[0] if len(made) == 1 and "steps" not in done else done["run"] or made[-1])
        print(f"done in {done['seconds']:.0f} s: {where}")
        if done.get("base") == "miniature":
            print(f"(miniature is {TOY})")


def stopped(run: str | None = None, number: int = signal.SIGINT) -> None:
    """Exit with 128 plus the signal's number, 130 after Ctrl-C and 143 after SIGTERM, and print how to continue."""
    how = f"tuneavideo tune --resume {shlex.quote(run)}" if run else "the same command"
    print(f"tuneavideo: stopped; go on with: {how}", file=sys.stderr)
    raise SystemExit(128 + number)
