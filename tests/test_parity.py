"""The package computes what the published code computed, on a part of the recorded numbers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from benchmarks import parity
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tuneavideo.method import attention

GOLDENS = Path(__file__).parent / "goldens"
BLOCK = "layers/basic_transformer_block_h2_d16_f5.safetensors"


@pytest.fixture
def one_layer(tmp_path):
    """A folder that holds a single golden."""
    (tmp_path / "layers").mkdir()
    shutil.copyfile(GOLDENS / BLOCK, tmp_path / BLOCK)
    return tmp_path


def outcome(folder, capsys):
    """Exit status and last line of the tool."""
    status = parity.main(["--goldens", str(folder)])
    return status, capsys.readouterr().out.splitlines()[-1]


def test_everything_agrees_with_the_published_code():
    results = list(parity.check(GOLDENS))
    assert {result.kind for result in results} >= {
        "forward",
        "image",
        "gradient",
        "layer",
        "ddim",
        "tuning",
        "text",
        "ckpt",
        "adamw",
    }
    assert [str(result) for result in results if not result.ok] == []


def test_the_part_is_small():
    sizes = {path.relative_to(GOLDENS): path.stat().st_size for path in GOLDENS.rglob("*") if path.is_file()}
    mindone = sum(size for path, size in sizes.items() if path.parts[0] == "mindone")
    assert mindone <= 2_000_000
    assert sum(sizes.values()) - mindone <= 6_100_000


def test_the_last_line_reports_agreement(one_layer, capsys):
    status, last = outcome(one_layer, capsys)
    assert status == 0
    assert last.startswith("checked 1 files, 31 tensors, worst ")


def test_a_changed_number_is_detected(one_layer, capsys):
    path = one_layer / BLOCK
    with safe_open(path, "pt") as file:
        about = file.metadata()
    tensors = load_file(path)
    tensors["out_f32"][0, 0, 0] += 1e-3
    save_file(tensors, path, about)
    assert outcome(one_layer, capsys)[0] == 1


def test_a_fault_of_the_method_is_detected(one_layer, capsys, monkeypatch):
    def previous_frame_only(x_BTLC, start, frames, references):
        return x_BTLC[:, start - 1 :]

    monkeypatch.setattr(attention, "referred", previous_frame_only)
    status, last = outcome(one_layer, capsys)
    assert status == 1
    assert BLOCK in last


def test_an_empty_folder_is_no_agreement(tmp_path, capsys):
    assert outcome(tmp_path, capsys) == (1, "checked 0 files, 0 tensors, worst none: nothing was compared")


@pytest.mark.parametrize("name", ["stray.safetensors", "layers/new_kind.safetensors", "train/lost.safetensors"])
def test_a_file_that_cannot_be_checked_is_no_agreement(one_layer, capsys, name):
    path = one_layer / name
    path.parent.mkdir(exist_ok=True)
    shutil.copyfile(one_layer / BLOCK, path)
    status, last = outcome(one_layer, capsys)
    assert status == 1
    assert last.startswith("checked 1 files, 31 tensors, worst ")
    assert last.endswith(", skipped 1")


def test_a_damaged_file_is_no_agreement(one_layer, capsys):
    (one_layer / "layers" / "resnet3d.safetensors").write_bytes(b"not tensors")
    assert outcome(one_layer, capsys)[0] == 1
