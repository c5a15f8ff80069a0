"""A run survives: killed, interrupted, out of disk or memory, diverged, opened twice."""

from __future__ import annotations

import io
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from tests import forks
from tests.conftest import moving_square
from tests.shared.job import BRIEF
from tuneavideo import api
from tuneavideo.cli import main
from tuneavideo.config import as_yaml
from tuneavideo.errors import DiskError, RunError
from tuneavideo.progress import Events
from tuneavideo.settings import TuneSettings
from tuneavideo.storage import atomic
from tuneavideo.storage.run_folder import RunFolder
from tuneavideo.video import clip

EDIT = "a blue circle moves"
TOUCHES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")  # audit events


@pytest.fixture(scope="module")
def settings(base: Path, tmp_path_factory: pytest.TempPathFactory) -> TuneSettings:
    """Previews and checkpoints at every second step, and an edit."""
    clip = moving_square(tmp_path_factory.mktemp("clip") / "square.mp4")
    stated = {"video": str(clip), "prompt": "a red square moves", "edit": (EDIT,), "base": str(base)}
    return api.tune_settings(
        stated | BRIEF | {"stride": 1, "validation_steps": 2, "checkpointing_steps": 1, "mixed_precision": "no"}
    )


@pytest.fixture(scope="module")
def unbroken(settings: TuneSettings, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The adapter of an unbroken run."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    go_on(settings, out)
    return adapter(out)


def go_on(settings: TuneSettings, out: Path) -> None:
    """What a user does: tune, or resume what is there and not done."""
    if not (out / "settings.yaml").is_file():
        done(api.Job.tune(settings, out=out))
    elif RunFolder.open(out).edited() != {(EDIT, 0)}:
        done(api.Job.tune(api.resumed_settings(out, {}), resume=out))


def done(job: api.Job) -> None:
    for _ in job:
        pass


def adapter(out: Path) -> bytes:
    return (out / "adapter/adapter.safetensors").read_bytes()


def is_whole(out: Path) -> None:
    """Everything of a run is there once, nothing is half-written."""
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    slug = EDIT.replace(" ", "-")
    assert names == {
        ".lock", "settings.yaml", "source.mp4", "latents.safetensors", "steps.jsonl", "README.md",
        "adapter/adapter.safetensors", "adapter/adapter_config.json",
        *(f"samples/00000{step}-00-{slug}.mp4" for step in (0, 2, 4)),
        *(f"edits/000-{slug}/{name}" for name in ("edit.mp4", "side-by-side.mp4", "edit.json")),
        *(name for name in names if name.startswith("inversion/")),
    }  # fmt: skip
    run = RunFolder.open(out)
    assert run.read_settings() and [step["number"] for step in run.steps()] == [1, 2, 3, 4]


# Killed


def killing_itself(work: Callable[[], None], folder: Path, at: int) -> None:
    """Do `work`, but die when it is about to open, make, rename or remove its `at`-th file in `folder`.

    If it comes to its end, prints how many times it did so and how many seconds it took.
    """
    touched, began = 0, time.monotonic()

    def watch(event: str, arguments: tuple) -> None:
        nonlocal touched
        if event in TOUCHES and str(arguments[0]).startswith(str(folder)):
            touched += 1
            if touched == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    work()
    print(touched, time.monotonic() - began)


def killed_and_resumed(settings: TuneSettings, unbroken: bytes, folder: Path, kills: int, seed: int = 0) -> None:
    """Kill tunings at random files and at random times by turns, each again and again until it comes to its end."""
    chance = random.Random(seed)
    whole = partial(killing_itself, partial(go_on, settings, folder / "whole"), folder, -1)
    _, told = forks.run(whole, folder / "log")
    touched, seconds = map(float, told.split()[-2:])
    runs, hits = [], 0
    while hits < kills:
        if not runs or RunFolder(runs[-1]).edited():
            runs.append(folder / str(len(runs)))
        out, left = runs[-1], 0.5 if runs[-1].exists() else 1  # of a run that was killed before
        work, limit = partial(go_on, settings, out), 120.0
        if chance.random() < 0.5:
            work = partial(killing_itself, work, out, chance.randint(1, int(left * touched)))
        else:
            limit = chance.uniform(0, left * seconds)
        fork = forks.Fork.of(work, folder / "log")
        code = fork.ended(limit)
        if code is None:
            code = fork.kill()
        assert code in (0, -signal.SIGKILL), fork.log.read_text()
        hits += code != 0
        if (out / "settings.yaml").is_file():
            assert RunFolder.open(out).read_settings() == settings
    for out in runs:
        go_on(settings, out)
        assert adapter(out) == unbroken
        is_whole(out)
    print(f"{hits} kills of {len(runs)} runs; an unbroken one touches {touched:.0f} files in {seconds:.1f} s")


def test_killed_at_random_moments_and_resumed_a_run_ends_as_if_unbroken(
    settings: TuneSettings, unbroken: bytes, tmp_path: Path
) -> None:
    killed_and_resumed(settings, unbroken, tmp_path, kills=6)


@pytest.mark.slow
def test_killed_at_fifty_random_moments(settings: TuneSettings, unbroken: bytes, tmp_path: Path) -> None:
    killed_and_resumed(settings, unbroken, tmp_path, kills=50, seed=1)


# Interrupted


@pytest.fixture
def keyboard() -> Iterator[list[threading.Timer]]:
    """Timers that press Ctrl-C: none does so when the test has ended."""
    before, timers = signal.getsignal(signal.SIGINT), []
    yield timers
    for timer in timers:
        timer.join()
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("stage", "presses"), [("open", 1), ("tune", 2), ("preview", 1), ("invert", 1), ("edit", 2)])
def test_ctrl_c_leaves_a_run_that_can_be_resumed_and_says_how(
    stage: str, presses: int, settings: TuneSettings, unbroken: bytes, tmp_path: Path, capfd: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch, keyboard: list[threading.Timer],
) -> None:  # fmt: skip
    """Pressed soon after the stage has begun, whatever is going on then."""
    monkeypatch.chdir(tmp_path)
    real = api.Job.tune

    def pressed() -> None:
        for _ in range(presses):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.02)

    def tuning(*arguments, **options) -> Events:
        for each in real(*arguments, **options):
            if each.stage == stage and not keyboard:
                keyboard.append(threading.Timer(0.01, pressed))
                keyboard[0].start()
            yield each

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(api.Job, "tune", tuning)
        main.main(as_words(settings, "run"))
    keyboard[0].join()  # a second press may come when all is over: it must not meet the run that goes on
    said = capfd.readouterr().err
    assert stopped.value.code == 130 and "Traceback" not in said
    assert "tuneavideo: stopped; go on with: tuneavideo tune --resume run\n" in said
    main.main(["tune", "--resume", "run", "--json"])
    assert adapter(Path("run")) == unbroken
    is_whole(Path("run"))


