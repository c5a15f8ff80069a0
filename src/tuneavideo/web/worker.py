"""Worker process: runs the queue's jobs on one device, one after the other.

    python -m tuneavideo.web.worker ROOT DEVICE

It writes its progress to stdout and reads what to stop from stdin, a JSON object per line. When stdin ends, since the
server did, it stops after the current step; the next worker continues the job.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Generator
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import IO, Any

from filelock import FileLock

from tuneavideo import api
from tuneavideo.config import checked
from tuneavideo.errors import DiskError, RunInUse, TuneAVideoError, error_line
from tuneavideo.job_settings import clip_edit_settings
from tuneavideo.progress import Progress, TimeLeft
from tuneavideo.settings import EditSettings, Sampling, TuneSettings
from tuneavideo.storage import atomic
from tuneavideo.storage.run_files import EDIT, number_in
from tuneavideo.storage.run_folder import RunFolder
from tuneavideo.web.pages import estimate
from tuneavideo.web.queue import DONE, FAILED, MOST_STARTS, WAITING, Queue, Request

INTERVAL = 0.4  # seconds between two messages of one stage
BEAT = 0.6  # seconds without a message after which one says that the job still runs
PATIENCE = 2.0  # seconds after which a job whose run was in use is tried again
LAST_WAIT = 30.0  # seconds after the server's end at which a worker that still computes is ended


class Worker:
    """The loop of a worker, and the thread that listens to the server."""

    def __init__(self, root: Path, output: IO[str]) -> None:
        self.queue, self.output = Queue(root), output
        self.wake, self.closing = threading.Event(), False
        self.stopped = 0
        self.current: dict[str, Any] = {}  # the last message on the job that runs
        self.heard = self.sent = 0.0  # times of the last progress, and of the last message
        self._turn = threading.Lock()
        self.refused: dict[int, float] = {}  # jobs whose run was in use, and when to try again

    def listen(self, stream: IO[str]) -> None:
        """Read messages of the server until it ends."""
        for line in stream:
            self.stopped = json.loads(line).get("stop", self.stopped)
            self.wake.set()
        self.closing = True
        self.wake.set()
        time.sleep(LAST_WAIT)
        os._exit(1)

    def beat(self) -> None:
        """Send a message a second while a job runs that takes longer between two of its own."""
        while True:
            time.sleep(BEAT / 4)
            with self._turn:
                silent = time.monotonic() - self.heard
                if self.current and silent > BEAT and time.monotonic() - self.sent > BEAT:
                    self._write(self.current | {"idle": round(silent, 1)})

    def run(self) -> None:
        """Run jobs until the server ends."""
        import_torch()
        while not self.closing:
            now = time.monotonic()
            self.refused = {number: due for number, due in self.refused.items() if due > now}
            request = None
            try:
                with self.queue.taken(self.refused) as request:
                    if request:
                        self.work(request)
            except DiskError as error:  # the queue cannot be written: the job stays in it
                logging.warning("%s", error)
                self.wake.wait(PATIENCE)
            if not request:
                self.wake.wait(1)
                self.wake.clear()

    def work(self, request: Request) -> None:
        """Run a job to its end, and record the end."""
        if request.starts >= MOST_STARTS:
            why = f"the worker process ended {request.starts} times while it ran, perhaps for lack of memory"
            self.queue.finish(request.id, FAILED, f"{why}; take fewer frames or a lower resolution, and retry")
            return self.tell(job=request.id, state=FAILED)
        self.stopped = 0
        if self.queue.get(request.id).state != WAITING:  # stopped before this line
            return None
        self.queue.started(request)
        state = WAITING
        try:
            state = self._ended(request)
        finally:
            with self._turn:
                self.current = {}
            self.queue.picture(request.id).unlink(missing_ok=True)
            self.tell(job=request.id, state=state)
        return None

    def _ended(self, request: Request) -> str:
        """Run a job, and return the state that is recorded."""
        self.note({"job": request.id, "run": request.run, "kind": request.kind, "state": "running"}, stage="begin")
        try:
            is_whole = self.complete(request)
        except RunInUse as error:
            self.refused[request.id] = time.monotonic() + PATIENCE
            self.queue.settled(request, str(error))
            return WAITING
        except Exception as error:
            if not isinstance(error, TuneAVideoError):
                logging.exception("job %d", request.id)
            self.queue.finish(request.id, FAILED, error_line(error))
            return FAILED
        if is_whole:
            self.queue.finish(request.id, DONE)
        else:
            self.queue.settled(request)
        return DONE if is_whole else "stopped"

    def note(self, job: dict[str, Any], **progress: Any) -> None:
        """Send progress of the job that runs."""
        self.current, self.heard = job, time.monotonic()
        self.tell(**job, **progress, idle=0)

    def complete(self, request: Request) -> bool:
        """Run a job; return False when it was stopped."""
        events, left, picture = begin(request, self.queue), TimeLeft(), Picture(self.queue.picture(request.id))
        last, stage, steps = 0.0, "", list[list[float]]()
        for each in events:
            now = time.monotonic()
            left.note(each, now)
            if each.step:
                steps.append([each.step.number, each.step.relative_loss or each.step.loss])
            shown = picture.made_of(each)
            if each.stage and (each.path or each.stage != stage or now - last > INTERVAL or shown):
                more = {"picture": shown} if shown else {}
                self.note(self.current, **described(each), **more, steps=steps, left=left.seconds())
                last, stage, steps = now, each.stage, []
            if self.closing or self.stopped == request.id:
                events.close()
                return False
        return True

    def tell(self, **message: Any) -> None:
        """Send a message to the server, if it is still there."""
        with self._turn:
            self._write(message)

    def _write(self, message: dict[str, Any]) -> None:
        self.sent = time.monotonic()
        try:
            self.output.write(json.dumps(message) + "\n")
            self.output.flush()
        except OSError:
            self.closing = True


class Picture:
    """The picture of edits while they are sampled. Making it takes at most a tenth of the time.

    Args:
        file: The file that is written.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.count, self.due = file, 0, 0.0

    def made_of(self, each: Progress) -> int:
        """Write the picture of an event if it has one and it is time; return its number, or 0."""
        began = time.monotonic()
        if each.picture is None or began < self.due or each.number == each.total:
            return 0
        from PIL import Image

        with io.BytesIO() as contents:
            Image.fromarray(each.picture()).save(contents, format="JPEG", quality=85)
            with suppress(DiskError):
                atomic.write(self.file, contents.getvalue())
        self.count += 1
        self.due = time.monotonic() + max(0.5, 10 * (time.monotonic() - began))
        return self.count


