"""Damaged checkpoints and YAML files are read or refused in one line: no other error, no hang, no gigabyte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux"),
]


def test_a_damaged_checkpoint_is_read_or_refused() -> None:
    """`MUTATIONS=500` makes five hundred copies."""
    copies = int(os.environ.get("MUTATIONS", 63))
    command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz_checkpoints", str(copies)]
    done = subprocess.run(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1], text=True, check=True)
    ends = json.loads(done.stdout.splitlines()[-1])
    assert set(ends) <= {"read", "refused"}, ends
    assert sum(ends.values()) == copies
    assert ends["refused"] > copies / 3, "damage is seen"
    assert ends["read"], "and not everything is refused"
