"""What is true of run folders."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneavideo import files
from tuneavideo.errors import RunError
from tuneavideo.runs import RunFolder, slug


@given(st.text())
def test_any_prompt_makes_a_harmless_file_name(prompt: str) -> None:
    name = slug(prompt)
    assert 0 < len(name) <= 60 and set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_runs_of_one_clip_never_collide(tmp_path: Path) -> None:
    made = [RunFolder.create("some/My Clip.mp4", root=tmp_path).path.name for _ in range(3)]
    assert made == ["my-clip-1", "my-clip-2", "my-clip-3"]


def test_a_folder_that_holds_something_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(RunError, match="exists and is not empty; give another --out$"):
        RunFolder.create("clip.mp4", tmp_path)
    (tmp_path / "a run").mkdir()
    (tmp_path / "a run/settings.yaml").touch()
    with pytest.raises(RunError, match=r"give another --out, or --resume '.*a run'$"):
        RunFolder.create("clip.mp4", tmp_path / "a run")


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no run folder: settings.yaml is missing; 'tuneavideo tune' makes one"):
        RunFolder.open(tmp_path)


def test_a_log_line_cut_short_by_a_crash_is_left_out_and_later_steps_can_be_forgotten(tmp_path: Path) -> None:
    run = RunFolder.create("clip.mp4", tmp_path)
    for number in (1, 2, 3):
        run.log_step({"number": number})
        files.write(run.sample(number, "a cat"), b"")
    with (tmp_path / "steps.jsonl").open("a") as file:
        file.write('{"numb')
    assert [step["number"] for step in run.steps()] == [1, 2, 3]
    run.forget_steps_after(2)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["000001-a-cat.mp4", "000002-a-cat.mp4"]
    run.log_step({"number": 3})
    assert [step["number"] for step in run.steps()] == [1, 2, 3]


def test_edits_of_one_prompt_get_folders_of_their_own(tmp_path: Path) -> None:
    run = RunFolder.create("clip.mp4", tmp_path)
    names = [run.new_edit("a man / woman: 4K?").name for _ in range(2)]
    assert names == ["000-a-man-woman-4k", "001-a-man-woman-4k"]
