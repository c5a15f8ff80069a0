"""The benchmark commands: LOVEU-TGVE-2023 on a small data set with a tiny base, and the miniature benchmark."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

import numpy as np
import psutil
import pytest
import yaml
from PIL import Image

from tests.conftest import Said
from tuneavideo import api
from tuneavideo.cli import main
from tuneavideo.errors import SettingsError, VideoError
from tuneavideo.evaluation import summary
from tuneavideo.evaluation.tgve import KINDS, read_clips

CLIPS = {"DAVIS_480p": ["bmx", "judo"], "youtube_480p": ["salsa"]}
BRIEF = {"max_train_steps": 1, "num_inference_steps": 1, "num_inv_steps": 1, "gradient_checkpointing": False}


def prompts_of(name: str) -> dict[str, str]:
    return {kind: f"a red {kind} of {name}" for kind in KINDS}


def frames_made(data: Path) -> Path:
    rng = np.random.default_rng(0)
    for kind, names in CLIPS.items():
        for name in names:
            folder = data / kind / "480p_frames" / name
            folder.mkdir(parents=True)
            for t in range(3):
                Image.fromarray(rng.integers(0, 255, (24, 24, 3), np.uint8)).save(folder / f"{t:05d}.jpg")
    return data


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    """Frames, and configs as the benchmark's repository has them."""
    data = frames_made(tmp_path / "data")
    for kind, names in CLIPS.items():
        for name in names:
            config = {
                "pretrained_model_path": "./checkpoints/stable-diffusion-v1-4",
                "train_data": {"video_path": f"./data/loveu-tgve-2023/{kind}/480p_frames/{name}",
                               "prompt": f"a {name}", "height": 16, "width": 16, "num_frames": 3, "frame_rate": 1},
                "validation_data": {"prompts": prompts_of(name), "height": 16, "width": 16},
                "seed": 33,
            }  # fmt: skip
            (data / "configs" / kind).mkdir(parents=True, exist_ok=True)
            (data / "configs" / kind / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return data


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Frames, and the benchmark's table, whose parts have headings."""
    data = frames_made(tmp_path / "data")
    columns = ["Video name", "Our GT caption", "Style Change Caption", "Object Change Caption",
               "Background Change Caption", "Multiple Changes Caption"]  # fmt: skip
    with (data / "LOVEU-TGVE-2023_Dataset.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for kind, names in CLIPS.items():
            writer.writerow([f"{kind} Videos:", "", "", "", "", ""])
            writer.writerows([name, f"a {name} ", *prompts_of(name).values()] for name in names)
    return data


def test_configs_and_the_table_give_the_same_clips(configs: Path, tmp_path: Path) -> None:
    clips = read_clips(configs)
    assert [(clip.set, clip.name, clip.count, clip.seed) for clip in clips] == [
        ("DAVIS_480p", "bmx", 3, 33), ("DAVIS_480p", "judo", 3, 33), ("youtube_480p", "salsa", 3, 33),
    ]  # fmt: skip
    assert clips[0].prompts == prompts_of("bmx") and clips[0].caption == "a bmx" and clips[0].width == 16


def test_the_table_does_without_configs(table: Path) -> None:
    clips = read_clips(table)
    assert [(clip.set, clip.name, clip.count) for clip in clips] == [
        ("DAVIS_480p", "bmx", 3), ("DAVIS_480p", "judo", 3), ("youtube_480p", "salsa", 3),
    ]  # fmt: skip
    assert clips[2].prompts == prompts_of("salsa") and clips[2].caption == "a salsa"
    assert (clips[2].width, clips[2].height) == (480, 480)


def test_clips_are_tuned_edited_measured_and_laid_out_for_submission_once(
    configs: Path, base: Path, clip_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "brief.yaml").write_text(yaml.safe_dump(BRIEF))
    out = tmp_path / "out"
    words = ["benchmark", "tgve", "--data", str(configs), "--out", str(out), "--base", str(base), "--clips", "2"]
    words += ["--config", str(tmp_path / "brief.yaml"), "--clip", str(clip_model)]
    main.main(words)
    output = capsys.readouterr().out
    laid = {str(file.relative_to(out / "submission")) for file in (out / "submission").rglob("*.jpg")}
    assert laid == {
        f"DAVIS_480p/{name}/{kind}/0000{t}.jpg" for name in CLIPS["DAVIS_480p"] for kind in KINDS for t in range(3)
    }
    results = json.loads((out / "results.json").read_text())
    assert (results["clips"], results["edits"], results["base"]) == (2, 8, str(base))
    aligned = [row["scores"]["clip_text"]["value"] for row in results["rows"]]
    assert len(aligned) == 8 and results["means"]["all"]["clip_text"] == pytest.approx(mean(aligned))
    styles = [row["scores"]["clip_text"]["value"] for row in results["rows"] if row["kind"] == "style"]
    assert results["means"]["style"]["clip_text"] == pytest.approx(mean(styles))
    assert results["metrics"]["clip_text"]["baseline"] == 27.12
    assert (
        "| clip_text |  | higher |" in output and "| 27.12 |" in output and "Not measured: pick_score: yuval" in output
    )
    assert output.strip() == (out / "results.md").read_text().strip()

    shutil.rmtree(out / "submission/DAVIS_480p/bmx/style")
    seen = []
    again = api.Job.benchmark_tgve(configs, out=out, base=str(base), clips=2, config=tmp_path / "brief.yaml",
                                  clip=str(clip_model))  # fmt: skip
    seen = [each.stage for each in again]
    assert not {"tune", "encode", "edit", "invert"} & set(seen)
    assert len([*(out / "submission").rglob("*.jpg")]) == 24
    with pytest.raises(SettingsError, match="max_train_steps 1, not 2"):
        list(api.Job.benchmark_tgve(configs, out=out, base=str(base), **BRIEF | {"max_train_steps": 2}))


def test_a_benchmark_that_was_stopped_goes_on_with_the_clip_it_was_at(
    configs: Path, base: Path, tmp_path: Path
) -> None:
    given = {"out": tmp_path / "out", "base": str(base), "clips": 1, **BRIEF}
    job = api.Job.benchmark_tgve(configs, **given)
    for each in job:
        if each.stage == "edit" and each.path:
            job.close()
            break
    seen = [each for each in api.Job.benchmark_tgve(configs, **given)]
    assert not any(each.step for each in seen)
    assert len([each for each in seen if each.stage == "edit" and each.path]) == 3
    assert (tmp_path / "out/results.json").is_file()


def test_data_that_is_not_the_benchmarks_is_refused_in_one_line(
    configs: Path,
    refused: Said,
    tmp_path: Path,
) -> None:
    assert f"{tmp_path}/none: no frames" in refused(["benchmark", "tgve", "--data", f"{tmp_path}/none"])
    file = configs / "configs/DAVIS_480p/bmx.yaml"
    config = yaml.safe_load(file.read_text())
    del config["validation_data"]["prompts"]["multiple"]
    file.write_text(yaml.safe_dump(config))
    with pytest.raises(SettingsError, match=r"bmx.yaml: expected train_data with .* found KeyError 'multiple'"):
        read_clips(configs)
    shutil.rmtree(configs / "configs")
    with pytest.raises(SettingsError, match="no configs .* and no table"):
        read_clips(configs)
    (configs / "a.csv").write_text("Video name,Caption\n")
    with pytest.raises(SettingsError, match="'Our GT caption' is missing"):
        read_clips(configs)


def test_frames_that_are_missing_are_named(configs: Path) -> None:
    shutil.rmtree(configs / "youtube_480p/480p_frames/salsa")
    with pytest.raises(VideoError, match="salsa is missing"):
        read_clips(configs)


def row(variant: str, clip: str, clean: bool, track: float) -> dict:
    edit = {"clean": clean, "success": clean, "preserved": True, "track": track, "consistency": 0.9}
    return {"variant": variant, "clip": clip, "seed": 0, "edits": [edit | {"background_db": None}]}


ROWS = [row("untuned", "x", False, 5), row("untuned", "y", True, 3), row("default", "x", True, 4),
        row("default", "y", True, 2)]  # fmt: skip


def test_the_miniature_benchmark_compares_with_its_first_variant() -> None:
    results = summary.summary(ROWS, ["untuned", "default"])
    assert results["untuned"]["scores"]["clean"]["mean"] == 0.5 and not results["untuned"]["differences"]
    assert results["default"]["differences"]["track"] == {"mean": -1, "low": -1, "high": -1}
    assert "background_db" not in results["default"]["scores"]


def test_the_miniature_benchmark_is_printed_as_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine, which takes minutes, has tests of its own; here it has given its rows."""
    request = {}

    def given(variants: list, file: Path, **options) -> list[dict]:
        request.update(options, variants=[(each.name, dict(each.settings), each.tuned) for each in variants])
        return ROWS

    monkeypatch.setattr(summary, "benchmark", given)
    main.main(["benchmark", "miniature", "untuned", "default", "--quick", "--out", str(tmp_path), "--seeds", "2"])
    assert request["variants"] == [("untuned", {}, False), ("default", {}, True)]
    assert request["clips"] == 4 and request["seeds"] == range(2) and request["part"] == "development"
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["clean", "0.50", "(0.00…1.00)", "1.00", "(1.00…1.00)"] in lines
    assert ["track,", "px", "-1.00", "(-1.00…-1.00)"] in lines


def test_a_variant_that_is_not_known_is_refused(refused: Said) -> None:
    assert "unknown variant 'offical'" in refused(["benchmark", "miniature", "offical"])


@pytest.mark.slow
def test_ctrl_c_stops_the_miniature_benchmark_in_a_line(tmp_path: Path) -> None:
    """A terminal sends the signal to the whole group: here while the workers are being started."""
    words = ["benchmark", "miniature", "untuned", "--quick", "--processes", "2", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "tuneavideo", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as stopped:
        first = stopped.stderr.readline()  # pyright: ignore[reportOptionalMemberAccess]
        while len(children := psutil.Process(stopped.pid).children()) < 3:  # two workers, and what watches over them
            time.sleep(0.05)
        os.killpg(stopped.pid, signal.SIGINT)
        _, output = stopped.communicate()
    assert first.startswith("benchmark 0/4") and stopped.returncode == 130
    *_, last = output.splitlines()
    assert last == "tuneavideo: stopped; go on with: the same command" and "Traceback" not in output
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


def test_the_benchmarks_have_job_files_for_batches(configs: Path, tmp_path: Path) -> None:
    from benchmarks import job_files

    from tuneavideo.batch.job_file import read_jobs

    job_files.main(["tgve", str(configs), str(tmp_path / "tgve.yaml"), "--base", "sd1.5"])
    jobs = read_jobs(tmp_path / "tgve.yaml")
    assert len(jobs) == 3 and {len(job.edits) for job in jobs} == {4}
    assert {(job.settings.base, job.settings.width, job.settings.seed) for job in jobs} == {("sd1.5", 16, 33)}
    job_files.main(["miniature", str(tmp_path / "miniature.yaml"), "--part", "report", "--seeds", "2"])
    jobs = read_jobs(tmp_path / "miniature.yaml")
    assert len(jobs) == 2 * 12 and {job.settings.seed for job in jobs} == {0, 1}
