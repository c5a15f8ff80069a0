"""Comparison of a tuning with the recorded random numbers, and of its validation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from einops import rearrange
from torch import Tensor

from benchmarks.parity.compare import (
    DDIM,
    FORWARD,
    GRADIENT,
    LOSS,
    REPLAYED_LOSS,
    UPDATE,
    Difference,
    absolute,
    gradients_agree,
    relative,
)
from benchmarks.parity.ddim import Walk
from benchmarks.parity.golden import OFFICIAL, Golden, On, Place, give, image_unet, levels, opened
from benchmarks.parity.pipe import decoded, embedded
from tuneavideo.method.inflate import VideoUNet, added_parameters, inflate
from tuneavideo.method.noise import NoiseSchedule, target
from tuneavideo.method.tuning import Tuning
from tuneavideo.models import codec
from tuneavideo.progress import Step
from tuneavideo.settings import TuneSettings
from tuneavideo.training.optimizers import make_optimizer


class Watched(Accelerator):
    """Recorder of the first step's gradients before clipping, and of the norm of the last step's."""

    def __init__(self) -> None:
        super().__init__(cpu=On.device.type == "cpu", mixed_precision="no")
        self.first: list[Tensor] = []
        self.norm = torch.zeros(())

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: int = 2) -> Tensor:
        parameters = list(parameters)
        self.first = self.first or [parameter.grad.clone() for parameter in parameters]
        self.norm = super().clip_grad_norm_(parameters, max_norm, norm_type)
        return self.norm


class Replay(Tuning):
    """Replacement of random numbers by recorded ones; `seen` has the UNet's inputs and outputs."""

    def __init__(self, video: VideoUNet, known: NoiseSchedule, golden: Golden) -> None:
        text, unused, self.watched = golden["encoder_hidden_states"][0], golden["latents"][0], Watched()
        moments, settings = {"mean": unused, "std": unused}, tune_settings(golden)
        super().__init__(video, known, moments, text, settings, self.watched, make_optimizer)
        self.golden, self.seen = golden, {}
        self.video.unet.register_forward_hook(self._see)

    def draw(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(self.golden[name][self.number] for name in ("latents", "noise", "timesteps"))

    def _is_simple(self) -> bool:
        return False  # a recorded step calls no hooks

    def _see(self, _: Any, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
        for name, x_NCHW in (("noisy_latents", inputs[0]), ("pred", outputs[0])):
            self.seen[name] = rearrange(x_NCHW, "(b t) c h w -> b c t h w", t=self.video.clip.frames)


def train(place: Place, golden: Golden) -> Iterator[Difference]:
    """Compare the start, every step and the end of the published run."""
    known, video = levels(), started(place.model(golden.about["unet"]), golden.under("init."))
    yield relative("alphas_cumprod", known.alphas, golden["alphas_cumprod"], DDIM)
    yield from replayed(golden, known, video)
    if place.pipe and "prompt_ids" in golden:
        texts_BLD = golden["encoder_hidden_states"].flatten(0, 1)
        captions = [golden.about["config"]["train_data"]["prompt"]] * len(texts_BLD)
        yield from embedded(place.pipe, captions, golden["prompt_ids"].expand(len(captions), -1), texts_BLD)
    if place.pipe and "val.latent_in" in golden:
        give(video.unet, golden.under("final."))
        yield from validated(golden, known, video, place.pipe)


def started(folder: Path, init: dict[str, Tensor]) -> VideoUNet:
    """Load the model before tuning: with the temporal weights of its folder, if `init` agrees, or fresh."""
    video = opened(folder)
    weights = added_parameters(video.unet)
    if not all(torch.equal(value, weights[name]) for name, value in init.items() if name in weights):
        video = inflate(image_unet(folder))
    give(video.unet, init)
    return video


def tune_settings(golden: Golden) -> TuneSettings:
    """Return the settings of a recorded run; the published checkpointing froze the down path, as `official` does."""
    config, frozen = golden.about["config"], golden.about["gradient_checkpointing"]
    shared = {name: config[name] for name in TuneSettings.model_fields if name in config}
    rest = {"video": "recorded", "prompt": config["train_data"]["prompt"], "max_train_steps": len(golden["loss"])}
    return TuneSettings(**OFFICIAL | shared | rest | ({} if frozen else {"frozen_modules": ()}))


def replayed(golden: Golden, known: NoiseSchedule, video: VideoUNet) -> Iterator[Difference]:
    """Tune like the published run; frozen weights must stay the same bit for bit."""
    before = {name: value.clone() for name, value in video.unet.state_dict().items()}
    replay = Replay(video, known, golden)
    for index, step in enumerate(replay):
        yield from one_step(index, step, golden, replay)
        if index == 0:
            yield from updates("after_step1.", golden, replay, before)
    gradients = dict(zip(replay.parameters, replay.watched.first, strict=True))
    yield from gradients_agree(gradients, golden.under("grad_step1."))
    yield from updates("final.", golden, replay, before)
    for name, value in video.unet.state_dict().items():
        if name not in replay.parameters:
            yield absolute(f"frozen {name}", value, before[name], 0.0)


def one_step(index: int, step: Step, golden: Golden, replay: Replay) -> Iterator[Difference]:
    """Compare inputs, output and target of the UNet as far as recorded, the loss, and the gradients' norm."""
    clean, noise, t_B = (golden[name][index] for name in ("latents", "noise", "timesteps"))
    wanted = target(clean, noise, replay.alphas[t_B], replay.prediction_type)
    for name, ours in (replay.seen | {"target": wanted}).items():
        if name in golden:
            yield absolute(f"{name}[{index}]", ours, golden[name][index], FORWARD)
    loss = torch.tensor(step.loss)
    yield relative(f"loss[{index}]", loss, golden["loss"][index], REPLAYED_LOSS if index else LOSS)
    yield relative(f"grad_norm[{index}]", replay.watched.norm, golden["grad_norm"][index], GRADIENT)


def updates(prefix: str, golden: Golden, replay: Tuning, before: dict[str, Tensor]) -> Iterator[Difference]:
    """Compare the changes of the weights; those that the published run did not change must be equal."""
    ours = replay.video.unet.state_dict()
    for name, theirs in golden.under(prefix).items():
        if name in replay.parameters:
            yield relative(prefix + name, ours[name] - before[name], theirs - before[name], UPDATE)
        else:
            yield absolute(prefix + name, ours[name], theirs, 0.0)


def validated(
    golden: Golden, known: NoiseSchedule, video: VideoUNet, pipe: StableDiffusionPipeline
) -> Iterator[Difference]:
    """Compare the validation of the published run, each stage from the recorded result of the one before."""
    config, empty = golden.about["config"]["validation_data"], codec.embed(pipe, [""])
    path = Walk(video, known, config["num_inv_steps"]).inverted(golden["val.latent_in"], empty)
    yield relative("val.inverted", path[-1], golden["val.inverted"], DDIM)
    walk = Walk(video, known, config["num_inference_steps"])
    for number, prompt in enumerate(golden.about["val_prompts"]):
        name, clip, text = f"val.sampled_{number}", f"val.video_{number}", codec.embed(pipe, [prompt])
        path = walk.sampled(golden["val.inverted"], text, empty, config["guidance_scale"])
        yield relative(name, path[-1], golden[name], DDIM)
        if clip in golden:
            yield from decoded(clip, pipe, golden[name], golden[clip])
