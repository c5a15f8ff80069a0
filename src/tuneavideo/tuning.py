"""The loop: teach an inflated UNet the motion of one clip (Tune-A-Video, section 4.3)."""

from __future__ import annotations

import importlib
import inspect
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.nn.functional import mse_loss

from tuneavideo.adapter import tuned_parameters
from tuneavideo.errors import MissingExtra, RunError, SettingsError
from tuneavideo.inflate import VideoUNet
from tuneavideo.models import memory
from tuneavideo.noise import Levels, add_noise, target
from tuneavideo.progress import Step
from tuneavideo.reels import Reel
from tuneavideo.settings import TuneSettings
from tuneavideo.windows import Windows

OPTIMIZERS = {
    "adamw": "torch.optim.AdamW",
    "adamw8bit": "bitsandbytes.optim.AdamW8bit",
    "adafactor": "transformers.optimization.Adafactor",
}


class Tuning:
    """Tuning of one clip, to be iterated over and, if need be, resumed.

    Random numbers of a step depend on the seed, the process and the step's number only, so a resumed tuning goes on
    as if it had never stopped.

    Args:
        video: The inflated UNet, changed in place.
        levels: Noise levels of the base.
        moments: `mean` and `std` of the clip's latents, `1 C T H W` each; those of a long clip stay on the disk.
        text: Embedding of the caption, `1 L D`.
        settings: See `TuneSettings`.
        accelerator: Owns devices, precision and processes.
    """

    def __init__(
        self,
        video: VideoUNet,
        levels: Levels,
        moments: Mapping[str, Tensor | Reel],
        text: Tensor,
        settings: TuneSettings,
        accelerator: Accelerator,
    ) -> None:
        self.settings, self.accelerator = settings, accelerator
        self.parameters = self._choose(video)
        optimizer = _optimizer(settings, list(self.parameters.values()))
        unet, self.optimizer = accelerator.prepare(video.unet, optimizer)
        self.schedule = get_scheduler(
            settings.lr_scheduler,
            optimizer,
            num_warmup_steps=settings.lr_warmup_steps,
            num_training_steps=settings.max_train_steps,
        )
        self.video = VideoUNet(unet, video.clip)
        self.ema = EMAModel(self.parameters.values(), decay=settings.ema_decay) if settings.use_ema else None
        device = accelerator.device
        self.alphas, self.prediction_type = levels.alphas.to(device), levels.prediction_type
        self.mean, self.std, self.text = moments["mean"].to(device), moments["std"].to(device), text.to(device)
        self.number = 0

    def __iter__(self) -> Iterator[Step]:
        """Tune on from step `number`; yields after every optimiser step.

        Raises:
            RunError: The loss of the weights at hand, or its gradient, is not finite; they are not moved.
        """
        while self.number < self.settings.max_train_steps:
            began = time.perf_counter()
            losses = [self._learn(batch) for batch in range(self.settings.gradient_accumulation_steps)]
            loss = float(torch.as_tensor(self.accelerator.gather(torch.stack(losses))).mean())
            self._move(loss)
            self.number += 1
            rate = float(self.schedule.get_last_lr()[0])
            yield Step(self.number, loss, rate, time.perf_counter() - began, memory(self.accelerator.device))

    def loss(self, clean_BCTHW: Tensor, noise_BCTHW: Tensor, t_B: Tensor) -> Tensor:
        """Mean squared error of the prediction at timesteps `t_B` (DDPM, eq. 14), in float32."""
        alpha_B = self.alphas[t_B]
        noisy = add_noise(clean_BCTHW, noise_BCTHW, alpha_B)
        text_BLD = self.text.expand(len(t_B), -1, -1)
        prediction = self.video(noisy, t_B, text_BLD)
        return mse_loss(prediction.float(), target(clean_BCTHW, noise_BCTHW, alpha_B, self.prediction_type))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the UNet has the weights that would be kept: with EMA, the averaged ones."""
        if self.ema:
            self.ema.store(self.parameters.values())
            self.ema.copy_to(self.parameters.values())
        try:
            yield
        finally:
            if self.ema:
                self.ema.restore(self.parameters.values())

    def learned(self) -> dict[str, Tensor]:
        """The tuned tensors as they are to be kept: averaged, if EMA is on."""
        if self.ema:
            return dict(zip(self.parameters, self.ema.shadow_params, strict=True))
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def state(self) -> dict[str, Any]:
        """Everything needed to go on from here."""
        scaler = self.accelerator.scaler
        return {
            "number": self.number,
            "parameters": {name: parameter.detach().cpu() for name, parameter in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "scaler": scaler.state_dict() if scaler else None,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned, at the learning rate of the settings."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.schedule.base_lrs = [self.settings.learning_rate for _ in self.schedule.base_lrs]
        for group, share in zip(self.optimizer.param_groups, self.schedule.lr_lambdas, strict=True):
            group["lr"] = self.settings.learning_rate * share(self.schedule.last_epoch)
        if self.ema:
            self.ema.load_state_dict(state["ema"])
            self.ema.to(self.accelerator.device)
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.number = state["number"]

    def _choose(self, video: VideoUNet) -> dict[str, Any]:
        """Freeze all but the chosen layers, which learn in float32 whatever the rest is kept in."""
        video.unet.requires_grad_(False).train()
        chosen = tuned_parameters(video.unet, self.settings.trainable_modules, self.settings.frozen_modules)
        for parameter in chosen.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        if self.settings.gradient_checkpointing:
            video.unet.enable_gradient_checkpointing()
        return chosen

    def _learn(self, batch: int) -> Tensor:
        """Loss and gradients of one batch."""
        last = batch + 1 == self.settings.gradient_accumulation_steps
        with nullcontext() if last else self.accelerator.no_sync(self.video.unet):
            loss = self.loss(*self.draw(batch))
            self.accelerator.backward(loss / self.settings.gradient_accumulation_steps)
        return loss.detach()

    def _move(self, loss: float) -> None:
        """Move the weights, unless that would spoil them."""
        clipped: Any = self.accelerator.clip_grad_norm_(self.parameters.values(), self.settings.max_grad_norm)
        norm = float(clipped)
        skipped = self.accelerator.scaler is not None  # the scaler of fp16 leaves out steps that overflow
        if not math.isfinite(loss) or not (skipped or math.isfinite(norm)):
            raise RunError(
                f"the loss is {loss:g}, its gradient {norm:g} at step {self.number + 1}; go on from a state before it "
                f"with a lower learning_rate (now {self.settings.learning_rate:g}) or another mixed_precision (now "
                f"{self.accelerator.mixed_precision})"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        if self.ema:
            self.ema.step(self.parameters.values())

    def draw(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents from the posterior, noise of every frame, and one timestep a clip; of a long clip a random window."""
        generator = self.generator(batch)
        frames = self._window(generator)
        mean, std = self.mean[:, :, frames], self.std[:, :, frames]
        shape = (self.settings.train_batch_size, *mean.shape[1:])
        sample, noise = (torch.randn(shape, generator=generator).to(mean.device) for _ in range(2))
        t_B = torch.randint(len(self.alphas), shape[:1], generator=generator).to(mean.device)
        return mean + std * sample, noise, t_B

    def generator(self, batch: int) -> torch.Generator:
        """Random numbers of a batch of the step at hand."""
        place = (self.settings.seed, self.accelerator.process_index, self.number, batch)
        return torch.Generator().manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0] >> 1))

    def _window(self, generator: torch.Generator) -> slice | list[int]:
        """All frames, or those of a random window as they lie in the clip, with its first frame in front."""
        frames = self.mean.shape[2]
        windows = Windows.of(self.settings, frames)
        if windows.holds(frames):
            return slice(None)
        length = windows.size - 1
        begin = int(torch.randint(1, frames - length + 1, (), generator=generator))
        return [0, *range(begin, begin + length)]


def _optimizer(settings: TuneSettings, parameters: list[Any]) -> torch.optim.Optimizer:
    path = OPTIMIZERS.get(settings.optimizer, settings.optimizer)
    package, _, name = path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(package), name)
    except (ImportError, AttributeError, ValueError) as error:
        if settings.optimizer == "adamw8bit":
            raise MissingExtra("The 8-bit optimizer", "8bit") from None
        known = ", ".join(OPTIMIZERS)
        raise SettingsError(
            f"optimizer {settings.optimizer!r}: {error}; known are {known} and any package.Class"
        ) from None
    wished = {
        "lr": settings.learning_rate,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "weight_decay": settings.adam_weight_decay,
        "eps": settings.adam_epsilon,
        "relative_step": False,
        "fused": True,
    }
    taken = inspect.signature(kind).parameters
    if isinstance(taken.get("eps") and taken["eps"].default, tuple):
        del wished["eps"]  # Adafactor's eps is a pair of another meaning
    if not issubclass(kind, torch.optim.Optimizer):
        raise SettingsError(f"optimizer {settings.optimizer!r} is no torch.optim.Optimizer; name a class that is one")
    return kind(parameters, **{name: value for name, value in wished.items() if name in taken})
