"""Damaged clips are read or refused in one line: no traceback, no hang, no crash, no gigabyte."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import KINDS

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")


@pytest.mark.parametrize(
    "copies", [pytest.param(12, id="a dozen"), pytest.param(300, id="three hundred", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_clip_is_read_or_refused(kind: str, copies: int) -> None:
    command = [sys.executable, "-m", "tests.fuzz", kind, str(copies)]
    done = subprocess.run(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1], text=True, check=True)
    ends = json.loads(done.stdout)
    assert set(ends) <= {"read", "refused"}, ends
    assert sum(ends.values()) == copies
