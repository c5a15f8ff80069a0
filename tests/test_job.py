"""The main job as users run it: on a small real base, from the command line and from Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.clips import clapped
from tests.conftest import Said, base_folder, moving_square
from tests.shared.job import BRIEF, same
from tuneavideo import api, miniature
from tuneavideo.cli import main
from tuneavideo.errors import RunError, SettingsError, VideoError
from tuneavideo.method.tuning import Tuning
from tuneavideo.models import devices, loading
from tuneavideo.settings import TuneSettings
from tuneavideo.storage.run_folder import RunFolder
from tuneavideo.video import read

CLIP = str(miniature.clips()[0]["path"])
FLAGS = [
    word for name, value in BRIEF.items() if value is not False for word in (f"--{name.replace('_', '-')}", str(value))
]


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with previews and one edit."""
    clip = tmp_path_factory.mktemp("clip") / "square.mp4"
    moving_square(clip)
    out = tmp_path_factory.mktemp("runs") / "square"
    return api.tune(
        clip, "a red square moves", edit=["a blue circle moves"], base=str(base), out=out, stride=2,
        validation_steps=2, formats=("mp4", "gif", "frames"), mixed_precision="no", **BRIEF,
    )  # fmt: skip


def test_a_run_folder_holds_all_of_a_run_and_nothing_to_resume(run: Path) -> None:
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    edit = "edits/000-a-blue-circle-moves"
    assert files >= {
        "settings.yaml", "source.mp4", "steps.jsonl", "README.md", "adapter/adapter.safetensors",
        "adapter/adapter_config.json", f"{edit}/edit.mp4", f"{edit}/edit.gif", f"{edit}/frames/00002.png",
        f"{edit}/side-by-side.mp4", f"{edit}/edit.json", "samples/000000-00-a-blue-circle-moves.mp4",
        "samples/000002-00-a-blue-circle-moves.mp4", "samples/000004-00-a-blue-circle-moves.mp4",
    }  # fmt: skip
    assert not any(".part" in name or "checkpoints" in name for name in files)


def test_an_edit_has_the_frames_size_and_rate_of_the_source(run: Path) -> None:
    edited, source = read(run / "edits/000-a-blue-circle-moves/edit.mp4"), read(run / "source.mp4")
    assert edited.frames_THWC.shape == source.frames_THWC.shape == (3, 16, 16, 3)
    assert edited.fps == pytest.approx(4.0) and source.fps == pytest.approx(4.0)


def test_every_step_is_logged(run: Path) -> None:
    steps = RunFolder.open(run).steps()
    assert [step["number"] for step in steps] == [1, 2, 3, 4]
    assert all(set(step) == {"number", "loss", "learning_rate", "seconds", "memory", "relative_loss"} for step in steps)


