"""Inputs of a job: the clip's frames, its latents and the text embedding."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from tuneavideo import video as videos
from tuneavideo.errors import SettingsError, VideoError
from tuneavideo.jobs import plan
from tuneavideo.jobs.session import Moments
from tuneavideo.method.conditioning import Conditions
from tuneavideo.models import codec, devices
from tuneavideo.models.loading import Pipeline
from tuneavideo.settings import Sampling, TuneSettings
from tuneavideo.storage import cache
from tuneavideo.storage.run_folder import RunFolder
from tuneavideo.video import AnyVideo, Span

logger = logging.getLogger(__name__)


def precision_of(settings: TuneSettings) -> str:
    """Return the precision of a tuning: `no`, `fp16` or `bf16`."""
    return devices.precision(settings.mixed_precision, low=settings.memory is not None)


def stored_clip(run: RunFolder) -> tuple[AnyVideo, Moments] | None:
    """Return clip and latents of a run folder; None if one is missing or damaged."""
    if not (run.latents.is_file() and run.source.is_file()):
        return None
    clip = videos.read_any(run.source, run.path)
    moments = cache.read(run.latents)
    return (clip, moments) if moments else None


def read_clip(settings: TuneSettings, span: Span, pipe: Pipeline, folder: Path) -> AnyVideo:
    """Read the frames of a `span`, at a size that the model takes; those of a long clip are in a file in `folder`."""

    def near(width: int, height: int) -> tuple[int, int]:
        side = settings.resolution or codec.default_size(pipe)
        shape = (1, 1) if settings.fit == "stretch" else (width, height)
        return videos.area_size(*shape, area=side**2, multiple=codec.stride(pipe) * 8)

    size = near
    if settings.width and settings.height:
        size = _allowed_size(settings.width, settings.height, codec.stride(pipe))
    clip = videos.read_any(
        settings.video, folder, start=settings.start, stride=span.stride or 1, count=span.count,
        start_time=settings.start_time, sample_fps=settings.sample_fps, size=size, fit=settings.fit,
        fewer=settings.num_frames is None,
    )  # fmt: skip
    check_gif_rate(settings, clip)
    return clip


def check_gif_rate(settings: Sampling, source: AnyVideo) -> None:
    """Raise SettingsError when the edits would be GIFs of a frame rate that the format does not have."""
    fps = settings.fps or source.fps
    if "gif" in settings.formats and fps > videos.FASTEST_GIF:
        raise SettingsError(
            f"formats: a GIF shows at most {videos.FASTEST_GIF} frames a second, the edits would have {fps:g}; set fps"
        )


def _allowed_size(width: int, height: int, multiple: int) -> tuple[int, int]:
    near = [max(1, round(side / multiple)) * multiple for side in (width, height)]
    if near != [width, height]:
        raise SettingsError(
            f"width {width}, height {height}: this base takes multiples of {multiple}; nearest is {near[0]} x {near[1]}"
        )
    return width, height


def encode_clip(pipe: Pipeline, clip: AnyVideo) -> Moments:
    """Return the latents of a clip, from the cache if it has them."""
    name = cache.key("moments", *clip.images, pipe.vae.config.scaling_factor, pipe.vae)
    return cache.cached(name, lambda: codec.encode(pipe, clip))


def encode_text(pipe: Pipeline, prompt: str) -> Conditions:
    encoders = [pipe.text_encoder, getattr(pipe, "text_encoder_2", None)]
    name = cache.key("text", pipe.tokenizer(prompt).input_ids, *encoders)
    tensors = cache.cached(name, lambda: codec.embed(pipe, [prompt]).tensors())
    return Conditions(**tensors, stride=codec.stride(pipe))


def restore_source(run: RunFolder, own: TuneSettings, pipe: Pipeline) -> None:
    """Write a missing `source.mp4` again, from the clip that the run was tuned on."""
    if not Path(own.video).exists():
        raise VideoError(
            f"{run.source} is missing, and so is {own.video}, which it was made from; put one of them back"
        )
    logger.warning("%s is missing; made again from %s", run.source, own.video)
    videos.write(read_clip(own, plan.choose_frames(own), pipe, run.path), run.source)


def warn_of_truncation(pipe: Pipeline, base: str, prompts: Iterable[str]) -> None:
    """Log a warning for each prompt that the text encoder truncates."""
    most = pipe.tokenizer.model_max_length - 2  # without the first and the last token
    for prompt in dict.fromkeys(prompts):
        if cut := codec.truncated_words(pipe, prompt):
            logger.warning(
                "the prompt %r is longer than the %d tokens that the text encoder of %s takes; left out: %r",
                prompt, most, base, cut,
            )  # fmt: skip
