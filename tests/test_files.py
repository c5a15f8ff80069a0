"""Files are written whole or not at all, and used only if their checksum matches."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from tuneavideo.errors import DiskError
from tuneavideo.storage import atomic, cache
from tuneavideo.training.checkpoints import _read
from tuneavideo.video import Video, write


def test_assertions_are_evaluated() -> None:
    """Also where Python leaves out those of the program: `make optimised`."""
    with pytest.raises(AssertionError):
        assert sum([1, 1]) == 3


def test_a_file_appears_when_it_is_whole_and_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, forced = tmp_path / "new" / "file.txt", []
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: forced.append(os.readlink(f"/proc/self/fd/{handle}")) or real(handle)
    )
    atomic.write(file, "old")
    with atomic.replacing(file) as draft:
        draft.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new" and [path.name for path in file.parent.iterdir()] == ["file.txt"]
    assert [Path(path).suffix for path in forced] == [".part", "", ".part", ""]
    assert forced[1] == forced[3] == str(file.parent)


@pytest.mark.parametrize("mistake", [ValueError, KeyboardInterrupt])
def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(mistake: type, tmp_path: Path) -> None:
    atomic.write(tmp_path / "file", b"old")
    with pytest.raises(mistake), atomic.replacing(tmp_path / "file") as draft:
        draft.write_text("new")
        raise mistake
    assert (tmp_path / "file").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_pipe_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    with pytest.raises(DiskError, match="pipe"):
        atomic.write(pipe, b"text")
    assert pipe.is_fifo() and [*tmp_path.iterdir()] == [pipe]


@pytest.mark.parametrize("place", ["/proc/none/file", "/dev/null/file"])
def test_a_place_that_cannot_be_written_is_named(place: str) -> None:
    with pytest.raises(
        DiskError,
        match=rf"{place} cannot be written: (No such file|Not a directory|File exists).*; choose another place",
    ):
        atomic.write(Path(place), "text")


def test_what_killed_writers_left_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    """And nothing else, though it be called much the same."""
    folder, file = (f".{digit * 32}.part" for digit in "1a")
    (tmp_path / "a" / folder).mkdir()
    (tmp_path / "a" / folder / "00000.png").touch()
    (tmp_path / file).touch()
    for name in ("kept.part", ".download.part"):
        (tmp_path / name).touch()
    atomic.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".download.part", "a", "kept.part"]


def test_a_folder_appears_when_all_its_files_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of an older one, which stays when writing fails."""
    forced, real = [], os.fsync
    name = lambda handle: Path(os.readlink(f"/proc/self/fd/{handle}")).name  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda handle: forced.append(name(handle)) or real(handle))
    for text in ("old", "new"):
        with atomic.replacing(tmp_path / "folder") as draft:
            (draft / "inner").mkdir(parents=True)
            (draft / "inner" / text).write_text(text)
    assert {"old", "inner", "new"} <= set(forced)
    with pytest.raises(ValueError), atomic.replacing(tmp_path / "folder") as draft:
        draft.mkdir()
        raise ValueError
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        "folder", "folder/inner", "folder/inner/new",
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", [".mp4", ".gif", "/"])
def test_clips_are_forced_to_the_disk(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forced, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: forced.append(handle) or real(handle))
    write(Video(np.zeros((3, 8, 8, 3), np.uint8), 8.0), f"{tmp_path}/clip{suffix}")
    assert len(forced) == (2 if suffix != "/" else 5)


def test_a_file_that_cannot_be_read_is_not_blamed_on_the_one_that_is_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"), atomic.replacing(tmp_path / "out") as draft:
        draft.write_bytes((tmp_path / "missing").read_bytes())
    assert not list(tmp_path.iterdir())


def damaged(whole: bytes, chance: random.Random) -> bytes:
    """One bit turned, in the head, the tail or anywhere; or the end cut off; or a part of zeros."""
    place = chance.choice([chance.randrange(200), -1 - chance.randrange(200), chance.randrange(len(whole))]) % len(
        whole
    )
    kind = chance.choice(["bit", "bit", "cut", "zeros"])
    if kind == "cut":
        return whole[:place]
    if kind == "zeros":
        return whole[:place] + bytes(min(64, len(whole) - place)) + whole[place + 64 :]
    return whole[:place] + bytes([whole[place] ^ 1 << chance.randrange(8)]) + whole[place + 1 :]


def test_damaged_tensors_are_not_believed(tmp_path: Path) -> None:
    tensors = {"mean": torch.randn(1, 4, 3, 8, 8), "half": torch.randn(5, 3).bfloat16()}
    file, chance = tmp_path / "t.safetensors", random.Random(0)
    cache.write(file, tensors)
    whole = file.read_bytes()
    assert cache.read(tmp_path / "none.safetensors") is None
    for _ in range(300):
        file.write_bytes(bad := damaged(whole, chance))
        found = cache.read(file)
        assert found is None or bad == whole


def test_the_cache_is_made_again_when_it_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEAVIDEO_CACHE", str(tmp_path))
    made = []
    compute = lambda: made.append(1) or {"x": torch.arange(9.0)}  # noqa: E731
    for _ in range(2):
        assert cache.cached("x", compute)["x"].tolist() == list(range(9))
    assert len(made) == 1
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    assert cache.cached("x", compute)["x"].tolist() == list(range(9))
    assert len(made) == 2 and cache.read(file)


def test_a_cache_that_cannot_be_written_costs_time_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEAVIDEO_CACHE", "/dev/null/cache")
    assert cache.cached("x", lambda: {"x": torch.ones(2)})["x"].tolist() == [1, 1]


def test_a_damaged_state_is_not_believed(tmp_path: Path) -> None:
    """torch.load alone takes turned bits for numbers."""
    state = {"number": 3, "parameters": {"a": torch.arange(500.0)}, "ema": None}
    file, chance = tmp_path / "000003.pt", random.Random(0)
    torch.save(state, file)
    whole, refused = file.read_bytes(), 0
    for _ in range(300):
        file.write_bytes(damaged(whole, chance))
        found = _read(file)
        refused += found is None
        assert found is None or (found["number"] == 3 and torch.equal(found["parameters"]["a"], torch.arange(500.0)))
    assert refused > 150  # zips have gaps, where damage does no harm