def described(each: Progress) -> dict[str, Any]:
    """Return the parts of an event that a browser shows."""
    made = {"stage": each.stage, "number": each.number, "total": each.total, "about": each.about}
    made |= {"made": each.path.name} if each.path else {}
    if each.step:
        made |= {"loss": each.step.loss, "pace": each.step.seconds, "memory": each.step.memory}
    return made


def begin(request: Request, queue: Queue) -> Generator[Progress, None, None]:
    """Yield the events of a job; none if the run folder shows that it is done already."""
    run, values = RunFolder(queue.root / request.run), request.settings
    if request.kind == "tune":
        yield from _tune(run, values)
    elif request.kind == "preview":
        yield from _preview(run, values)
    elif request.kind == "measure":
        yield from _measure(queue.root, checked(TuneSettings, values))
    elif request.kind == "edit":
        settings = api.edit_settings({**values, "run": str(run.path)})
        first = queue.begin_edits(request, run.next_edit)
        if not made_since(run, settings, first) >= {*product(settings.prompt, settings.seeds)}:
            yield from closing(api.Job.edit(settings))
    elif request.kind == "evaluate":
        yield from closing(api.Job.evaluate([run.path]))
    else:
        with RunFolder.open(run.path).job():
            out = exported(run, values["to"])
            if not out.exists():
                api.convert(run.path, out, **values)
        yield Progress("export", path=out, about=values["to"])


def _tune(run: RunFolder, values: dict[str, Any]) -> Generator[Progress, None, None]:
    if not run.settings.is_file():
        yield from closing(api.Job.tune(checked(TuneSettings, values), out=run.path))
        return
    settings = api.resumed_settings(run.path, {})
    if not (run.is_finished(settings) and run.edited() >= {*product(settings.edit, settings.seeds)}):
        yield from closing(api.Job.tune(settings, resume=run.path))


def _preview(run: RunFolder, values: dict[str, Any]) -> Generator[Progress, None, None]:
    """Edit a clip without tuning, or make the edits that an interrupted request left."""
    tuning, edits = clip_edit_settings(values)
    if run.is_new:  # an interrupted request left it without results
        with run.locked():
            run.discard()
    if not run.source.is_file():
        yield from closing(api.Job.edit_clip(tuning, edits, out=run.path))
        return
    sampling = run.read_settings().model_dump(include=set(Sampling.model_fields))
    edits = edits.model_copy(update={"run": str(run.path), **sampling})
    if not made_since(run, edits, 0) >= {*product(edits.prompt, edits.seeds)}:
        yield from closing(api.Job.edit(edits))


def _measure(root: Path, settings: TuneSettings) -> Generator[Progress, None, None]:
    for each in closing(api.Job.measure(settings, root / ".web")):
        if each.scores:
            estimate.note(root, settings.base, dict(each.scores))
        yield each


def closing(job: api.Job) -> Generator[Progress, None, None]:
    """Yield the events of a job, and close it with this generator."""
    try:
        yield from job
    finally:
        job.close()


def made_since(run: RunFolder, settings: EditSettings, first: int) -> set[tuple[str, int]]:
    """Return prompt and seed of the edits numbered `first` or later that were made with these settings."""
    expected = settings.model_dump(mode="json", exclude={"run", "prompt", "seeds"})
    later = [run.read_edit(edit) for edit in run.whole_edits() if (number_in(edit, EDIT) or 0) >= first]
    return {(edit["prompt"], edit["seed"]) for edit in later if expected.items() <= edit.items()}


def exported(run: RunFolder, to: str) -> Path:
    """Return where the adapter is written in another format."""
    suffix = {"mindone": ".ckpt", "ldm": ".safetensors", "lora": ".safetensors"}.get(to, "")
    return run.path / "exports" / f"{to}{suffix}"


def import_torch() -> None:
    """Import what jobs need before the first one is requested."""
    from tuneavideo.jobs import edit, tune  # noqa: F401
    from tuneavideo.models import quiet

    quiet.silence_libraries()


def main(root: str, device: str) -> None:
    """Run the worker of a device, after an older one of the same device has ended."""
    with suppress(BrokenPipeError), os.fdopen(os.dup(1), "w", encoding="utf-8") as output:
        os.dup2(2, 1)  # libraries may print
        worker = Worker(Path(root), output)
        threading.Thread(target=worker.listen, args=(sys.stdin,), daemon=True).start()
        threading.Thread(target=worker.beat, daemon=True).start()
        with FileLock(worker.queue.folder / "locks" / f"worker-{device}.lock"):
            os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
            worker.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
