"""Triton kernels against torch's operations, by Triton's interpreter on a CPU (where Triton is installed)."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tuneavideo import kernels

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def interpreted(module: str) -> Any:
    """Return what a module prints as JSON when Triton's interpreter runs the kernels."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}  # read when Triton is imported
    run = subprocess.run([sys.executable, "-m", module], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


@needs_triton
def test_kernels_compute_what_torch_does():
    errors = interpreted("tests.kernel_cases")
    assert len(errors) >= 12
    assert not {name: found for name, found in errors.items() if found > 1e-5}


@pytest.mark.long
@needs_triton
def test_no_feature_map_changes_its_layout_between_kernels():
    counts = interpreted("tests.kernel_counts")
    for name in ("guided", "injected"):
        assert counts[name]["error"] < 1e-5
        assert counts[name]["kernels"] > 100
        assert sum(counts[name]["layouts"].values()) == 1  # a clip becomes a batch of images
        assert len(counts[name]["casts"]) == 1  # the timesteps
    step = counts["step"]
    assert sum(step["casts"].values()) <= 20
    assert step["weights"] <= 3 * step["trained"]
    assert step["transfers"] == 1


def test_kernels_do_not_take_tensors_of_a_cpu():
    assert not kernels.supports(torch.ones(2, 2))