def test_sigterm_stops_as_ctrl_c_does_with_its_own_exit_code(
    settings: TuneSettings, unbroken: bytes, tmp_path: Path, capfd: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As Slurm, containers and `timeout` send it; the handler is the process's own again when all went well."""
    monkeypatch.chdir(tmp_path)
    real, before = api.Job.tune, signal.getsignal(signal.SIGTERM)

    def tuning(*arguments, **options) -> Events:
        for each in real(*arguments, **options):
            if each.step and each.step.number == 3:
                signal.raise_signal(signal.SIGTERM)
            yield each

    try:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            patch.setattr(api.Job, "tune", tuning)
            main.main(as_words(settings.model_copy(update={"checkpointing_steps": 100}), "run"))
    finally:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, before if each == signal.SIGTERM else signal.default_int_handler)
    assert stopped.value.code == 143
    assert "tuneavideo: stopped; go on with: tuneavideo tune --resume run\n" in capfd.readouterr().err
    assert [path.name for path in RunFolder.open("run").checkpoints()] == ["000003.pt"]
    main.main(["tune", "--resume", "run", "--json"])
    assert adapter(Path("run")) == unbroken and signal.getsignal(signal.SIGTERM) == before


def as_words(settings: TuneSettings, out: str) -> list[str]:
    """The command line that makes the run `out` with these settings."""
    Path(f"{out}.yaml").write_text(as_yaml(settings))
    return ["tune", settings.video, "--prompt", settings.prompt, "--config", f"{out}.yaml", "--out", out, "--json"]


