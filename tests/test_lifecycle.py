"""Jobs keep files that the program did not make, and tuned weights, in any order of commands."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load, save_file

from tests.shared.job import BRIEF
from tuneavideo import api
from tuneavideo.errors import AdapterError, DiskError, RunError, VideoError
from tuneavideo.progress import Events
from tuneavideo.settings import TuneSettings
from tuneavideo.storage.run_folder import RunFolder
from tuneavideo.version import __version__

QUICK = {**BRIEF, "max_train_steps": 2, "num_inference_steps": 1, "num_inv_steps": 1, "mixed_precision": "no"}


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an edit; tests take copies of it."""
    from tests.conftest import moving_square

    clip = moving_square(tmp_path_factory.mktemp("clip") / "square.mp4")
    return api.tune(clip, "a square", edit="a circle", base=str(base), out=tmp_path_factory.mktemp("f") / "r", **QUICK)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder, hidden files too, but the lock."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if path.name != ".lock"
    }


def settings(base: Path, clip: Path, **changes) -> TuneSettings:
    return api.tune_settings({"video": str(clip), "prompt": "a square", "base": str(base)} | QUICK | changes)


def at(job: api.Job, stage: str, act) -> None:
    """Run a job to its end, and `act` once when it tells of a stage."""
    acted = False
    for each in job:
        if each.stage == stage and not acted:
            acted = True
            act()


OWN = ("edits/2026-favourites/best.mp4", "edits/0_notes/note.txt", "checkpoints/best.pt", "checkpoints/0-mine.pt",
       "samples/1st.mp4", "samples/9 lives.txt", "inversion/own.safetensors", "notes.txt", ".upload.part",
       "adapter/notes.txt", "edits/007-half/edit.mp4")  # fmt: skip


def with_own_files(run: Path) -> dict[str, bytes | None]:
    for name in OWN:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(b"mine")
    return tree(run)


def test_an_edit_changes_nothing_that_was_there(run: Path) -> None:
    before = with_own_files(run)
    (edit,) = api.edit(run, "a red circle")
    assert tree(run).items() >= before.items()
    assert edit.name == "001-a-red-circle"
    new = {name.split("/")[0] for name in tree(run).keys() - before.keys()}
    assert new <= {"edits", "inversion"}


def test_other_commands_change_nothing_that_was_there(run: Path) -> None:
    before = with_own_files(run)
    api.invert(run)
    api.report(run)
    api.evaluate(run, metrics=["flicker"])
    with pytest.raises(RunError, match="tuned to its end"):
        api.resume(run)
    api.resume(run, edit=["a blue circle"])
    changed = {name for name, content in tree(run).items() if name in before and content != before[name]}
    assert tree(run).keys() >= before.keys() and changed <= {"settings.yaml"}


def test_a_tuning_that_is_resumed_leaves_files_of_others(base: Path, clip: Path, tmp_path: Path) -> None:
    job = api.Job.tune(settings(base, clip, validation_steps=1, edit=("a circle",)), out=tmp_path / "run")
    for each in job:
        if each.step:
            job.close()
            break
    before = with_own_files(tmp_path / "run")
    api.resume(tmp_path / "run")
    assert {name: before[name] for name in OWN} == {name: tree(tmp_path / "run")[name] for name in OWN}