def test_an_edit_made_later_is_the_edit_made_at_once(run: Path) -> None:
    (folder,) = api.edit(run, ["a blue circle moves"])
    later, before = read(folder / "frames"), read(run / "edits/000-a-blue-circle-moves/frames")
    assert (later.frames_THWC == before.frames_THWC).all()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_base_is_loaded_once_for_tuning_and_its_edits(
    precision: str, base: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, load = [], loading.load_stock_pipeline
    monkeypatch.setattr(loading, "load_stock_pipeline", lambda *given, **more: loads.append(0) or load(*given, **more))
    options = BRIEF | {"gradient_checkpointing": True, "mixed_precision": precision, "formats": ("frames",)}
    run = api.tune(clip, "a square", edit="a circle", base=str(base), out=tmp_path / "run", **options)
    assert len(loads) == 1
    (later,) = api.edit(run, "a circle")
    assert len(loads) == 2
    before = read(run / "edits/000-a-circle/frames")
    assert (read(later / "frames").frames_THWC == before.frames_THWC).all()


def test_the_rate_of_an_edit_can_be_set(run: Path) -> None:
    (folder,) = api.edit(run, ["a blue circle moves"], fps=6.0, num_inference_steps=1, num_inv_steps=1)
    assert read(folder / "edit.mp4").fps == pytest.approx(6.0)


def test_prompts_and_seeds_share_one_inversion(run: Path, capsys: pytest.CaptureFixture) -> None:
    kept = set((run / "inversion").iterdir())
    seen = []
    edits = api.edit(run, ["a red circle", "not a square"], seeds=(1, 2), fresh_noise=0.5, progress=seen.append)
    assert len(edits) == 4 and set((run / "inversion").iterdir()) == kept
    assert not any(each.stage == "invert" for each in seen)
    frames = [read(edit / "edit.mp4").frames_THWC.astype(int) for edit in edits]
    assert all(abs(frames[i] - frames[j]).max() > 0 for i in range(4) for j in range(i))


def test_inversion_is_kept_for_edits(run: Path) -> None:
    whole = api.invert(run, strength=0.6)
    start = api.invert(run, strength=0.6, attention_injection=0.0)
    latents, alone = (load_file(file)["latents"] for file in (whole, start))
    assert latents.shape == (3, 4, 3, 8, 8)  # where two steps begin, and the clip
    assert torch.equal(alone, latents[:1]) and whole.parent == start.parent == run / "inversion"


@pytest.mark.parametrize("stop", [1, 3])
def test_a_run_closed_early_is_resumed_to_the_adapter_of_an_unbroken_one(
    stop: int, run: Path, base: Path, tmp_path: Path
) -> None:
    own = RunFolder.open(run).read_settings()
    job = api.Job.tune(own.model_copy(update={"edit": (), "validation_steps": None}), out=tmp_path / "broken")
    for each in job:
        if each.step and each.step.number == stop:
            job.close()
            break
    assert not (tmp_path / "broken/adapter").exists()
    saving = {"gradient_checkpointing": True, "offload": True, "batch_guidance": False} if stop == 3 else {}
    assert api.resume(tmp_path / "broken", **saving) == tmp_path / "broken"
    assert same(run, tmp_path / "broken")
    assert [step["number"] for step in RunFolder.open(tmp_path / "broken").steps()] == [1, 2, 3, 4]


def test_a_run_that_is_done_is_not_tuned_again(run: Path) -> None:
    with pytest.raises(RunError, match="is tuned to its end; edit it, or tune on with: .* --max-train-steps 8"):
        api.resume(run)


def test_a_run_stopped_among_its_edits_is_resumed_to_all_of_them(base: Path, clip: Path, tmp_path: Path) -> None:
    stated = {"video": str(clip), "prompt": "a square", "edit": ("a circle", "a red circle"), "base": str(base)}
    stated |= {"seeds": (1, 2), "fresh_noise": 0.5}
    job = api.Job.tune(api.tune_settings(stated | BRIEF), out=tmp_path / "run")
    for each in job:
        if each.stage == "edit" and each.path:
            job.close()
            break
    assert api.resume(tmp_path / "run") == tmp_path / "run"
    made = [json.loads(file.read_text()) for file in sorted((tmp_path / "run/edits").glob("*/edit.json"))]
    assert [(edit["prompt"], edit["seed"]) for edit in made] == [
        ("a circle", 1), ("a circle", 2), ("a red circle", 1), ("a red circle", 2),
    ]  # fmt: skip


def test_a_kill_while_the_adapter_is_written_can_be_resumed(run: Path, base: Path, clip: Path, tmp_path: Path) -> None:
    out = api.tune(clip, "a square", base=str(base), out=tmp_path / "run", **BRIEF)
    (out / "adapter/adapter_config.json").unlink()
    before = (out / "adapter/adapter.safetensors").read_bytes()
    api.resume(out)
    assert (out / "adapter/adapter.safetensors").read_bytes() == before


def test_a_run_that_is_not_done_is_not_edited(run: Path, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_bytes((run / "settings.yaml").read_bytes())
    with pytest.raises(RunError, match="is not tuned to its end; go on with: tuneavideo tune --resume"):
        api.edit(tmp_path, ["a circle"])


@pytest.mark.parametrize("tracker", ["tensorboard"])
def test_a_tracker_receives_the_loss(tracker, base: Path, clip: Path, tmp_path: Path) -> None:
    run = api.tune(clip, "a square", base=str(base), out=tmp_path / "run", report_to=tracker, **BRIEF)
    assert list((run / "logs").rglob("events.*"))


def test_a_resumed_run_keeps_its_settings(run: Path) -> None:
    with pytest.raises(SettingsError, match="seed cannot change when a run is resumed; it is 0"):
        api.resume(run, seed=1)


def test_memory_stated_when_a_run_is_resumed_chooses_only_what_leaves_the_result_as_it_is(run: Path) -> None:
    resumed = api.resumed_settings(run, {"memory": 8, "batch_guidance": False})
    free = set(TuneSettings.model_fields) - resumed.model_fields_set
    assert free == {"gradient_checkpointing", "offload"} and not resumed.batch_guidance and resumed.memory == 8


def test_memory_that_runs_out_is_told_with_the_command_that_goes_on(
    base: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Said
) -> None:
    learn = Tuning.accumulate

    def short(work: Tuning, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        if work.number == 2 and not work.settings.gradient_checkpointing:
            raise torch.OutOfMemoryError("out of memory")
        return learn(work, batch)

    monkeypatch.setattr(Tuning, "accumulate", short)
    words = ["tune", str(clip), "--prompt", "a square", "--base", str(base), "--out", str(tmp_path / "run"), *FLAGS]
    line = refused([*words, "--checkpointing-steps", "1", "--no-gradient-checkpointing"])
    *_, command = line.partition("; go on with: tuneavideo ")
    assert command.split() == ["tune", "--resume", str(tmp_path / "run"), "--gradient-checkpointing"]
    main.main(command.split())
    assert RunFolder.open(tmp_path / "run").is_tuned
    assert RunFolder.open(tmp_path / "run").read_settings().gradient_checkpointing


def test_one_prompt_may_be_given_as_it_is(run: Path) -> None:
    assert len(api.edit(run, "a red circle jumps", num_inference_steps=1, num_inv_steps=1)) == 1


def test_a_gif_that_browsers_would_slow_down_is_refused_before_the_work(base: Path, clip: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="formats: a GIF shows at most 50 frames a second"):
        api.tune(clip, "a square", base=str(base), out=tmp_path / "run", formats=("gif",), fps=60, **BRIEF)
    assert not (tmp_path / "run").exists()


def test_velocity_models_are_tuned_and_edited(tmp_path: Path, clip: Path) -> None:
    base = base_folder(tmp_path / "velocity", "v_prediction")
    made = api.tune(clip, "a square", edit=["a circle"], base=str(base), out=tmp_path / "run", sampler="dpm++", **BRIEF)
    assert (made / "edits/000-a-circle/edit.mp4").is_file()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_either_precision_runs_through(precision: str, base: Path, clip: Path, tmp_path: Path) -> None:
    made = api.tune(clip, "a square", edit=["a circle"], base=str(base), out=tmp_path / "run",
                    mixed_precision=precision, **BRIEF)  # fmt: skip
    assert (made / "edits/000-a-circle/edit.mp4").is_file()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without a GPU")
def test_precision_is_half_where_the_cpu_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, chosen in (("avx512_bf16", "bf16"), ("amx_bf16", "bf16"), ("avx2", "no")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: {has: True})
        assert devices.precision(None) == chosen
        assert devices.precision("no") == "no"


def test_frames_that_are_not_there_are_not_made_up(base: Path, clip: Path, tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="has 6 frames; 24 frames, every 1 from 0, need 24"):
        api.tune(clip, "a square", base=str(base), num_frames=24, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_size_the_base_does_not_take_names_the_nearest(base: Path, clip: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="width 33, height 16: this base takes multiples of 2; nearest is 32 x 16"):
        api.tune(clip, "a square", base=str(base), out=tmp_path / "run", width=33, height=16, **BRIEF)


def test_the_command_line_tunes_edits_and_inverts(
    base: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main.main(["tune", str(clip), "--prompt", "a square", "--base", str(base), *FLAGS, "--edit", "a circle",
              "--edit", "a square on the snow", "--no-gradient-checkpointing", "--json"])  # fmt: skip
    told = json.loads(capsys.readouterr().out)
    assert told["run"] == "runs/square-1" and len(told["edits"]) == 2 and told["steps"] == 4
    main.main(["edit", "runs/square-1", "--prompt", "a circle jumps", "--strength", "0.7", "--json"])
    (edit,) = json.loads(capsys.readouterr().out)["edits"]
    assert json.loads(Path(edit, "edit.json").read_text())["strength"] == 0.7
    main.main(["invert", "runs/square-1", "--json"])
    assert Path(json.loads(capsys.readouterr().out)["files"][0]).is_file()


def test_flags_go_before_the_yaml_file(base: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = tmp_path / "run.yaml"
    values = BRIEF | {"video": str(clip), "prompt": "a square", "base": str(base), "edit": ["a circle"]}
    config.write_text(json.dumps(values))
    main.main(["tune", "--config", str(config), "--max-train-steps", "2", "--edit", "a red circle", "--json",
              "--out", str(tmp_path / "run")])  # fmt: skip
    told = json.loads(capsys.readouterr().out)
    assert told["steps"] == 2 and [Path(edit).name for edit in told["edits"]] == ["000-a-red-circle"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["tun"], "unknown command 'tun'; did you mean 'tune'?"),
        (["edit", "nowhere", "--prompt", "x"], "nowhere is no run folder: it does not exist"),
        (["tune", "no.mp4", "--prompt", "a square", "--base", "sd1.5"], "no.mp4 does not exist"),
        (["tune", CLIP, "--prompt", "a square", "--base", "sd1.5"], "hf download stable-diffusion-v1-5/"),
        (["tune", "--resume", "nowhere"], "nowhere is no run folder"),
        (["tune", "a.mp4", "--prompt", ""], "prompt is empty"),
        (["edit", "nowhere", "--prompt", "a" * 300], "nowhere is no run folder"),
        (["tune", CLIP, "--prompt", "x", "--mixed-precision", "fp16"], "fp16 needs a GPU; take bf16, or no"),
        (["tune", "--resume", "runs/x", "--out", "y"], "keeps that run's folder and settings"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words: list[str], told: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main.main(words)
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    *loading, line = said.splitlines()
    assert told in line and [each.split()[0] for each in loading] in ([], ["loading"]) and "Traceback" not in said


def test_a_misspelt_flag_is_answered_with_the_right_one(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main.main(["tune", "a.mp4", "--prompt", "x", "--learning-rat", "1"])
    assert stopped.value.code == 2 and "--learning-rate" in capsys.readouterr().err


def test_help_and_importing_do_not_import_torch() -> None:
    code = "import sys, tuneavideo, tuneavideo.api, tuneavideo.cli.main as c\ntry: c.main(['tune', '--help'])\n" \
           "except SystemExit: pass\nassert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_two_processes_tune_together(base: Path, clip: Path, tmp_path: Path) -> None:
    """Each draws its own noise; the gradients agree, so both end at one adapter, which one process writes."""
    script = Path(sys.executable).with_name("accelerate")
    launch = "launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    words = [*launch.split(), "--main_process_port", "0", "-m", "tuneavideo", "tune", str(clip)]
    words += ["--prompt", "a square", "--base", str(base), "--out", str(tmp_path / "run"), *FLAGS]
    words += ["--no-gradient-checkpointing", "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([str(script), *words], capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(told) == 1 and json.loads(told[0])["steps"] == 4
    steps = RunFolder.open(tmp_path / "run").steps()
    assert [step["number"] for step in steps] == [1, 2, 3, 4]
    alone = api.tune(clip, "a square", base=str(base), out=tmp_path / "alone", **BRIEF)
    assert not same(alone, tmp_path / "run")
    assert [step["loss"] for step in RunFolder.open(alone).steps()] != [step["loss"] for step in steps]


@pytest.mark.long
def test_processes_with_different_free_memory_get_one_plan_and_wait_during_previews(
    base: Path, clip: Path, tmp_path: Path
) -> None:
    """The first process plans with the least memory that any has; the other waits for its previews."""
    child = tmp_path / "child.py"
    child.write_text(f"""
import os, time
from datetime import timedelta
from pathlib import Path
from tuneavideo.cli import main
from tuneavideo.jobs import tune
from tuneavideo.training import memory_plan

rank = os.environ["RANK"]
memory_plan._room = lambda settings, accelerator: 1e12 if rank == "0" else 1e3
plan, previews = tune.plan_memory, tune._previewed

def recorded(*parts):
    settings, line = plan(*parts)
    Path({str(tmp_path)!r}, "plan" + rank).write_text(settings.model_dump_json())
    return settings, line

def slow(*parts):
    for each in previews(*parts):
        time.sleep(0.2)
        yield each

tune.plan_memory, tune._previewed = recorded, slow
main.main()
""")
    script = Path(sys.executable).with_name("accelerate")
    launch = "launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    words = [*launch.split(), "--main_process_port", "0", str(child), "tune", str(clip), "--prompt", "a square"]
    words += ["--base", str(base), "--out", str(tmp_path / "run"), *FLAGS, "--edit", "a circle"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [str(script), *words, "--validation-steps", "2"], capture_output=True, text=True, env=environment, timeout=240
    )
    assert done.returncode == 0, done.stderr
    plans = [json.loads((tmp_path / f"plan{rank}").read_text()) for rank in (0, 1)]
    assert plans[0] == plans[1] and plans[0]["gradient_checkpointing"]
    assert len(list((tmp_path / "run/samples").iterdir())) == 3


def test_edits_that_play_as_fast_as_the_source_keep_its_sound(base: Path, tmp_path: Path) -> None:
    """A click at 0.48 s of the clip is 0.24 s into the frames taken, in everything that shows them."""
    clip = clapped(tmp_path / "clap.mp4", "libx264", "aac", 44_100)
    stated = {"video": str(clip), "prompt": "a square", "edit": ("a circle",), "base": str(base), "fit": "pad"}
    span = {"start_time": 0.24, "sample_fps": 12.5, "num_frames": 8, "max_train_steps": 1}
    run = api.tune(**{**BRIEF, **stated, **span}, out=tmp_path / "run")
    assert read(run / "source.mp4").fps == pytest.approx(12.5)
    for path in (run / "source.mp4", run / "edits/000-a-circle/edit.mp4", run / "edits/000-a-circle/side-by-side.mp4"):
        sound = read(path).sound_SC
        assert sound is not None and len(sound) == round(8 / 12.5 * 48_000)
        assert np.flatnonzero(np.abs(sound[:, 0].astype(int)) > 6000)[0] / 48_000 == pytest.approx(0.24, abs=0.02)
    (slower,) = api.edit(run, ["a red circle"], fps=6.0, num_inference_steps=1, num_inv_steps=1)
    assert read(slower / "edit.mp4").sound_SC is None
    assert read(slower / "side-by-side.mp4").sound_SC is None


def test_edits_made_together_are_those_made_one_by_one(run: Path) -> None:
    settings = {"seeds": (0, 1), "fresh_noise": 0.3, "num_inference_steps": 2}
    one_by_one = api.edit(run, ["a blue square", "a red circle"], **settings)
    together = api.edit(run, ["a blue square", "a red circle"], **settings, batch_prompts=3)
    for ours, theirs in zip(together, one_by_one, strict=True):
        seeds = [json.loads((folder / "edit.json").read_text())["seed"] for folder in (ours, theirs)]
        assert seeds[0] == seeds[1]
        difference = read(ours / "edit.mp4").frames_THWC.astype(int) - read(theirs / "edit.mp4").frames_THWC
        assert abs(difference).mean() < 1