def test_ctrl_c_twice_in_the_middle_of_a_write_is_no_error(
    settings: TuneSettings, unbroken: bytes, tmp_path: Path, capfd: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch, keyboard: list[threading.Timer],
) -> None:  # fmt: skip
    """torch says "unexpected pos" of a state whose writing is broken off."""
    monkeypatch.chdir(tmp_path)
    real = torch.save

    class Pressed(io.BytesIO):
        def write(self, data) -> int:
            if self.tell() > 10_000:
                for _ in range(2):
                    signal.raise_signal(signal.SIGINT)
            return super().write(data)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(torch, "save", lambda state, _: real(state, Pressed()))
        main.main(as_words(settings, "run"))
    assert stopped.value.code == 130
    assert capfd.readouterr().err.endswith("tuneavideo: stopped; go on with: tuneavideo tune --resume run\n")
    assert not list(Path("run").rglob("*.part"))
    go_on(settings, Path("run"))
    assert adapter(Path("run")) == unbroken


def test_ctrl_c_before_there_is_a_job(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(api, "models", lambda: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a process that has just begun
    try:
        with pytest.raises(SystemExit) as stopped:
            main.main(["models"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "tuneavideo: stopped; go on with: the same command\n"


# Opened twice


def tune_and_wait(settings: TuneSettings, out: Path, tuning: Path) -> None:
    """Tune for a step, touch the file `tuning`, and hold the folder from then on."""
    for each in api.Job.tune(settings, out=out):
        if each.step:
            tuning.touch()
            time.sleep(600)


@pytest.fixture
def busy(settings: TuneSettings, tmp_path: Path) -> Iterator[tuple[Path, forks.Fork]]:
    """A run folder in which another process is tuning, and that process."""
    out = tmp_path / "run"

    other = forks.Fork.of(partial(tune_and_wait, settings, out, tmp_path / "tuning"), tmp_path / "log")
    while not (tmp_path / "tuning").exists():
        assert other.ended(0.01) is None, other.log.read_text()
    yield out, other
    other.kill()


def test_the_second_process_on_a_run_folder_is_refused(
    busy: tuple[Path, forks.Fork], settings: TuneSettings, unbroken: bytes, capsys: pytest.CaptureFixture
) -> None:
    """And the folder of one that was killed can be used at once."""
    out, other = busy
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    refused = f"tuneavideo: {out} is in use: another process tunes or edits there; wait until it is done, or stop it\n"
    how = f"give another --out, or go on with: tuneavideo tune --resume {out}"
    exists = f"tuneavideo: {out} exists and is not empty; {how}\n"
    for words, told in {
        ("tune", "--resume", str(out)): refused,
        ("edit", str(out), "--prompt", "a circle"): refused,
        ("invert", str(out)): refused,
        ("tune", settings.video, "--prompt", "a square", "--base", settings.base, "--out", str(out)): exists,
    }.items():
        with pytest.raises(SystemExit) as stopped:
            main.main(words)
        assert stopped.value.code == 2 and capsys.readouterr().err.endswith(told)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    other.kill()
    go_on(settings, out)
    assert adapter(out) == unbroken


def test_of_two_processes_that_make_one_folder_at_once_one_is_refused(tmp_path: Path) -> None:
    first, second = RunFolder.create("clip.mp4", tmp_path), RunFolder.create("clip.mp4", tmp_path)
    with first.locked(), pytest.raises(RunError, match="is in use"), second.locked():
        pass


# Out of disk


def with_small_files(words: list[str], limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    main.main(words)


@pytest.mark.parametrize(("limit", "full_at"), [(2_500, "latents"), (20_000, "checkpoints")])
def test_a_full_disk_is_one_line_and_what_was_done_is_kept(
    limit: int, full_at: str, settings: TuneSettings, unbroken: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, said = forks.run(partial(with_small_files, as_words(settings, "run"), limit), Path("log"))
    assert code == 2 and f"tuneavideo: run/{full_at}" in said, said
    assert "cannot be written: File too large; make room, " in said and "Traceback" not in said
    assert Path("run").exists() == (full_at == "checkpoints")
    if full_at == "checkpoints":
        assert said.endswith("; go on with: tuneavideo tune --resume run\n")
        assert not list(Path("run").rglob("*.part"))
        go_on(settings, Path("run"))
        assert adapter(Path("run")) == unbroken


def test_tuning_does_not_begin_when_the_disk_will_not_hold_it(
    settings: TuneSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "free", lambda path: 100_000)
    line = r"run: tuning needs [\d.]+ MB \(3 checkpoints of [\d.]+ MB, adapter .*, videos .*\), 0.1 MB are free"
    with pytest.raises(DiskError, match=line):
        done(api.Job.tune(settings, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def written(folder: Path) -> int:
    """Bytes of the files in a folder, and of those without a name that this process has open there."""
    named = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    handles = [path for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    nameless = {os.readlink(path): path for path in handles if os.readlink(path).startswith(f"{folder}/#")}
    return named + sum(path.stat().st_size for path in nameless.values())


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("changes", [{}, {"attention_injection": 0.0, "formats": ("mp4", "gif", "frames")}])
def test_what_a_run_writes_is_counted_before_it_begins(
    changes: dict, on_disk: bool, settings: TuneSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the frames of a clip on the disk, which lie there before anything is counted."""
    if on_disk:
        monkeypatch.setattr(clip, "IN_MEMORY", 1000)
    frames = 3 * 3 * 16 * 16 * on_disk
    settings = settings.model_copy(update={"seeds": (0, 1), "fresh_noise": 0.5, **changes})
    run, copy = tmp_path / "run", tmp_path / "copy"
    most = max(written(run) for _ in api.Job.tune(settings, out=run)) - frames
    shutil.copytree(run, copy)
    wish = {"prompt": ["a red circle", "a blue square"], "strength": 0.7}
    before = written(run)
    added = max(written(run) for _ in api.Job.edit(api.edit_settings(wish | {"run": str(run)}))) - before - frames
    for begin, peak in (
        (lambda: api.Job.tune(settings, out=tmp_path / "other"), most),
        (lambda: api.Job.edit(api.edit_settings(wish | {"run": str(copy)})), added),
    ):
        monkeypatch.setattr(atomic, "free", lambda path, peak=peak: peak - 1)
        with pytest.raises(DiskError, match="are free there"):
            done(begin())
        monkeypatch.setattr(atomic, "free", lambda path, peak=peak: 3 * peak)
        done(begin())


def test_edits_do_not_begin_when_the_disk_will_not_hold_them(
    settings: TuneSettings, unbroken: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    go_on(settings, run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    monkeypatch.setattr(atomic, "free", lambda path: 10_000)
    with pytest.raises(DiskError, match=r"run: 2 edits need .* \(inversion .*, videos .*\), 0.01 MB are free"):
        done(
            api.Job.edit(
                api.edit_settings({"run": str(run), "prompt": ["a red circle", "a blue square"], "strength": 0.7})
            )
        )
    (run / "error.txt").unlink()  # the only new file
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


# Out of memory


def in_little_memory(words: list[str]) -> None:
    limit = psutil.Process().memory_info().vms + 2**29
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    main.main(words)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"width": 2048, "height": 2048}, "lower num_frames (now 3), width x height (now 2048 x 2048)"),
        ({"train_batch_size": 4000}, "or train_batch_size (now 4000)"),
    ],
)
def test_memory_at_its_end_is_one_line_with_what_to_lower(
    changes: dict, told: str, settings: TuneSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = as_words(settings.model_copy(update=changes), "run")
    code, said = forks.run(partial(in_little_memory, words), Path("log"))
    *_, last = said.splitlines()
    assert code == 2 and last.startswith("tuneavideo: out of memory: this process holds "), said
    flags = "--gradient-checkpointing --no-batch-guidance"  # there are previews
    assert f" are free on cpu; add {flags}, which leaves the result as it is, or start a new run" in last
    assert told in last and "Traceback" not in said
    assert Path("run").exists() == last.endswith(f"; go on with: tuneavideo tune --resume run {flags}")


# Diverged


def test_a_loss_that_is_not_finite_leaves_the_last_good_state_to_go_on_from(
    settings: TuneSettings, unbroken: bytes, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Two good steps, then one that is far too long: the state after it was kept before its loss was known."""
    out = tmp_path / "run"
    job = api.Job.tune(settings, out=out)
    for each in job:
        if each.step and each.step.number == 2:
            job.close()
            break
    with pytest.raises(SystemExit) as stopped:
        main.main(["tune", "--resume", str(out), "--learning-rate", "1e30"])
    *_, said = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and said.startswith("tuneavideo: the loss is nan, its gradient nan at step 4; go on")
    assert "with a lower learning_rate (now 1e+30) or another mixed_precision (now no); go on with: tuneavideo" in said
    assert [path.name for path in RunFolder.open(out).checkpoints()] == ["000002.pt"]
    main.main(["tune", "--resume", str(out), "--learning-rate", str(settings.learning_rate)])
    assert adapter(out) == unbroken
