"""The loop: teach an inflated UNet the motion of one clip (Tune-A-Video, section 4.3)."""

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
from tuneavideo.method import graphs, losses
from tuneavideo.method.conditioning import Conditions
from tuneavideo.method.inflate import VideoUNet, low_rank_parameters, trainable_parameters
from tuneavideo.method.noise import NoiseSchedule, add_noise, target
from tuneavideo.method.windows import Windows
from tuneavideo.progress import Step
from tuneavideo.settings import TuneSettings

# Steps that a tuning takes before one is recorded: they build kernels and show how much memory a step takes.
BEFORE_RECORDING = 2
# How many predictions of the untuned model losses are compared with, and the part of tuning that they may take: 1 / 33.
FEWEST_REFERENCES, MOST_REFERENCES, MEASURING = 4, 16, 33


class Tuning:
    """Tuning of one clip, to be iterated over and, if need be, resumed.

    Random numbers of a step depend on the seed, the process and the step's number only, so a resumed tuning goes on
    as if it had never stopped.

    Args:
        video: The inflated UNet, changed in place.
        noise_schedule: Noise schedule of the base model.
        moments: `mean` and `std` of the clip's latents, `1 C T H W` each.
        text: What the clip shows: conditions of its caption, or the bare embedding `1 L D`.
        settings: See `TuneSettings`.
        accelerator: Owns devices, precision and processes.
        optimizer: Makes the optimizer of the trainable parameters (see `training.optimizers.make_optimizer`).
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
        self.taken, self.peak = 0, 0
        self.recording: graphs.Recording | bool | None = None
        self.gradients = list[Tensor | None]()

    def __iter__(self) -> Iterator[Step]:
        """Tune on from step `number`; yields after every optimiser step.

        Raises:
            RunError: The loss of the weights at hand, or its gradient, is not finite; they are not moved.
        """
        if self.number == 0:
            self.untuned = self.measure_untuned()
        while self.number < self.settings.max_train_steps:
            began = time.perf_counter()
            learned, drawn = zip(*map(self.learn, range(self.settings.gradient_accumulation_steps)), strict=True)
            self._draw_ahead()
            loss, relative = self._losses(torch.stack(learned), torch.cat(drawn))
            self._move(loss)
            self.number += 1
            rate = float(self.schedule.get_last_lr()[0])
            self.taken += 1
            if self.accelerator.device.type == "cuda" and not self.recording:
                self.peak = torch.cuda.max_memory_allocated(self.accelerator.device)
            yield Step(self.number, loss, rate, time.perf_counter() - began, relative_loss=relative)
        self.recording, self.gradients = None, []  # they hold the memory of a step

    def loss(self, clean_BCTHW: Tensor, noise_BCTHW: Tensor, t_B: Tensor) -> Tensor:
        """Return the squared error of the prediction at timesteps `t_B`, in float32, weighted by min-SNR if set."""
        settings, alpha_B = self.settings, self.alphas[t_B]
        noisy = add_noise(clean_BCTHW, noise_BCTHW, alpha_B)
        prediction = self.video(noisy, t_B, self.text.expand(len(t_B))).float()
        wanted = target(clean_BCTHW, noise_BCTHW, alpha_B, self.prediction_type)
        weight_B = losses.min_snr(alpha_B, settings.snr_gamma, self.prediction_type) if settings.snr_gamma else None
        return losses.squared_error(prediction, wanted, weight_B)

    @torch.no_grad()
    def measure_untuned(self) -> Tensor | None:
        """Loss of the weights at hand at every timestep, `L`, from a few predictions at noise and windows of their own.

        None if these predictions would take more than about a `MEASURING`th part of tuning.
        """
        settings, clean = self.settings, self.mean.shape[2]
        clips = settings.max_train_steps * settings.gradient_accumulation_steps * settings.train_batch_size
        count = min(MOST_REFERENCES, 3 * clips // MEASURING)  # a clip that is learned from takes three predictions
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
        return losses.at_every_level(self.alphas, timesteps, torch.stack(errors))

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
            "untuned": None if self.untuned is None else self.untuned.cpu(),
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
        untuned = state.get("untuned")
        self.untuned = None if untuned is None else untuned.to(self.accelerator.device)

    @torch.no_grad()
    def start_from(self, weights: Mapping[str, Tensor], number: int) -> None:
        """Go on after step `number` from tuned weights alone; what the optimiser remembered begins anew."""
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])
        if self.ema:
            self.ema = EMAModel(self.parameters.values(), decay=self.settings.ema_decay)
        self.schedule.last_epoch = self.number = number
        for group, share in zip(self.optimizer.param_groups, self.schedule.lr_lambdas, strict=True):
            group["lr"] = self.settings.learning_rate * share(number)

    def _choose(self, video: VideoUNet) -> dict[str, Any]:
        """Freeze all but the chosen layers, which learn in float32 whatever the rest is kept in."""
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

    def learn(self, batch: int) -> tuple[Tensor, Tensor]:
        """Accumulate the gradients of one batch.

        Returns:
            Its loss, a scalar, and the timestep of each of its clips, shape B.
        """
        clean, noise, t_B = self.ahead.pop((self.number, batch), None) or self.draw(batch)
        if recording := self._recorded(clean, noise, t_B):
            return recording(clean, noise, t_B), t_B
        batches = self.settings.gradient_accumulation_steps
        with nullcontext() if batch + 1 == batches else self.accelerator.no_sync(self.video.unet):
            loss = self.loss(clean, noise, t_B)
            self.accelerator.backward(loss / batches)
        return loss.detach(), t_B

    def _recorded(self, *inputs: Tensor) -> Any:
        """The step of one batch, recorded; none where it is not to be, or not yet."""
        if self.recording is None and self.taken >= BEFORE_RECORDING and self._is_simple():
            self.recording = graphs.recorded(self._loss_and_gradients, inputs) or False
            self.gradients = [parameter.grad for parameter in self.parameters.values()]
            if not self.recording:
                self.optimizer.zero_grad()
        if not self.recording:
            return None
        for parameter, gradient in zip(self.parameters.values(), self.gradients, strict=True):
            parameter.grad = gradient
        return self.recording

    def _loss_and_gradients(self, clean: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
        loss = self.loss(clean, noise, t_B)
        self.accelerator.backward(loss)
        return loss.detach()

    def _is_simple(self) -> bool:
        """Whether a step is one batch, on one GPU whose memory holds a second set of activations."""
        settings, device = self.settings, self.accelerator.device
        if device.type != "cuda" or not graphs.switched_on or settings.memory is not None:
            return False
        if settings.gradient_checkpointing or settings.gradient_accumulation_steps > 1:
            return False
        held = torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - held
        alone = self.accelerator.num_processes == 1 and self.accelerator.scaler is None
        return alone and free > 2 * (self.peak - held)

    def _draw_ahead(self) -> None:
        """On a GPU, what the next step needs, while this one is computed."""
        if self.accelerator.device.type != "cuda" or self.number + 1 >= self.settings.max_train_steps:
            return
        self.number += 1
        for batch in range(self.settings.gradient_accumulation_steps):
            self.ahead[self.number, batch] = self.draw(batch)
        self.number -= 1

    def _move(self, loss: float) -> None:
        """Move the weights, unless that would spoil them."""
        clipped: Any = self.accelerator.clip_grad_norm_(self.parameters.values(), self.settings.max_grad_norm)
        norm = float(clipped)
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

    def _generator(self, batch: int) -> torch.Generator:
        place = (self.settings.seed, self.accelerator.process_index, self.number, batch)
        return torch.Generator().manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0] >> 1))

    def _over_processes(self, values: Tensor) -> float:
        return float(torch.as_tensor(self.accelerator.gather(values)).mean())

    def _losses(self, learned_A: Tensor, drawn_N: Tensor) -> tuple[float, float | None]:
        """Mean loss of a step's batches in all processes, and its ratio to that of the untuned model, if known.

        Both are read at once: every reading waits for the device.
        """
        if self.untuned is None:
            return self._over_processes(learned_A), None
        expected = self.untuned[drawn_N].mean().expand_as(learned_A)
        gathered = torch.as_tensor(self.accelerator.gather(torch.stack([learned_A, expected])[None]))
        loss, untuned = gathered[:, 0].flatten().mean(), gathered[:, 1].mean()
        told, ratio = torch.stack([loss, loss / untuned]).tolist()
        return told, ratio

    def draw(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents from the posterior, noise of every frame, and one timestep a clip; of a long clip a random window."""
        settings, generator = self.settings, self._generator(batch)
        frames = self._window(generator)
        mean, std = self.mean[:, :, frames], self.std[:, :, frames]
        shape = (settings.train_batch_size, *mean.shape[1:])
        sample, noise = (torch.randn(shape, generator=generator) for _ in range(2))
        t_B = torch.randint(len(self.alphas), shape[:1], generator=generator)
        sample, noise, t_B = (x.to(mean.device) for x in (sample, noise, t_B))
        return mean + std * sample, noise, t_B

    def _window(self, generator: torch.Generator) -> slice | list[int]:
        """All frames, or those of a random window with the clip's first frame in front (see `Windows.around`)."""
        frames = self.mean.shape[2]
        windows = Windows.of(self.settings, frames)
        if windows.holds(frames):
            return slice(None)
        return windows.around(int(torch.randint(1, frames, (), generator=generator)), frames)
