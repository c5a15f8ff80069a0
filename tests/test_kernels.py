"""Triton kernels against torch's operations, by Triton's interpreter on a CPU (where Triton is installed)."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from tuneavideo import kernels


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_kernels_compute_what_torch_does():
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}  # read when Triton is imported
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernel_cases"], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    errors = json.loads(run.stdout.splitlines()[-1])
    assert len(errors) >= 12
    assert not {name: found for name, found in errors.items() if found > 1e-5}


def test_kernels_do_not_take_tensors_of_a_cpu():
    assert not kernels.supports(torch.ones(2, 2))
