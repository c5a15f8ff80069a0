"""A job on the terminal: its progress, what it made, and how to go on when it is stopped."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

from tuneavideo.progress import Job, Progress


class Show:
    """Progress of a job on the terminal; the first Ctrl-C ends the job after the step at hand."""

    def __init__(self, quiet: bool, resumable: bool = True) -> None:
        self.resumable = resumable
        self.quiet = quiet or os.environ.get("RANK", "0") != "0"
        self.interrupted = self.broken_off = False
        self.done: dict[str, Any] = {"run": None, "edits": [], "files": []}
        self.tasks: dict[str, Any] = {}
        self.at = ("", "")
        self.began = time.perf_counter()

    def run(self, job: Job) -> dict[str, Any]:
        """Run the job to its end; returns the run folder, the edits and other files it made."""
        from tuneavideo import opening

        opening.hush()
        before = signal.signal(signal.SIGINT, self._interrupt)
        try:
            with self._bar() as bar:
                for each in job:
                    self._show(bar, each)
                    self._note(bar, each)
                    if self.interrupted:
                        job.close()
                        break
        except KeyboardInterrupt:
            job.close()
        except Exception:
            if not self.broken_off:
                raise
        finally:  # a late press must not hide how to go on
            signal.signal(signal.SIGINT, signal.SIG_IGN if self.interrupted else before)
        if self.interrupted:
            stopped(self.done["run"] if self.resumable else None)
        return self.done | {"seconds": round(time.perf_counter() - self.began, 1)}

    def _interrupt(self, *_: Any) -> None:
        if self.interrupted:
            self.broken_off = True  # libraries make errors of their own of it: torch, of a file not written to its end
            raise KeyboardInterrupt
        self.interrupted = True
        os.write(2, b"stopping after the step at hand; Ctrl-C again stops at once\n")  # print cannot be used in here

    def _bar(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description:<8}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        return Bar(
            *columns, TextColumn("{task.fields[note]}"), console=console, disable=self.quiet or not console.is_terminal
        )

    def _show(self, bar: Any, each: Progress) -> None:
        """One bar per stage, begun anew for every prompt."""
        name = (each.stage, each.about if each.stage in ("edit", "preview") else "")
        if each.total:
            if each.stage not in self.tasks:
                self.tasks[each.stage] = bar.add_task(each.stage, total=each.total, note="")
            elif name != self.at and each.stage != "tune":
                bar.reset(self.tasks[each.stage], total=each.total)
            self.at = name
            bar.update(self.tasks[each.stage], completed=each.number, note=_told(each))
            if bar.disable and each.number * 10 // each.total > (each.number - 1) * 10 // each.total:
                self._say(bar, f"{each.stage} {each.number}/{each.total} {_told(each)}")

    def _say(self, bar: Any, line: str) -> None:
        if not self.quiet:
            bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _note(self, bar: Any, each: Progress) -> None:
        if each.step:
            self.done |= {"steps": each.step.number, "loss": each.step.loss}
        if each.stage == "memory":
            self._say(bar, each.about)
        if not each.path:
            return
        if each.stage in ("open", "encode", "tune"):
            self.done["run"] = str(each.path)
        else:
            self.done["edits" if each.stage == "edit" else "files"].append(str(each.path))
        if each.stage != "open":  # a mistake found in opening takes the folder away again
            self._say(bar, f"{_MADE[each.stage]}: {each.path}")


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


def _told(each: Progress) -> str:
    if each.step is None:
        return each.about
    rate, memory = 1 / each.step.seconds, each.step.memory / 2**30
    return f"loss {each.step.loss:.4f}  {rate:.1f} steps/s  {memory:.1f} GiB"


def report_done(as_json: bool, done: Mapping[str, Any], **more: Any) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        print(json.dumps({**done, **more}))
    else:
        where = more.get("picture") or done["run"] or (done["edits"] or done["files"])[-1]
        print(f"done in {done['seconds']:.0f} s: {where}")


def stopped(run: str | None = None) -> None:
    """Exit code 130: stopped by Ctrl-C."""
    how = f"tuneavideo tune --resume {shlex.quote(run)}" if run else "the same command"
    print(f"tuneavideo: stopped; go on with: {how}", file=sys.stderr)
    raise SystemExit(130)
