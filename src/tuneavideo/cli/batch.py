"""The command `batch`: a job file on this machine or on a Ray cluster, with a live table."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tuneavideo.cli import arguments
from tuneavideo.cli.console import stopped
from tuneavideo.errors import RunError

if TYPE_CHECKING:
    from tuneavideo.batch.batch import Batch
    from tuneavideo.batch.pool import Message, Runner

ROWS = 20  # workers that the table shows, and failed jobs that are printed
EXAMPLE = """\
A job file has clips, settings of all clips, and values to combine; names are those of the options of 'tune':

  defaults: {base: sd1.5, max_train_steps: 300}
  clips:
    - {video: dog.mp4, prompt: a dog is running, edit: [a cat is running, a fox is running]}
    - {video: car.mp4, prompt: a car drives, edit: [a bus drives], seed: 3}
  grid: {learning_rate: [1e-5, 3e-5]}

A CSV file has a row for each job and a column for each setting; '|' separates prompts. See docs/batch.md."""


def batch(argv: Sequence[str]) -> None:
    """Tune and edit many clips, as a job file says, here or on a Ray cluster; a stopped batch continues."""
    made = arguments.parser("batch", batch.__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.epilog = EXAMPLE
    made.add_argument("jobs", metavar="JOBS", help="Job file, .yaml or .csv.")
    made.add_argument("--out", metavar="DIR_OR_URL", help="Folder of the runs. By default runs/NAME of the job file.")
    made.add_argument("--dry-run", action="store_true", help="Print what would run, with hours and disk space.")
    made.add_argument("--retry", action="store_true", help="Run jobs that failed once more.")
    made.add_argument("--scores", action="store_true", help="Score the edits, as 'evaluate' does.")
    made.add_argument(
        "--workers", type=arguments.count, metavar="N", help="Number of workers. By default one a device."
    )
    made.add_argument(
        "--ray", metavar="ADDRESS", default=os.environ.get("RAY_ADDRESS"),
        help="Ray cluster to run on: auto, HOST:PORT, ray://HOST:PORT or local. (default: $RAY_ADDRESS)",
    )  # fmt: skip
    options = arguments.read(made, argv)
    from tuneavideo.batch.batch import Batch
    from tuneavideo.batch.job_file import count

    whole = Batch.of(options.jobs, options.out, scores=options.scores)
    due = whole.due(retry=options.retry)
    show = ShowBatch(whole, options.json)
    show.line(f"{options.jobs}: {count([*whole.jobs.values()])}, in {whole.root.place}: {show.counts()}")
    values, lines = whole.plan(due, options.workers) if due else ({}, ["nothing to run"])
    show.event("plan", jobs=len(whole.jobs), due=[job.name for job in due], **Counter(whole.states.values()), **values)
    if options.dry_run:
        for job in due if not options.json else ():
            show.line(f"  {whole.states[job.id]:<8}{job.name}  {_varied(job.written, whole)}")
    for line in lines:
        show.line(line)
    if not options.dry_run:
        if due:
            show.run(whole.runner(due, ray=options.ray, workers=options.workers))
        show.end(f"tuneavideo batch {shlex.join(argv)}")


class ShowBatch:
    """Progress of a batch on the terminal: a table of workers, or a line for each job, or JSON lines.

    The first Ctrl-C or SIGTERM lets the workers stop after their current steps, the second ends them at once.
    """

    def __init__(self, whole: Batch, as_json: bool) -> None:
        self.whole, self.as_json = whole, as_json
        self.output = sys.stdout
        self.workers: dict[str, Message] = {}
        self.interrupted = 0
        self.began, self.ended = time.monotonic(), 0

    def line(self, text: str) -> None:
        if not self.as_json:
            print(text, file=sys.stderr)

    def event(self, name: str, **values: Any) -> None:
        if self.as_json:
            print(json.dumps({"event": name, **values}), flush=True, file=self.output)

    def counts(self) -> str:
        """Describe how many jobs are in each state."""
        found = Counter(self.whole.states.values())
        return ", ".join(f"{found[state]} {state}" for state in ("done", "begun", "failed", "waiting") if found[state])

    def run(self, runner: Runner) -> None:
        """Run the jobs that are due, to the end or until an interruption."""
        from rich.console import Console
        from rich.live import Live

        def interrupt(number: int, _: Any) -> None:
            runner.kill() if self.interrupted else runner.stop()
            if not self.interrupted:
                os.write(2, b"stopping after the current steps; Ctrl-C again stops at once\n")
            self.interrupted = number

        before = {each: signal.signal(each, interrupt) for each in (signal.SIGINT, signal.SIGTERM)}
        console = Console(stderr=True)
        is_live = console.is_terminal and not self.as_json
        try:
            with (
                contextlib.redirect_stdout(sys.stderr),  # Ray prints messages
                Live(console=console, auto_refresh=False, transient=True) as live,
            ):
                for message in self.whole.run(runner):
                    if message is not None:
                        self._note(message, is_live)
                    if is_live:
                        live.update(self._table(), refresh=True)
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def end(self, command: str) -> None:
        """Print the results, and exit with an error if a job failed or the batch was interrupted."""
        failures = self.whole.failures()
        self.event("end", **Counter(self.whole.states.values()), failures=failures, results=self.whole.results)
        self.line(f"{self.counts()}; results: {self.whole.results or 'as before'}")
        for name, error in [*failures.items()][:ROWS]:
            self.line(f"  failed: {name}: {error}")
        if self.interrupted:
            stopped(None, self.interrupted)
        if failures:
            more = "" if "--retry" in command.split() else " --retry"
            raise RunError(
                f"{len(failures)} of {len(self.whole.jobs)} jobs failed; try them again with: {command}{more}"
            )

    def _note(self, message: Message, is_live: bool) -> None:
        self.event("job", **{name: value for name, value in message.items() if name != "settings"})
        if message["state"] == "running":
            self.workers[message["worker"]] = self.workers.get(message["worker"], {}) | message
            return
        self.workers.pop(message["worker"], None)
        self.ended += message["state"] in ("done", "failed")
        if not is_live:
            left = sum(state in ("waiting", "begun") for state in self.whole.states.values())
            seconds = f" in {message['seconds']:.0f} s" if "seconds" in message else ""
            why = f": {message['error']}" if message.get("error") else ""
            self.line(f"{message['state']}{seconds}: {message['run']}{why} ({left} left)")

    def _table(self) -> Any:
        """Build the table of the workers, under a line with the number of jobs and the time left."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        from tuneavideo.cli.console import clock

        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
        for name in ("worker", "job", "stage", "step"):
            table.add_column(name, no_wrap=True)
        for name, at in [*sorted(self.workers.items())][:ROWS]:
            step = f"{at['number']}/{at['total']}" if at.get("total") else ""
            table.add_row(name, Text(at["run"]), at.get("stage", ""), step)
        if len(self.workers) > ROWS:
            table.add_row(f"... {len(self.workers)} in all")
        left = sum(state in ("waiting", "begun") for state in self.whole.states.values())
        seconds = (time.monotonic() - self.began) / self.ended * left if self.ended else None
        return Group(Text(f"{self.counts()}  {clock(seconds)}"), table)


def _varied(written: Mapping[str, Any], whole: Batch) -> str:
    """Describe the settings of a job in which the jobs of the batch differ."""
    hidden, jobs = {"video", "prompt", "edit"}, whole.jobs.values()
    names = [
        name for name in written if name not in hidden and any(job.written.get(name) != written[name] for job in jobs)
    ]
    return " ".join(f"{name}={written[name]}" for name in names)
