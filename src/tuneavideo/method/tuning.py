"""The training loop on one clip (Tune-A-Video, section 4.3)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor

from tuneavideo.errors import RunError
from tuneavideo.kernels import graphs, is_asynchronous
from tuneavideo.method import losses
from tuneavideo.method.conditioning import Conditions
from tuneavideo.method.inflate import VideoUNet, low_rank_parameters, trainable_parameters
from tuneavideo.method.noise import NoiseSchedule, add_noise, target
from tuneavideo.method.windows import Windows
from tuneavideo.progress import Step
from tuneavideo.settings import TuneSettings

# Least and largest number of the untuned model's predictions; they may take 1 / 33 of the tuning.
FEWEST_REFERENCES, MOST_REFERENCES, MEASURING = 4, 16, 33


class Tuning:
    """Tuning on one clip; iterate over it for its steps.

    Random numbers of a step depend on the seed, the process and the step's number only, so a resumed tuning equals an
    uninterrupted one.

    Args:
        video: The inflated UNet, changed in place.
        noise_schedule: Noise schedule of the base model.
        moments: `mean` and `std` of the clip's latents, `1 C T H W` each.
        text: Conditions of the clip's caption, or its text embedding `1 L D` alone.
        settings: See `TuneSettings`.
        accelerator: Device, precision and processes.
        optimizer: Makes the optimizer of the trainable parameters (see `training.optimizers.make_optimizer`).

    Raises:
        SettingsError: `trainable_modules` or `frozen_modules` name no layer.
    """

    def __init__(
        self,
        video: VideoUNet,
        noise_schedule: NoiseSchedule,
        moments: Mapping[str, Tensor],
        text: Conditions | Tensor,
        settings: TuneSettings,
        accelerator: Accelerator,
        optimizer: Callable[[TuneSettings, list[Any]], torch.optim.Optimizer],
    ) -> None:
        self.settings, self.accelerator = settings, accelerator
        self.parameters = self._choose(video)
        chosen = optimizer(settings, list(self.parameters.values()))
        self.schedule = get_scheduler(
            settings.lr_scheduler,
            chosen,
            num_warmup_steps=settings.lr_warmup_steps,
            num_training_steps=settings.max_train_steps,
        )
        unet, self.optimizer = accelerator.prepare(video.unet, chosen)
        self.video = VideoUNet(unet, video.clip)
        self.ema = EMAModel(self.parameters.values(), decay=settings.ema_decay) if settings.use_ema else None
        device = accelerator.device
        self.alphas, self.prediction_type = noise_schedule.alphas.to(device), noise_schedule.prediction_type
        self.mean, self.std = moments["mean"].to(device), moments["std"].to(device)
        self.text = Conditions.of(text).to(device)
        self.number = 0
        self.untuned: Tensor | None = None  # loss at every timestep before tuning
        self.ahead = dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]]()
        simple = (
            settings.memory is None and not settings.gradient_checkpointing
            and settings.gradient_accumulation_steps == 1 and accelerator.num_processes == 1
            and accelerator.scaler is None
        )  # fmt: skip
        self.recorder = graphs.StepRecorder(self._loss_and_gradients, self.parameters.values(), device, allowed=simple)

    def __iter__(self) -> Iterator[Step]:
        """Train from step `number` on; yields after every optimiser step.

        Raises:
            RunError: The loss or its gradient is not finite; the weights are not updated.
        """
        if self.number == 0:
            self.untuned = self.measure_untuned()
        while self.number < self.settings.max_train_steps:
            began = time.perf_counter()
            batch_losses, timesteps = zip(
                *map(self.accumulate, range(self.settings.gradient_accumulation_steps)), strict=True
            )
            norm = self.clip()
            self._draw_ahead()
            loss, relative, norm = self._transferred(torch.stack(batch_losses), torch.cat(timesteps), norm)
            self.update(loss, norm)
            self.number += 1
            rate = float(self.schedule.get_last_lr()[0])
            self.recorder.finish_step()
            yield Step(self.number, loss, rate, time.perf_counter() - began, relative_loss=relative)
        self.recorder.release()

    def loss(self, clean_BCTHW: Tensor, noise_BCTHW: Tensor, t_B: Tensor) -> Tensor:
        """Return the squared error of the prediction at timesteps `t_B`, in float32, weighted by min-SNR if set."""
        settings, alpha_B = self.settings, self.alphas[t_B]
        noisy = add_noise(clean_BCTHW, noise_BCTHW, alpha_B)
        prediction = self.video(noisy, t_B, self.text.expand(len(t_B))).float()
        expected = target(clean_BCTHW, noise_BCTHW, alpha_B, self.prediction_type)
        weight_B = losses.min_snr(alpha_B, settings.snr_gamma, self.prediction_type) if settings.snr_gamma else None
        return losses.squared_error(prediction, expected, weight_B)

    @torch.no_grad()
    def measure_untuned(self) -> Tensor | None:
        """Return the loss of the current weights at every timestep, `L`, interpolated from a few predictions.

        None if these predictions would take more than about 1 / `MEASURING` of the tuning.
        """
        settings, clean = self.settings, self.mean.shape[2]
        clips = settings.max_train_steps * settings.gradient_accumulation_steps * settings.train_batch_size
        count = min(MOST_REFERENCES, 3 * clips // MEASURING)  # training on a clip costs about three predictions
        if count < FEWEST_REFERENCES:
            return None
        generator, errors = torch.Generator().manual_seed(settings.seed), []
        windows, timesteps = Windows.of(settings, clean), losses.reference_timesteps(len(self.alphas), count)
        for number, t in enumerate(timesteps):
            middle = 1 + (2 * number + 1) * (clean - 1) // (2 * count)
            frames = slice(None) if windows.holds(clean) else windows.around(middle, clean)
            mean, std = self.mean[:, :, frames], self.std[:, :, frames]
            sample, noise = (torch.randn(mean.shape, generator=generator).to(mean.device) for _ in range(2))
            t_B = torch.tensor([t]).to(mean.device)
            errors.append(self.loss(mean + std * sample, noise, t_B))
        return losses.interpolate(self.alphas, timesteps, torch.stack(errors))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Give the UNet the weights that would be saved, with EMA the averaged ones, within the context."""
        if self.ema:
            self.ema.store(self.parameters.values())
            self.ema.copy_to(self.parameters.values())
        try:
            yield
        finally:
            if self.ema:
                self.ema.restore(self.parameters.values())

    def learned(self) -> dict[str, Tensor]:
        """Return the tuned tensors by name; averaged ones if EMA is on."""
        if self.ema:
            return dict(zip(self.parameters, self.ema.shadow_params, strict=True))
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def state(self) -> dict[str, Any]:
        """Return all that is needed to continue from the current step."""
        scaler = self.accelerator.scaler
        return {
            "number": self.number,
            "parameters": {name: parameter.detach().cpu() for name, parameter in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "scaler": scaler.state_dict() if scaler else None,
            "untuned": None if self.untuned is None else self.untuned.cpu(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned, at the learning rate of the settings."""
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
        untuned = state.get("untuned")
        self.untuned = None if untuned is None else untuned.to(self.accelerator.device)

    @torch.no_grad()
    def start_from(self, weights: Mapping[str, Tensor], number: int) -> None:
        """Continue after step `number` from tuned weights alone, with a new optimiser state."""
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])
        if self.ema:
            self.ema = EMAModel(self.parameters.values(), decay=self.settings.ema_decay)
        self.schedule.last_epoch = self.number = number
        for group, share in zip(self.optimizer.param_groups, self.schedule.lr_lambdas, strict=True):
            group["lr"] = self.settings.learning_rate * share(number)

    def _choose(self, video: VideoUNet) -> dict[str, Any]:
        """Freeze all parameters but the trainable ones, which are kept in float32; return these by name."""
        video.unet.to(self.accelerator.device).requires_grad_(False).train()
        settings, names = self.settings, (self.settings.trainable_modules, self.settings.frozen_modules)
        if settings.lora_rank:
            chosen = low_rank_parameters(video.unet, *names, settings.lora_rank, settings.seed)
        else:
            chosen = trainable_parameters(video.unet, *names)
        for parameter in chosen.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        if self.settings.gradient_checkpointing:
            video.unet.enable_gradient_checkpointing()
        return chosen

    def accumulate(self, batch: int) -> tuple[Tensor, Tensor]:
        """Accumulate the gradients of a batch; returns its loss, a scalar, and its timesteps, shape B."""
        clean, noise, t_B = self.ahead.pop((self.number, batch), None) or self.draw(batch)
        if (loss := self.recorder(clean, noise, t_B)) is not None:
            return loss, t_B
        batches = self.settings.gradient_accumulation_steps
        with nullcontext() if batch + 1 == batches else self.accelerator.no_sync(self.video.unet):
            loss = self.loss(clean, noise, t_B)
            self.accelerator.backward(loss / batches)
        return loss.detach(), t_B

    def _loss_and_gradients(self, clean: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
        loss = self.loss(clean, noise, t_B)
        self.accelerator.backward(loss)
        return loss.detach()

    def _draw_ahead(self) -> None:
        """Draw the random numbers of the next step while an asynchronous device computes this one."""
        if not is_asynchronous(self.accelerator.device) or self.number + 1 >= self.settings.max_train_steps:
            return
        self.number += 1
        for batch in range(self.settings.gradient_accumulation_steps):
            self.ahead[self.number, batch] = self.draw(batch)
        self.number -= 1

    def clip(self) -> Tensor:
        """Clip the gradients to `max_grad_norm`; returns their norm before."""
        norm: Any = self.accelerator.clip_grad_norm_(self.parameters.values(), self.settings.max_grad_norm)
        return norm

    def update(self, loss: float, norm: float) -> None:
        """Update the weights with clipped gradients, unless loss or norm are not finite."""
        skipped = self.accelerator.scaler is not None  # the scaler of fp16 leaves out steps that overflow
        if not math.isfinite(loss) or not (skipped or math.isfinite(norm)):
            raise RunError(
                f"the loss is {loss:g}, its gradient {norm:g} at step {self.number + 1}; go on from a state before it "
                f"with a lower learning_rate (now {self.settings.learning_rate:g}) or another mixed_precision (now "
                f"{self.accelerator.mixed_precision})",
                resume_flags=f"--learning-rate {self.settings.learning_rate / 10:.6g}",
            )
        scaler = self.accelerator.scaler
        scale = scaler.get_scale() if scaler else 0.0
        self.optimizer.step()
        self.optimizer.zero_grad()
        if scaler and scaler.get_scale() < scale:  # accelerate does not notice what a fused optimizer skips itself
            return
        self.schedule.step()
        if self.ema:
            self.ema.step(self.parameters.values())

    def _generator(self, batch: int, index: int) -> torch.Generator:
        """Return the generator of the sample `index` of a batch; the samples of all processes are counted together."""
        sample = self.accelerator.process_index * self.settings.train_batch_size + index
        place = (self.settings.seed, sample, self.number, batch)
        return torch.Generator().manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0] >> 1))

    def _transferred(self, loss_A: Tensor, t_N: Tensor, norm: Tensor) -> tuple[float, float | None, float]:
        """Return the mean loss over batches and processes, its ratio to the untuned model's, if known, and `norm`.

        All are transferred at once: each transfer waits for the device.
        """
        expected = [] if self.untuned is None else [self.untuned[t_N].mean().expand_as(loss_A)]
        gathered = torch.as_tensor(self.accelerator.gather(torch.stack([loss_A, *expected])[None]))
        mean = gathered[:, 0].flatten().mean()
        ratios = [mean / gathered[:, 1].mean()] if expected else []
        loss, *ratio, length = torch.stack([mean, *ratios, norm.to(mean)]).tolist()
        return loss, ratio[0] if ratio else None, length

    def draw(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draw latents from the posterior, noise, and a timestep per clip; of a long clip for a random window."""
        generators = [self._generator(batch, index) for index in range(self.settings.train_batch_size)]
        frames = self._window(generators[0])
        mean, std = self.mean[:, :, frames], self.std[:, :, frames]
        draws = [
            (
                *(torch.randn(mean.shape, generator=each) for _ in range(2)),
                torch.randint(len(self.alphas), (1,), generator=each),
            )
            for each in generators
        ]
        sample, noise, t_B = map(torch.cat, zip(*draws, strict=True))
        sample, noise, t_B = (x.to(mean.device) for x in (sample, noise, t_B))
        return mean + std * sample, noise, t_B

    def _window(self, generator: torch.Generator) -> slice | list[int]:
        """Return all frames, or those of a random window (see `Windows.around`)."""
        frames = self.mean.shape[2]
        windows = Windows.of(self.settings, frames)
        if windows.holds(frames):
            return slice(None)
        return windows.around(int(torch.randint(1, frames, (), generator=generator)), frames)
