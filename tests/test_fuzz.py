"""Damaged clips are read or refused in one line: no traceback, no hang, no crash, no gigabyte."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import KINDS, ends

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")


@pytest.mark.parametrize(
    "copies", [pytest.param(12, id="a dozen"), pytest.param(300, id="three hundred", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_clip_is_read_or_refused(kind: str, copies: int, tmp_path: Path) -> None:
    found = ends(kind, copies, tmp_path)
    told = {end: len(seeds) for end, seeds in found.items()}
    print(f"{kind}: {told}")
    assert set(found) == {"read", "refused"}, found
    assert sum(told.values()) == copies
