"""Run folders: names, edits, the log and removal."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneavideo.errors import RunError, SettingsError
from tuneavideo.storage import atomic
from tuneavideo.storage.run_folder import RunFolder, slug


def made_edit(run: RunFolder, prompt: str) -> None:
    with run.new_edit(prompt) as (draft, _):
        (draft / "edit.json").write_text(f'{{"prompt": "{prompt}", "seed": 0}}')


@given(st.text())
def test_any_prompt_makes_a_harmless_file_name(prompt: str) -> None:
    name = slug(prompt)
    assert 0 < len(name.encode()) <= 60 and not name.startswith("-")
    assert all(letter == "-" or unicodedata.category(letter)[0] in "LMN" for letter in name)
    assert unicodedata.is_normalized("NFC", name)


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A man, surfing!", "a-man-surfing"),
        ("Кот на пляже", "кот-на-пляже"),
        ("一只猫在冲浪", "一只猫在冲浪"),
        ("हिन्दी में", "हिन्दी-में"),
        ("Cre\u0300me_brûlée 🐱", "crème-brûlée"),
        ("🐱", "untitled"),
        ("../../etc/passwd", "etc-passwd"),
    ],
)
def test_names_keep_the_letters_of_every_script(prompt: str, name: str, tmp_path: Path) -> None:
    assert slug(prompt) == name
    assert RunFolder.create(f"{prompt.replace('/', '')}.mp4", root=tmp_path).path.is_dir()


def test_previews_of_prompts_with_one_name_do_not_collide(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.sample(100, 0, "🐱") != run.sample(100, 1, "🐶")
    assert run.sample(100, 0, "a" * 90) != run.sample(100, 1, "a" * 91)


def test_runs_of_one_clip_never_collide(tmp_path: Path) -> None:
    made = [RunFolder.create("some/My Clip.mp4", root=tmp_path).path.name for _ in range(3)]
    assert made == ["my-clip-1", "my-clip-2", "my-clip-3"]


def test_a_folder_that_holds_something_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(RunError, match="exists and is not empty; give another --out$"):
        RunFolder.create("clip.mp4", tmp_path)
    (tmp_path / "a run").mkdir()
    (tmp_path / "a run/settings.yaml").touch()
    with pytest.raises(RunError, match=r"give another --out, or go on with: tuneavideo tune --resume '.*a run'$"):
        RunFolder.create("clip.mp4", tmp_path / "a run")


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no run folder: settings.yaml is missing; 'tuneavideo tune' makes one"):
        RunFolder.open(tmp_path)


def test_a_log_line_cut_short_by_a_crash_is_left_out_and_later_steps_can_be_forgotten(tmp_path: Path) -> None:
    run = RunFolder.create("clip.mp4", tmp_path)
    for number in (1, 2, 3):
        run.log_step({"number": number})
        atomic.write(run.sample(number, 0, "a cat"), b"")
        atomic.write(tmp_path / f"samples/{number:06d}-a-cat.mp4", b"")  # as older versions named them
        atomic.write(tmp_path / f"samples/{number}-mine.txt", b"")
    with (tmp_path / "steps.jsonl").open("a") as file:
        file.write('{"numb')
    assert [step["number"] for step in run.steps()] == [1, 2, 3]
    run.forget_steps_after(2)
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == sorted([f"00000{number}-{name}.mp4" for number in (1, 2) for name in ("00-a-cat", "a-cat")]
                           + [f"{number}-mine.txt" for number in (1, 2, 3)])  # fmt: skip
    run.log_step({"number": 3})
    assert [step["number"] for step in run.steps()] == [1, 2, 3]


def test_edits_of_one_prompt_get_folders_of_their_own(tmp_path: Path) -> None:
    run = RunFolder.create("clip.mp4", tmp_path)
    for _ in range(2):
        made_edit(run, "a man / woman: 4K?")
    assert [edit.name for edit in run.edits()] == ["000-a-man-woman-4k", "001-a-man-woman-4k"]


def test_an_edit_that_is_not_finished_leaves_nothing(tmp_path: Path) -> None:
    run = RunFolder.create("clip.mp4", tmp_path)
    with pytest.raises(ValueError), run.new_edit("a cat") as (draft, _):
        (draft / "edit.mp4").touch()
        raise ValueError
    assert not list((tmp_path / "edits").iterdir())


def test_more_than_a_thousand_edits_are_counted_and_listed_in_order(tmp_path: Path) -> None:
    run = RunFolder.create("clip.mp4", tmp_path)
    for number in (2, 998, 101):
        (tmp_path / f"edits/{number:03d}-a-cat").mkdir(parents=True)
        (tmp_path / f"edits/{number:03d}-a-cat/edit.json").write_text('{"prompt": "a cat", "seed": 0}')
    for _ in range(3):
        made_edit(run, "a cat")
    assert [int(edit.name.split("-")[0]) for edit in run.whole_edits()] == [2, 101, 998, 999, 1000, 1001]


def test_folders_of_the_users_own_do_not_count_as_edits(tmp_path: Path) -> None:
    run = RunFolder.create("clip.mp4", tmp_path)
    (tmp_path / "edits/2026-favourites").mkdir(parents=True)
    made_edit(run, "a cat")
    assert [edit.name for edit in run.whole_edits()] == ["000-a-cat"]


def test_a_folder_inside_a_run_names_the_run(tmp_path: Path) -> None:
    (tmp_path / "a-1/edits/000-a").mkdir(parents=True)
    (tmp_path / "a-1/settings.yaml").touch()
    with pytest.raises(RunError, match="it belongs to the run .*a-1$"):
        RunFolder.open(tmp_path / "a-1/edits/000-a")


def test_a_tuned_run_of_an_earlier_version_is_read_without_settings_that_were_removed(tmp_path: Path) -> None:
    run = RunFolder.create("clip.mp4", tmp_path / "run")
    run.settings.write_text("video: clip.mp4\nprompt: a square\nprior_weight: 2\n", encoding="utf-8")
    with pytest.raises(SettingsError, match="prior_weight"):
        run.read_settings()
    run.adapter.mkdir()
    (run.adapter / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert run.read_settings().prompt == "a square"


def test_a_new_run_that_is_discarded_leaves_a_folder_named_base(tmp_path: Path) -> None:
    run = RunFolder.create("clip.mp4", tmp_path / "run")
    run.base.mkdir()
    (run.base / "own.txt").write_text("mine", encoding="utf-8")
    run.discard()
    assert [path.name for path in run.path.iterdir()] == ["base"] and (run.base / "own.txt").is_file()
