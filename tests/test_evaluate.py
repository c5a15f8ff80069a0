"""`tuneavideo evaluate` as users run it, on run folders whose clips are made here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Said
from tests.shared.metrics import passing, still
from tuneavideo import api, miniature
from tuneavideo.cli import main, tables
from tuneavideo.errors import RunError
from tuneavideo.evaluation.metrics.table import METRICS
from tuneavideo.settings import TuneSettings
from tuneavideo.storage.run_folder import RunFolder
from tuneavideo.video import Video, read, write, write_image


def made_run(path: Path, base: str, caption: str, source: Video, edits: dict[str, Video]) -> Path:
    """Make the parts of a run folder that evaluation reads."""
    run = RunFolder.create("clip", path)
    run.write_settings(TuneSettings(video="clip.mp4", prompt=caption, base=base), {})
    write(source, run.source)
    for number, (prompt, video) in enumerate(edits.items()):
        with run.new_edit(prompt) as (folder, _):
            write(video, folder / ("frames" if number == 0 else "edit.mp4"))
            (folder / "edit.json").write_text(json.dumps({"prompt": prompt, "seed": number}))
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    edits = {"a red circle": passing((3, 1), seed=1), "a blue circle": still(2)}
    return made_run(tmp_path / "run", "sd1.5", "a square", passing((3, 1)), edits)


def scores_of(run: Path) -> dict:
    return json.loads((run / "scores.json").read_text())


def test_offline_what_is_missing_is_named_and_the_rest_is_measured(run: Path) -> None:
    assert api.evaluate(run) == [run / "scores.json"]
    scores = scores_of(run)
    assert scores["format"] == 1 and set(scores["metrics"]) == {"warp_error", "motion_fidelity", "motion_fidelity_all"}
    whys = {each["metric"]: each["why"] for each in scores["missing"]}
    assert set(whys) == {name for name, each in METRICS.items() if each.requires != "judge"} - set(scores["metrics"])
    assert "openai/clip-vit-large-patch14" in whys["clip_frame"] and "hub's cache" in whys["clip_frame"]
    assert "yuvalkirstain/PickScore_v1" in whys["pick_score"]
    assert "--mask" in whys["background_psnr"] and "static" in whys["flicker"]
    faithful, frozen = (edit["scores"]["motion_fidelity"]["value"] for edit in scores["edits"])
    assert faithful > 0.9 and frozen < 0.2


def test_every_result_names_model_revision_frames_and_size(run: Path, clip_model: Path, tmp_path: Path) -> None:
    write_image(np.zeros((64, 64, 3), np.uint8), tmp_path / "mask.png")
    api.evaluate(run, clip=str(clip_model), pick=str(clip_model), mask=tmp_path / "mask.png")
    scores = scores_of(run)
    assert [(edit["folder"], edit["prompt"], edit["seed"]) for edit in scores["edits"]] == [
        ("000-a-red-circle", "a red circle", 0), ("001-a-blue-circle", "a blue circle", 1),
    ]  # fmt: skip
    assert [each["metric"] for each in scores["missing"]] == ["flicker"]
    for edit in scores["edits"]:
        for name, score in edit["scores"].items():
            assert set(score) == {"value", "model", "revision", "frames", "width", "height"}
            assert (score["frames"], score["width"], score["height"]) == (6, 64, 64) and np.isfinite(score["value"])
            assert score["model"] and score["revision"], name
    assert scores["edits"][0]["scores"]["clip_text"]["model"] == str(clip_model)
    metric = scores["metrics"]["pick_score"]
    assert set(metric) == {"unit", "better", "about", "baseline", "baseline_source"} and metric["baseline"] == 20.36


def test_scores_come_out_the_same_and_what_was_measured_before_stays(run: Path, clip_model: Path) -> None:
    api.evaluate(run, metrics=["clip_text", "motion_fidelity"], clip=str(clip_model))
    first = scores_of(run)
    api.evaluate(run / "edits/000-a-red-circle", metrics=["motion_fidelity", "warp_error"])
    later = scores_of(run)
    for old, new in zip(first["edits"], later["edits"], strict=True):
        assert old["scores"].items() <= new["scores"].items()
    assert "warp_error" in later["edits"][0]["scores"] and "warp_error" not in later["edits"][1]["scores"]


def test_scores_of_an_edit_that_was_made_anew_or_is_gone_are_dropped(run: Path, clip_model: Path) -> None:
    api.evaluate(run, metrics=["clip_text"], clip=str(clip_model))
    os.utime(run / "edits/000-a-red-circle/edit.json", (2e9, 2e9))
    shutil.rmtree(run / "edits/001-a-blue-circle")
    api.evaluate(run, metrics=["warp_error"])
    (edit,) = scores_of(run)["edits"]
    assert set(edit["scores"]) == {"warp_error"}


def test_the_miniature_has_its_judge_in_place_of_clip(tmp_path: Path) -> None:
    """A bundled clip of a rabbit stands for an edit of that of a dog on the same path."""
    clips = {clip["name"]: clip for clip in miniature.clips()}
    source, edit = (read(clips[name]["path"], size=(64, 64)) for name in ("dog-jumping", "rabbit-jumping"))
    edits = {"a rabbit is jumping on the grass": edit, "a dog is jumping on the grass, neon style": source}
    run = made_run(tmp_path / "run", "miniature", clips["dog-jumping"]["caption"], source, edits)
    api.evaluate(run)
    scores = scores_of(run)
    assert "clip_text" not in {*scores["metrics"], *(each["metric"] for each in scores["missing"])}
    rabbit, neon = ({name: each["value"] for name, each in edit["scores"].items()} for edit in scores["edits"])
    assert rabbit["success"] > 0.9 and rabbit["track_distance"] < 3 and rabbit["background_psnr"] > 15
    assert neon["success"] == 0 and neon["preserved"] == 1 and "background_psnr" not in neon
    api.evaluate(run, mask=next(run.glob("edits/*/frames/00000.png")), metrics=["background_psnr"])
    assert "background_psnr" in scores_of(run)["edits"][1]["scores"]
    api.evaluate(run)  # without a mask again: the score with it does not stay next to the reason
    scores = scores_of(run)
    assert "background_psnr" not in scores["edits"][1]["scores"]
    why = "the prompt requests another background or style"
    neon = "001-a-dog-is-jumping-on-the-grass-neon-style"
    assert {"metric": "background_psnr", "why": why, "edits": [neon]} in scores["missing"]
    api.evaluate(run / "edits/000-a-rabbit-is-jumping-on-the-grass")  # the reasons of other edits stay
    assert scores_of(run)["missing"] == scores["missing"]


Printed = tuple[list[str], dict[str, list[str]]]


def printed(capsys: pytest.CaptureFixture) -> Printed:
    """The lines of a table, and the cells of its rows by their first."""
    lines = capsys.readouterr().out.splitlines()
    return lines, {cells[0]: cells[1:] for line in lines if (cells := line.split())}


def test_the_command_prints_a_row_for_every_metric_and_what_is_missing(
    run: Path, capsys: pytest.CaptureFixture
) -> None:
    main.main(["evaluate", str(run)])
    lines, rows = printed(capsys)
    arrow, faithful, frozen, mean = rows["motion_fidelity"]
    assert arrow == "↑" and float(faithful) > 0.9 > float(mean) > float(frozen)
    assert rows["001"] == ["1", "a", "blue", "circle"]
    (line,) = [line for line in lines if "pick_score" in line]
    assert line.startswith("not measured: pick_score: yuvalkirstain/PickScore_v1")


def test_only_the_requested_metrics_and_edits_are_printed(
    run: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.evaluate(run)
    monkeypatch.chdir(run.parent)
    main.main(["evaluate", "run/edits/000-a-red-circle", "--metrics", "warp_error", "flicker"])
    lines, rows = printed(capsys)
    assert "warp_error" in rows and "motion_fidelity" not in rows and "001" not in rows
    (line,) = [line for line in lines if "not measured" in line]
    assert line.startswith("not measured: flicker: ")
    main.main(["evaluate", "run/edits/000-a-red-circle", "--metrics", "warp_error", "--json"])
    (file, scores), *others = json.loads(capsys.readouterr().out).items()
    assert file == "run/scores.json" and not others and scores["missing"] == []
    (edit,) = scores["edits"]
    assert [*edit["scores"]] == ["warp_error"] and edit["folder"] == "000-a-red-circle"
    assert len(scores_of(run)["edits"]) == 2, "the file keeps all"


def test_of_many_edits_the_table_names_the_best(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    edits = {f"edit {number} [b]": passing((speed, 1)) for number, speed in enumerate((1, 0, 3, 2, 5))}
    run = made_run(tmp_path / "run", "sd1.5", "a square", passing((3, 1)), edits)
    (run / "edits/004-edit-4-b").rename(run / "edits/1004-edit-4-b")
    main.main(["evaluate", str(run), "--metrics", "motion_fidelity"])
    lines, rows = printed(capsys)
    assert rows["motion_fidelity"][2] == "002" and rows["motion_fidelity"][4] == "001"
    assert rows["002"][1] == rows["motion_fidelity"][1] and rows["002"][2:] == ["edit", "2", "[b]"]
    assert [*rows][-6:-1] == ["000", "001", "002", "003", "1004"]
    assert "measured with DIS flow (OpenCV): motion_fidelity" in lines


def test_scores_of_different_masks_are_distinguished(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, side in (("left", 20), ("right", 40)):
        image = np.zeros((64, 64, 3), np.uint8)
        image[:, :side] = 255
        write_image(image, tmp_path / f"{name}.png")
        edit = next(run.glob("edits/000-*" if name == "left" else "edits/001-*"))
        main.main(["evaluate", str(edit), "--mask", f"{tmp_path}/{name}.png", "--metrics", "background_psnr"])
    main.main(["evaluate", str(run), "--mask", f"{tmp_path}/left.png", "--metrics", "background_ssim"])
    assert "measured with mask left.png: background_ssim" in capsys.readouterr().out.splitlines()
    scores = scores_of(run)
    tables.show_scores("scores.json", scores)
    lines, rows = printed(capsys)
    assert "measured with mask left.png: background_psnr (000), background_ssim" in lines
    assert "measured with mask right.png: background_psnr (001)" in lines
    assert rows["background_psnr"][-1] == "-", "a mean over different masks means nothing"


def test_a_model_that_the_hub_does_not_give_is_one_reason_and_nothing_measured_is_no_success(run: Path) -> None:
    """The hub is an address where nobody answers; requests are not repeated."""
    command = [sys.executable, "-m", "tuneavideo", "evaluate", str(run), "--metrics", "clip_text"]
    hub = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(run.parent / "hub")}
    done = subprocess.run(command, env=os.environ | hub, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "Retrying" not in done.stderr and done.stderr.splitlines()[-1].startswith("tuneavideo: nothing was measured")
    (reason,) = [line for line in done.stdout.splitlines() if line.startswith("not measured")]
    assert "the hub cannot be reached; give a folder (--clip" in reason


def test_scores_that_cannot_be_kept_are_shown(run: Path, refused: Said, capsys: pytest.CaptureFixture) -> None:
    (run / "scores.json").mkdir()
    with pytest.raises(SystemExit) as stopped:
        main.main(["evaluate", str(run), "--metrics", "warp_error", "--json"])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and f"{run}/scores.json cannot be written" in err
    (scores,) = json.loads(out).values()
    assert scores["edits"][1]["scores"]["warp_error"]["value"] > 0


def test_mistakes_are_one_line(run: Path, refused: Said, tmp_path: Path) -> None:
    assert "'clip_text'" in refused(["evaluate", str(run), "--metrics", "clip_txt"])
    assert f"{tmp_path}/none is no run folder" in refused(["evaluate", f"{tmp_path}/none"])
    write(still(frames=2), tmp_path / "masks")
    line = refused(["evaluate", str(run), "--mask", f"{tmp_path}/masks"])
    assert f"{tmp_path}/masks: " in line and "found 2" in line
    assert not (run / "scores.json").exists()


def test_an_edit_of_other_frames_is_left_out(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(still(frames=4), run / "edits/000-a-red-circle/frames")
    with pytest.raises(RunError, match=r"000-a-red-circle: found 4 frames of 64 x 64; its source.mp4 has 6 frames of"):
        api.evaluate(run / "edits/000-a-red-circle", metrics=["warp_error"])
    api.evaluate([run, run.parent], metrics=["warp_error"])
    assert [edit["folder"] for edit in scores_of(run)["edits"]] == ["001-a-blue-circle"]
    assert "000-a-red-circle: found 4 frames" in caplog.text and f"{run.parent} is no run folder" in caplog.text


@pytest.mark.parametrize("contents", ["{", "[1]", "{}", "\x00"])
def test_a_damaged_edit_or_file_of_scores_is_named(run: Path, contents: str, refused: Said) -> None:
    (run / "edits/000-a-red-circle/edit.json").write_text(contents)
    api.evaluate(run, metrics=["warp_error"])
    assert [edit["folder"] for edit in scores_of(run)["edits"]] == ["001-a-blue-circle"]
    (run / "scores.json").write_text(contents)
    assert f"{run}/scores.json is damaged" in refused(["evaluate", str(run)])
    assert (run / "scores.json").read_text() == contents


@pytest.mark.parametrize("damaged", [False, True])
def test_without_the_source_metrics_that_do_not_use_it_are_computed(run: Path, clip_model: Path, damaged: bool) -> None:
    (run / "source.mp4").write_bytes(b"x") if damaged else (run / "source.mp4").unlink()
    write_image(np.zeros((64, 64, 3), np.uint8), run.parent / "mask.png")
    api.evaluate(run, clip=str(clip_model), pick=str(clip_model), mask=run.parent / "mask.png")
    scores = scores_of(run)
    assert set(scores["metrics"]) == {"clip_frame", "clip_text", "pick_score"}
    assert all("source.mp4" in each["why"] for each in scores["missing"])
    assert {"clip_direction", "background_psnr", "warp_error", "flicker"} <= {e["metric"] for e in scores["missing"]}


def test_a_stopped_evaluation_keeps_the_scores_of_the_edits_it_finished(run: Path, clip_model: Path) -> None:
    api.evaluate(run, metrics=["clip_text"], clip=str(clip_model))
    job = api.Job.evaluate([run], metrics=["warp_error"])
    assert next(each for each in job if each.number == 1).about == "000-a-red-circle"
    job.close()
    first, second = scores_of(run)["edits"]
    assert set(first["scores"]) == {"clip_text", "warp_error"} and set(second["scores"]) == {"clip_text"}


def test_a_run_without_edits_says_what_to_do(run: Path) -> None:
    shutil.rmtree(run / "edits")
    with pytest.raises(RunError, match="not tuned to its end .*; 'tuneavideo tune --resume "):
        api.evaluate(run)
    (run / "adapter").mkdir()
    (run / "adapter/adapter_config.json").write_text("{}")
    with pytest.raises(RunError, match="has no edits to measure; 'tuneavideo edit "):
        api.evaluate(run)
