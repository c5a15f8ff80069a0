"""The output of `tuneavideo doctor`, also on machines with faults."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tuneavideo.cli import environment, main


def examined_with(monkeypatch: pytest.MonkeyPatch, home: Path, torch: str) -> tuple[int, dict]:
    """Doctor in a process of its own, where `import torch` does what the text says."""
    package = home / "broken/torch.py"
    package.parent.mkdir()
    package.write_text(torch)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("TUNEAVIDEO_CACHE", str(home / "cache"))
    path = [str(package.parent), *sys.path]
    monkeypatch.setenv("PYTHONPATH", ":".join(path))
    words = [sys.executable, "-m", "tuneavideo", "doctor", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100)
    return done.returncode, json.loads(done.stdout)


@pytest.mark.parametrize(
    ("torch", "told"),
    [
        ("raise ImportError('libcudart.so.12: cannot open')", "ImportError: libcudart.so.12: cannot open"),
        ("import os; os.abort()", "ends its process with -6"),
    ],
)
def test_a_broken_torch_is_told_with_its_remedy(
    torch: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, found = examined_with(monkeypatch, tmp_path, torch)
    assert code == 1 and found["torch"] == {"error": told}
    (missing,) = [each for each in found["missing"] if each["impossible"]]
    assert missing["what"] == f"torch is broken: {told}" and "pip install --force-reinstall torch" in missing["remedy"]


def test_it_tells_all_that_a_bug_report_needs_and_nothing_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    home = tmp_path / "home/jane.doe"
    (home / "work").mkdir(parents=True)
    (tmp_path / "data/jane.doe").mkdir(parents=True)
    (tmp_path / "data/jane.doe/file").write_bytes(bytes(2_000_000))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("TUNEAVIDEO_CACHE", str(tmp_path / "data/jane.doe"))
    monkeypatch.chdir(home / "work")
    main.main(["doctor", "--json"])
    text = capsys.readouterr().out
    found = json.loads(text)
    assert "jane" not in text and found["runs"]["folder"] == "~/work/runs"
    assert found["cache"]["folder"].endswith("data/USER") and found["cache"]["size"] == 2_000_000
    assert found["packages"].keys() >= {"torch", "diffusers", "transformers", "accelerate", "av", "bitsandbytes"}
    assert found["memory"]["total"] > found["memory"]["free"] > 0 and found["runs"]["free"] > 0
    assert found["hub"]["offline"] is True and found["torch"]["threads"] > 0 and found["cores"] > 0
    assert not [each for each in found["missing"] if each["impossible"]]
    told = "\n".join(environment.lines(found))
    for part in (
        "torch 2",
        "Python 3",
        "memory  ",
        "holds 2 MB",
        "offline: nothing is downloaded",
        "all that tuning needs",
    ):
        assert part in told


def test_what_is_not_installed_comes_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"torch": "2.13.0", "einops": "0.1"}
    monkeypatch.setattr(environment, "_version", there.get)
    monkeypatch.setattr(environment, "_torch", lambda: {"built for": "cpu", "threads": 1, "devices": []})
    missing = {each["what"]: each for each in environment.examined()["missing"]}
    assert missing["diffusers is not installed"]["remedy"] == "pip install 'diffusers>=0.42'"
    assert missing["einops 0.1"] == {"what": "einops 0.1", "remedy": "pip install 'einops>=0.8'", "impossible": True}
    assert missing["bitsandbytes is not installed (for 8bit)"]["remedy"] == "pip install 'bitsandbytes>=0.45'"
    assert not missing["bitsandbytes is not installed (for 8bit)"]["impossible"]
    assert not any("pytest" in what for what in missing)