def test_a_source_that_is_moved_while_it_is_tuned_on_costs_nothing(base: Path, clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    at(api.Job.tune(settings(base, clip, edit=("a circle",)), out=out), "tune", (out / "source.mp4").unlink)
    assert (out / "edits/000-a-circle/edit.mp4").is_file() and (out / "source.mp4").is_file()


def test_an_adapter_stays_when_the_clip_is_gone(base: Path, clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"

    def lost() -> None:
        clip.unlink()
        (out / "source.mp4").unlink()

    with pytest.raises(VideoError, match=r"source.mp4 is missing, and so is .*square.mp4.*put one of them back") as why:
        at(api.Job.tune(settings(base, clip, edit=("a circle",)), out=out), "tune", lost)
    assert why.value.__notes__ == [f"go on with: tuneavideo tune --resume {out}"]
    assert RunFolder(out).is_tuned and [step["number"] for step in RunFolder(out).steps()] == [1, 2]


@pytest.mark.parametrize("stage", ["open", "encode"])
def test_a_tuning_that_fails_early_removes_only_what_it_made(
    stage: str, base: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    monkeypatch.setattr("tuneavideo.jobs.tune.inflate", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        at(api.Job.tune(settings(base, clip), out=out), stage, (out / "notes.txt").touch)
    assert tree(out) == {"notes.txt": b""}
    (out / "notes.txt").unlink()
    with pytest.raises(ZeroDivisionError):
        at(api.Job.tune(settings(base, clip), out=out), stage, lambda: None)
    assert tree(tmp_path) == {"run": None, "square.mp4": clip.read_bytes()}  # the folder was there before


def test_a_run_killed_before_it_began_can_be_made_again(base: Path, clip: Path, tmp_path: Path) -> None:
    run = RunFolder.create(str(clip), tmp_path / "run")
    assert run.is_new
    assert api.tune(clip, "a square", base=str(base), out=run.path, **QUICK) == run.path
    assert run.is_tuned and not run.is_new


def test_a_run_folder_that_is_deleted_or_moved_while_it_tunes_is_one_line(
    base: Path, clip: Path, tmp_path: Path, refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, out = api.Job.tune, tmp_path / "run"

    def tuning(*given, **options) -> Events:
        for each in real(*given, **options):
            if each.step:
                out.rename(tmp_path / "moved")
            yield each

    monkeypatch.setattr(api.Job, "tune", tuning)
    words = ["tune", str(clip), "--prompt", "a square", "--base", str(base), "--num-frames", "3"]
    assert "was deleted or moved while it was in use" in refused([*words, "--out", str(out)])
    assert not out.exists() and (tmp_path / "moved/settings.yaml").is_file()


# Going on


@pytest.mark.parametrize("changes", [{}, {"use_ema": True}])
def test_a_finished_run_is_tuned_on(changes: dict, base: Path, clip: Path, tmp_path: Path) -> None:
    """From its adapter, which stays until the new one is there, also when it is stopped in between."""
    out = tmp_path / "run"
    run = RunFolder(out)
    done(api.Job.tune(settings(base, clip, edit=("a circle",), **changes), out=out))
    first = (out / "adapter/adapter.safetensors").read_bytes()
    job = api.Job.tune(api.resumed_settings(out, {"max_train_steps": 4}), resume=out)
    for each in job:
        if each.step:
            job.close()
            break
    assert [path.name for path in run.checkpoints()] == ["000003.pt"]
    assert (out / "adapter/adapter.safetensors").read_bytes() == first
    assert len(api.edit(out, "a red circle")) == 1 and run.checkpoints()
    api.resume(out)
    assert [step["number"] for step in run.steps()] == [1, 2, 3, 4] and not run.checkpoints()
    assert (out / "adapter/adapter.safetensors").read_bytes() != first
    assert [(made["prompt"], made["tuned_steps"]) for made in map(run.read_edit, run.whole_edits())] == [
        ("a circle", 2), ("a red circle", 2), ("a circle", 4),
    ]  # fmt: skip
    with pytest.raises(RunError, match="tuned to its end"):
        api.resume(out)


def done(job: api.Job) -> None:
    for _ in job:
        pass


def test_the_same_edit_command_goes_on_after_it_was_stopped(run: Path) -> None:
    wanted = {"run": str(run), "prompt": ("a red circle", "a blue circle"), "seeds": (1, 2), "fresh_noise": 0.5}
    job = api.Job.edit(api.edit_settings(wanted))
    for each in job:
        if each.stage == "edit" and each.path:
            job.close()
            break
    for expected in (3, 4):  # what is left, and then all anew
        made = api.edit(run, ["a red circle", "a blue circle"], seeds=(1, 2), fresh_noise=0.5)
        assert len(made) == expected
    assert len(RunFolder(run).whole_edits()) == 1 + 4 + 4


def test_a_damaged_adapter_is_refused_and_one_without_a_checksum_is_taken(run: Path) -> None:
    file = run / "adapter/adapter.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(AdapterError, match=r"adapter: the adapter is damaged .*make it again or copy it again"):
        api.edit(run, "a red circle")
    save_file(load(whole), file)
    assert api.edit(run, "a red circle")


# Outputs


def test_a_report_is_not_written_over_another_file(run: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.html").write_text("years of work")
    with pytest.raises(DiskError, match=r"thesis.html exists and was not written by this command"):
        api.report(run, tmp_path / "thesis.html")
    assert (tmp_path / "thesis.html").read_text() == "years of work"
    for _ in range(2):
        assert api.report(run, tmp_path / "report.html").is_file()


@pytest.mark.parametrize("name", ["results.json", "rows.jsonl"])
def test_a_benchmark_does_not_write_over_other_files(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("years of work")
    with pytest.raises(DiskError, match=f"{name} exists and was not written by this command"):
        list(api.Job.benchmark_miniature(out=tmp_path))
    assert tree(tmp_path) == {name: b"years of work"}


@pytest.mark.parametrize("to", ["adapter", "diffusers", "ldm"])
def test_an_export_is_not_written_over_anything(to: str, run: Path, tmp_path: Path, refused) -> None:
    out = tmp_path / "out.safetensors"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert "exists; give a new path" in refused(["convert", str(run), str(out), "--to", to])
    assert tree(out) == {"notes.txt": b"mine"}


# Errors


def test_a_run_keeps_the_error_of_its_last_job_until_one_succeeds(
    base: Path, clip: Path, tmp_path: Path, refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path / "run")

    def fail(step: int) -> None:
        raise DiskError(f"no room for step {step}")

    with monkeypatch.context() as broken:
        broken.setattr(RunFolder, "checkpoint", lambda _, step: fail(step))
        with pytest.raises(DiskError):
            api.tune(clip, "a square", base=str(base), out=run.path, **QUICK | {"checkpointing_steps": 1})
    first, time, version, *rest = run.error.read_text().splitlines()
    assert first == f"DiskError: no room for step 1; go on with: tuneavideo tune --resume {run.path}"
    assert time.startswith("time: 20") and version == f"tuneavideo: {__version__}"
    assert rest[1] == "Traceback (most recent call last):" and any("in fail" in line for line in rest)
    assert "no room for step 1" in refused(["edit", str(run.path), "--prompt", "a circle"])
    assert run.last_error == first and first in api.report(run.path).read_text()
    api.resume(run.path)
    assert not run.error.exists() and not run.last_error


def test_an_edit_that_fails_leaves_its_error_and_one_that_cannot_begin_does_not(run: Path, refused) -> None:
    folder = RunFolder(run)
    with folder.locked():
        assert "is in use" in refused(["edit", str(run), "--prompt", "a circle"])
    assert "no such file" in refused(["edit", str(run), "--prompt", "a circle", "--lora", "no.safetensors"])
    assert not folder.error.exists()
    (run / "adapter/adapter.safetensors").write_bytes(b"damaged")
    line = refused(["edit", str(run), "--prompt", "a circle"])
    assert folder.last_error == f"AdapterError: {line}"


# Advice


def test_evaluating_a_run_that_is_not_tuned_says_how_to_go_on(base: Path, clip: Path, tmp_path: Path, refused) -> None:
    RunFolder.create(str(clip), tmp_path / "run").write_settings(settings(base, clip), {})
    assert "tuneavideo tune --resume" in refused(["evaluate", str(tmp_path / "run")])


def test_a_demo_into_a_folder_that_exists_gives_advice_that_works(run: Path, refused) -> None:
    assert f"go on with: tuneavideo tune --resume {run}" in refused(["demo", "--quick", "--out", str(run)])
