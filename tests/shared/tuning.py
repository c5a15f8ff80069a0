"""Parts of the tests of tuning that others use."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler

from tests.conftest import image_unet
from tests.shared.noise import STABLE
from tuneavideo.method.inflate import inflate
from tuneavideo.method.noise import NoiseSchedule
from tuneavideo.method.tuning import Tuning
from tuneavideo.settings import TuneSettings
from tuneavideo.training.optimizers import make_optimizer


def tuning(
    frames: int = 3, prediction: str = "epsilon", accelerator: Accelerator | None = None, **changes: Any
) -> Tuning:
    torch.manual_seed(8)
    settings = TuneSettings(**({"video": "-", "prompt": "-", "learning_rate": 1e-2, "max_train_steps": 4} | changes))
    moments = {"mean": torch.randn(1, 4, frames, 8, 8), "std": torch.full((1, 4, frames, 8, 8), 0.1)}
    video = inflate(image_unet(), settings.inflation)
    text = torch.randn(1, 5, 24)
    noise_schedule = NoiseSchedule.of(DDIMScheduler(**STABLE, prediction_type=prediction))
    return Tuning(video, noise_schedule, moments, text, settings, accelerator or Accelerator(cpu=True), make_optimizer)
