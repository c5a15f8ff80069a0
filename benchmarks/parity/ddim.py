"""Inversion and sampling (DDIM)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.parity.compare import DDIM, LAYER, Difference, absolute, relative, same
from benchmarks.parity.golden import SPACING, Golden, Place, levels, opened
from benchmarks.parity.pipe import decoded
from tuneavideo.method.inflate import VideoUNet
from tuneavideo.method.inversion import invert
from tuneavideo.method.noise import NoiseSchedule, ddim_move, split
from tuneavideo.method.sampling import generate

# name: (what it starts from, what it should and what it should not show)
SAMPLED = {
    r"sampled_g(?P<guidance>.+)": ("inverted", "cond", "uncond"),
    r"sampled_negative_.+_g(?P<guidance>.+)": ("inverted", "cond", "negative"),
    r"sampled_from_(?P<start>noise_seed\d+)_g(?P<guidance>.+)": ("", "cond", "uncond"),
    r"reconstructed_g(?P<guidance>.+)_empty_prompt": ("inverted", "uncond", "uncond"),
}


@dataclass(frozen=True)
class Walk:
    """An inversion or sampling with a model in `steps` steps."""

    video: VideoUNet
    levels: NoiseSchedule
    steps: int

    def inverted(self, x: Tensor, text: Tensor) -> list[Tensor]:
        """Yield the latents of every step of an inversion."""
        grid = self.levels.inversion_grid(self.steps, SPACING)
        return [x, *(step.latents for step in invert(self.video, self.levels, x, text, grid))]

    def sampled(self, x: Tensor, text: Tensor, negative: Tensor, guidance: float) -> list[Tensor]:
        """Yield the latents of every step of a sampling."""
        sampler = self.levels.sampler("ddim", self.steps, spacing=SPACING)
        return [step.latents for step in generate(self.video, sampler, x, text, negative, guidance)]


def ddim(place: Place, golden: Golden) -> Iterator[Difference]:
    """Compare whole inversions and samplings, single steps, and pixels, with the recorded embeddings."""
    known, steps = levels(golden.about["set_alpha_to_one"]), golden.about["steps"]
    walk = Walk(opened(place.model(place.path.stem)), known, steps)
    yield from schedule(golden, known, steps)
    yield from single_steps(golden, known, steps)
    yield from walks(golden, walk)
    for name, match in golden.matching(r"video_g(.+)"):
        if place.pipe:
            yield from decoded(name, place.pipe, golden[f"sampled_g{match[1]}"], golden[name])


def schedule(golden: Golden, known: NoiseSchedule, steps: int) -> Iterator[Difference]:
    """Compare the noise schedule, timesteps and seeded noise."""
    yield relative("alphas_cumprod", known.alphas, golden["alphas_cumprod"], DDIM)
    yield relative("final_alpha_cumprod", known.final_alpha, golden["final_alpha_cumprod"], DDIM)
    grid, sampler = known.inversion_grid(steps, SPACING), known.sampler("ddim", steps, spacing=SPACING)
    yield same("inversion_timesteps", grid, golden["inversion_timesteps"].tolist())
    yield same("sampling_timesteps", sampler.timesteps.tolist(), golden["sampling_timesteps"].tolist())
    for name, match in golden.matching(r"noise_seed(\d+)"):
        drawn = torch.randn(golden[name].shape, generator=torch.Generator().manual_seed(int(match[1])))
        yield absolute(name, drawn, golden[name], LAYER)


def single_steps(golden: Golden, known: NoiseSchedule, steps: int) -> Iterator[Difference]:
    """Compare single steps in both directions with a given prediction."""
    sampler = known.sampler("ddim", steps, spacing=SPACING)
    for name, match in golden.matching(r"unit_ddim_step_t(\d+)"):
        ours = sampler.step(golden["unit_eps"], torch.tensor(int(match[1])), golden["x0"], None)
        yield relative(name, ours, golden[name], DDIM)
    for name, match in golden.matching(r"unit_next_step_t(\d+)"):
        t, before = int(match[1]), int(match[1]) - len(known.alphas) // steps
        alpha = known.alphas[before] if before >= 0 else known.final_alpha
        clean_and_noise = split(golden["x0"], golden["unit_eps"], alpha, known.prediction_type)
        yield relative(name, ddim_move(*clean_and_noise, known.alphas[t]), golden[name], DDIM)


def walks(golden: Golden, walk: Walk) -> Iterator[Difference]:
    """Compare inversions, and samplings from their recorded start."""
    for name, text in {"inverted": "inversion", "inverted_with_prompt": "cond"}.items():
        if name in golden:
            path = walk.inverted(golden["x0"], golden[f"{text}_embedding"])
            yield from along(name, path, golden, name.replace("inverted", "inverted_all"))
    for pattern, (start, text, negative) in SAMPLED.items():
        for name, match in golden.matching(pattern):
            x = golden[match.groupdict().get("start", start)]
            texts = golden[f"{text}_embedding"], golden[f"{negative}_embedding"]
            path = walk.sampled(x, *texts, float(match["guidance"]))
            yield from along(name, path, golden, name.replace("sampled", "sampled_all"))


def along(name: str, path: list[Tensor], golden: Golden, every: str) -> Iterator[Difference]:
    """Compare the end of a trajectory and its steps, if they are recorded."""
    yield relative(name, path[-1], golden[name], DDIM)
    if every != name and every in golden:
        yield same(f"steps of {every}", len(path), len(golden[every]))
        for number, (ours, theirs) in enumerate(zip(path, golden[every], strict=False)):
            yield relative(f"{every}[{number}]", ours, theirs, DDIM)
