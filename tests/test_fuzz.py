"""Damaged clips and settings are read or refused in one line: no traceback, no hang, no crash, no gigabyte."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from tests.fuzz import KINDS, ends, mutated, read_settings, tried
from tuneavideo.config import as_yaml
from tuneavideo.settings import TuneSettings

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux"),
]


@pytest.mark.parametrize(
    "copies", [pytest.param(12, id="a dozen"), pytest.param(300, id="three hundred", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_clip_is_read_or_refused(kind: str, copies: int, tmp_path: Path) -> None:
    found = ends(kind, range(copies), tmp_path)
    counts = {end: len(seeds) for end, seeds in found.items()}
    print(f"{kind}: {counts}")
    assert set(found) == {"read", "refused"}, found
    assert sum(counts.values()) == copies


def test_a_damaged_clip_that_made_threads_wait_for_ever_is_read(tmp_path: Path) -> None:
    assert ends("hevc.mp4", [95], tmp_path)["read"] == [95]


def test_a_mutated_yaml_file_is_settings_or_refused(tmp_path: Path) -> None:
    whole = TuneSettings(video="clip.mp4", prompt="a man is skiing", edit=("a bear", "a: b # c"), seeds=(1,))
    chance, text, path, ends = random.Random(0), as_yaml(whole), tmp_path / "s.yaml", Counter[str]()
    for _ in range(200):
        path.write_bytes(mutated(text, chance))
        ends[tried(read_settings, path, tmp_path / "log")] += 1
    print(ends)
    assert set(ends) == {"read", "refused"} and 10 < ends["read"] < 100
