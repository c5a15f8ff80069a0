"""Batches: job files, what is done, begun and failed, and worker processes that end."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import psutil
import pytest
from pyarrow import parquet

from tests import forks
from tests.batch_jobs import STUB, contents_of, edits, job_file, run_all, written
from tests.conftest import Said, moving_square
from tuneavideo import api
from tuneavideo.batch.batch import Batch
from tuneavideo.batch.job_file import BatchJob, read_jobs
from tuneavideo.batch.job_run import run_job
from tuneavideo.batch.local import LocalRunner
from tuneavideo.batch.pool import MOST_STARTS, Pool
from tuneavideo.batch.roots import DiskRoot
from tuneavideo.cli import main
from tuneavideo.errors import DiskError, SettingsError
from tuneavideo.models import loading, pipelines
from tuneavideo.storage.run_folder import RunFolder


def command(*words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "tuneavideo", "batch", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


# Job files


def test_a_clip_is_run_with_each_combination_of_the_grid_but_for_its_own_settings(tmp_path: Path) -> None:
    clips = [{"video": "a.mp4", "prompt": "a dog"}, {"video": "b.mp4", "prompt": "a cat", "seed": 7, "edits": "a fox"}]
    grid = {"seed": [0, 1], "lora_rank": [4, None]}
    file = written(tmp_path / "jobs.yaml", clips=clips, grid=grid, defaults={"learning_rate": 1e-3})
    jobs = [job.settings for job in read_jobs(file)]
    found = {(job.prompt, job.seed, job.lora_rank) for job in jobs}
    assert found == {
        ("a cat", 7, 4),
        ("a cat", 7, None),
        *(("a dog", seed, rank) for seed in (0, 1) for rank in (4, None)),
    }
    assert {job.learning_rate for job in jobs} == {1e-3} and {job.edit for job in jobs} == {(), ("a fox",)}


def test_a_csv_file_has_a_job_per_row_with_the_ids_of_the_same_yaml_file(tmp_path: Path) -> None:
    (tmp_path / "jobs.csv").write_text(
        "video,prompt,edits,edits,seeds,fresh_noise,learning_rate\n"
        "a.mp4,a dog,a cat | a fox,a cow,0|1,0.5,1e-3\n"
        'b.mp4,"a dog, brown",,,,,\n,,,,,,\n'
    )
    first, second = read_jobs(tmp_path / "jobs.csv")
    assert first.edits == ("a cat", "a fox", "a cow") and first.settings.seeds == (0, 1)
    assert second.settings.prompt == "a dog, brown" and second.edits == ()
    clips = [
        {"video": "a.mp4", "prompt": "a dog", "seeds": [0, 1], "fresh_noise": 0.5, "learning_rate": 0.001},
        {"video": "b.mp4", "prompt": "a dog, brown"},
    ]
    assert [job.id for job in read_jobs(written(tmp_path / "jobs.yaml", clips=clips))] == [first.id, second.id]


def test_jobs_that_differ_in_their_prompts_only_are_one_job_with_all_of_them(tmp_path: Path) -> None:
    clip = {"video": "a.mp4", "prompt": "a dog"}
    file = written(tmp_path / "jobs.yaml", clips=[clip | {"edit": ["a cat"]}, clip | {"edit": ["a fox", "a cat"]}])
    (job,) = read_jobs(file)
    assert job.edits == ("a cat", "a fox")


def test_a_clip_is_found_beside_the_job_file(tmp_path: Path) -> None:
    moving_square(tmp_path / "a.mp4")
    file = written(tmp_path / "jobs.yaml", clips=[{"video": "a.mp4", "prompt": "a dog"}])
    (job,) = read_jobs(file)
    assert job.video == str(tmp_path / "a.mp4") and job.written["video"] == "a.mp4"
    assert BatchJob.of_message(json.loads(json.dumps(job.as_message()))).id == job.id


@pytest.mark.parametrize(
    ("contents", "line"),
    [
        ({"clips": []}, "jobs.yaml: clips: list should have at least 1 item"),
        ({"clip": []}, "jobs.yaml: unknown setting 'clip'; did you mean 'clips'?"),
        ({"clips": [{"video": "a.mp4"}]}, "jobs.yaml: clip 1: prompt is missing; a job needs video and prompt"),
        ({"clips": [{"video": "a.mp4", "prompt": "a", "sed": 1}]}, "clip 1: unknown setting 'sed'; did you mean 'seed"),
        ({"clips": [{"video": "a.mp4", "prompt": "a"}], "grid": {"seed": ["x"]}}, "jobs.yaml: grid: seed: input"),
        ({"clips": [{"video": "a.mp4", "prompt": "a", "out": "b"}]}, "'out' is no setting; give --out on the command"),
        ({"clips": [{"video": "a.mp4", "prompt": "a", "width": 3}]}, "clip 1: settings: width and height need each"),
    ],
)
def test_a_mistake_in_a_job_file_is_one_line_with_its_place(
    contents: dict, line: str, tmp_path: Path, refused: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert line in refused(["batch", str(written(tmp_path / "jobs.yaml", **contents))])
    assert not Path("runs").exists()


def test_rows_of_csv_with_mistakes_are_named(tmp_path: Path) -> None:
    file = tmp_path / "jobs.csv"
    for text, line in {
        "video,prompt\na.mp4,a dog, brown\n": "row 2: found 3 cells under 2 names; put texts in quotes",
        "video,prompt,seed\na.mp4,a,\nb.mp4,b,x\n": "row 3: seed: input should be a valid integer",
        "": "found no job",
    }.items():
        file.write_text(text)
        with pytest.raises(SettingsError, match=line):
            read_jobs(file)


# What is done, begun and failed


def test_jobs_are_run_skipped_extended_and_resumed_by_their_run_folders(base: Path, tmp_path: Path) -> None:
    file, root = job_file(tmp_path, base), tmp_path / "runs"
    batch = Batch.of(file, str(root))
    (job,) = batch.due()
    assert [message["state"] for message in run_job(job, str(root), False, lambda: False)][-1] == "done"
    before = contents_of(root)
    assert Batch.of(file, str(root)).due() == [] and edits(root, job.name) == ["a circle"]
    # another prompt: the model is not tuned again
    job_file(tmp_path, base, clips=[{"video": "square.mp4", "prompt": "a square", "edit": ["a circle", "a dot"]}])
    batch = Batch.of(file, str(root))
    assert batch.states == {job.id: "begun"} and set(run_all(file, root)) == {job.name}
    assert edits(root, job.name) == ["a circle", "a dot"]
    assert before.items() <= contents_of(root).items()
    # stopped after a step: continued to the same adapter
    calls = iter([False, False, True])
    (again,) = read_jobs(file)
    broken = tmp_path / "broken"
    *_, last = run_job(again, str(broken), False, lambda: RunFolder(broken / again.name).steps() != [] or next(calls))
    assert last == {"state": "stopped"} and Batch.of(file, str(broken)).states == {job.id: "begun"}
    assert run_all(file, broken)[job.name]["state"] == "done"
    assert contents_of(broken) == contents_of(root)


def test_failed_jobs_are_named_with_the_reason_and_run_again_on_request(base: Path, tmp_path: Path) -> None:
    clips = [{"video": name, "prompt": "a square"} for name in ("missing.mp4", "corrupt.mp4", "square.mp4")]
    clips += [{"video": "square.mp4", "prompt": "a square", "base": str(tmp_path / "no-base")}]
    file, root = job_file(tmp_path, base, clips=clips), tmp_path / "runs"
    (tmp_path / "corrupt.mp4").write_bytes(b"no clip")
    ends = run_all(file, root)
    assert sorted(end["state"] for end in ends.values()) == ["done", "failed", "failed", "failed"]
    batch = Batch.of(file, str(root))
    reasons = {name.rsplit("-", 1)[0]: error for name, error in batch.failures().items()}
    assert "missing.mp4 does not exist" in reasons["missing"] and "corrupt.mp4" in reasons["corrupt"]
    assert "no-base' does not exist" in reasons["square"]
    assert batch.due() == [] and len(batch.due(retry=True)) == 3
    moving_square(tmp_path / "missing.mp4"), moving_square(tmp_path / "corrupt.mp4")
    for job in batch.due(retry=True):
        assert [*run_job(job, str(root), False, lambda: False)][-1]["state"] == (
            "failed" if job.settings.base.endswith("no-base") else "done"
        )
    assert len(Batch.of(file, str(root)).failures()) == 1


def test_scores_are_made_on_request_and_are_in_the_results(base: Path, tmp_path: Path, monkeypatch) -> None:
    from tuneavideo.evaluation.evaluate import EvaluationSettings

    monkeypatch.setattr(EvaluationSettings, "names", lambda self, settings: ["flicker"])
    file, root = job_file(tmp_path, base), tmp_path / "runs"
    run_all(file, root)
    assert len(Batch.of(file, str(root)).due()) == 0 and len(Batch.of(file, str(root), scores=True).due()) == 1
    (end,) = run_all(file, root, scores=True).values()
    assert end["rows"][0]["flicker"] >= 0 and end["rows"][0]["edit"] == "a circle"
    assert Batch.of(file, str(root), scores=True).due() == []


def test_the_base_is_loaded_once_for_all_jobs_of_a_worker(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, load = [], loading.load_stock_pipeline
    monkeypatch.setattr(loading, "load_stock_pipeline", lambda *given, **more: loads.append(0) or load(*given, **more))
    file = job_file(tmp_path, base, grid={"seed": [0, 1]})
    with pipelines.keeping_base():
        run_all(file, tmp_path / "kept")
    assert len(loads) == 1
    run_all(file, tmp_path / "loaded")
    assert len(loads) == 3
    assert contents_of(tmp_path / "kept") == contents_of(tmp_path / "loaded"), "a job has no effect on the next one"


def test_results_of_another_program_are_not_replaced(base: Path, tmp_path: Path) -> None:
    file, root = job_file(tmp_path, base), tmp_path / "runs"
    root.mkdir()
    (root / "results.parquet").write_bytes(b"mine")
    with pytest.raises(DiskError, match=r"results.parquet was not written by this command; move it away"):
        Batch.of(file, str(root))
    assert (root / "results.parquet").read_bytes() == b"mine"


def test_a_dry_run_prints_the_jobs_with_time_and_disk_and_writes_nothing(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = job_file(tmp_path, base, grid={"seed": [0, 1]})
    root = tmp_path / "runs"
    main.main(["batch", str(file), "--out", str(root), "--dry-run"])
    lines = capsys.readouterr().err
    assert "2 jobs of 1 clip, 2 edits" in lines and "seed=0" in lines and "seed=1" in lines
    assert "time: " in lines and "disk: " in lines and "an H200" in lines and not root.exists()
    (job, _) = read_jobs(file)
    assert [*run_job(job, str(root), False, lambda: False)][-1]["state"] == "done"
    main.main(["batch", str(file), "--out", str(root), "--dry-run"])
    assert f"measured on 1 earlier run on {base}" in capsys.readouterr().err
    main.main(["batch", str(file), "--out", str(root), "--dry-run", "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert plan["due"] and plan["done"] == plan["waiting"] == 1 and plan["bytes"] > 0


# Worker processes


def runner(folder: Path, prompts: list[str], workers: int = 2) -> LocalRunner:
    clips = [{"video": f"{number}.mp4", "prompt": prompt} for number, prompt in enumerate(prompts)]
    jobs = read_jobs(written(folder / "jobs.yaml", clips=clips))
    return LocalRunner(Pool(jobs), str(folder), folder / "logs", scores=False, workers=workers, work=STUB)


@pytest.mark.long
def test_workers_that_die_are_started_again_and_other_jobs_are_not_touched(tmp_path: Path) -> None:
    prompts = ["die", "die once", "raise", *["sleep 0"] * 10]
    ends = [each for each in runner(tmp_path, prompts).messages() if each and each["state"] in ("done", "failed")]
    states = sorted(end["state"] for end in ends)
    assert states == ["done"] * 11 + ["failed"] * 2 and len({end["job"] for end in ends}) == 13
    errors = sorted(end["error"] for end in ends if end["state"] == "failed")
    assert errors[1].startswith(f"its worker ended {MOST_STARTS} times (signal 9), perhaps for lack of memory")
    starts = (tmp_path / "starts").read_text().split("\n")
    assert sum("die once" in line for line in starts) == 2 and sum("sleep" in line for line in starts) == 10


def test_a_batch_that_is_stopped_lets_its_workers_stop(tmp_path: Path) -> None:
    running = runner(tmp_path, ["sleep 60"] * 4)
    states = []
    for message in running.messages():
        if message and message["state"] == "running" and message["stage"] == "tune":
            running.stop()
        states += [message["state"]] if message else []
    assert states.count("stopped") in (1, 2) and "done" not in states


@pytest.mark.long
def test_the_command_runs_is_killed_stopped_and_continued_to_the_results_of_an_undisturbed_batch(
    base: Path, tmp_path: Path
) -> None:
    file = job_file(tmp_path, base, grid={"seed": [0, 1, 2], "max_train_steps": [12]})
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_all(file, whole)
    killed = command(str(file), "--out", str(broken), "--json")
    first = next(line for line in killed.stdout if json.loads(line).get("stage") == "tune")
    workers = psutil.Process(killed.pid).children()
    killed.kill()
    killed.communicate()
    stopped = command(str(file), "--out", str(broken), "--json")  # the worker of the killed batch may still have a run
    states = []
    for line in stopped.stdout:
        states.append(json.loads(line).get("state"))
        if json.loads(line).get("stage") == "tune":
            stopped.send_signal(signal.SIGINT)
            break
    _, errors = stopped.communicate()
    assert stopped.returncode == 130 and "go on with: the same command" in errors, errors
    psutil.wait_procs(workers, 40)
    done = command(str(file), "--out", str(broken), "--json")
    output, errors = done.communicate()
    assert done.returncode == 0, errors
    end = json.loads(output.splitlines()[-1])
    assert end["event"] == "end" and end["done"] == 3 and end["failures"] == {} and json.loads(first)["worker"]
    assert contents_of(broken) == contents_of(whole)
    rows = parquet.read_table(broken / "results.parquet").to_pylist()
    assert [row["state"] for row in rows] == ["done"] * 3 and all((broken / row["file"]).is_file() for row in rows)
    assert not [*broken.rglob("*.part")]


def test_a_root_on_a_disk_is_named_as_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert DiskRoot("runs/a").place == "runs/a" and DiskRoot("runs/a").path == tmp_path / "runs/a"


def limited(words: list[str]) -> None:
    """Run the command in little memory, on a disk that takes small files only; its workers have the same limits."""
    memory = psutil.Process().memory_info().vms + 2**29
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    main.main(words)


@pytest.mark.long
def test_one_job_without_memory_disk_clip_or_base_does_not_stop_the_others_and_each_is_named(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = {
        "ordinary.mp4": {}, "memory.mp4": {"train_batch_size": 4000}, "disk.mp4": {"width": 512, "height": 512},
        "corrupt.mp4": {}, "base.mp4": {"base": str(tmp_path / "nowhere")}, "last.mp4": {},
    }  # fmt: skip
    for name in own:
        moving_square(tmp_path / name)
    (tmp_path / "corrupt.mp4").write_bytes(b"no clip")
    clips = [{"video": name, "prompt": "a square", **settings} for name, settings in own.items()]
    file, root = job_file(tmp_path, base, clips=clips), tmp_path / "runs"
    code, output = forks.run(
        partial(limited, ["batch", str(file), "--out", str(root), "--json"]), tmp_path / "log", 400
    )
    assert code == 2 and "4 of 6 jobs failed; try them again with: tuneavideo batch" in output, output
    end = next(json.loads(line) for line in output.splitlines() if line.startswith('{"event": "end"'))
    reasons = {name.rsplit("-", 1)[0]: error for name, error in end["failures"].items()}
    assert end["done"] == 2 and set(reasons) == {"memory", "disk", "corrupt", "base"}, output
    assert "out of memory" in reasons["memory"] and "File too large; make room" in reasons["disk"]
    assert "corrupt.mp4" in reasons["corrupt"] and "nowhere' does not exist" in reasons["base"]
    rows = parquet.read_table(root / "results.parquet").to_pylist()
    assert sorted(row["state"] for row in rows) == ["done"] * 2 + ["failed"] * 4
    page = api.report(root, tmp_path / "report.html").read_text()
    assert "ordinary" in page and "last" in page
    for name in ("corrupt", "base"):
        assert f"{root}/{name}-" in caplog.text and reasons[name][:40] in caplog.text
