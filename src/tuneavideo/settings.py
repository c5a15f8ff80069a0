"""Options of a job, their defaults, and presets. No torch here."""

from __future__ import annotations

import logging
import re
import types
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

logger = logging.getLogger(__name__)

Share = Annotated[float, Field(ge=0, le=1)]


def _split(seeds: Any) -> Any:
    """Split words such as `1,2,3`."""
    seeds = (seeds,) if isinstance(seeds, str) else seeds
    if not isinstance(seeds, list | tuple):
        return seeds
    parts = [each.split(",") if isinstance(each, str) else [each] for each in seeds]
    return tuple(part for each in parts for part in each if part != "")


def _seconds(time: Any) -> Any:
    """Turn a time such as `19:50` or `1:02:03.5` into seconds."""
    if not isinstance(time, str) or not re.fullmatch(r"(\d+:){1,2}\d+(\.\d*)?", time):
        return time
    total = 0.0
    for part in time.split(":"):
        total = 60 * total + float(part)
    return total


# A seed that is given twice makes one edit: the second would be the same.
Seeds = Annotated[
    tuple[NonNegativeInt, ...], BeforeValidator(_split), AfterValidator(lambda seeds: tuple(dict.fromkeys(seeds)))
]


Seconds = Annotated[NonNegativeFloat | None, BeforeValidator(_seconds)]

_PLAIN = {"use_karras_sigmas": False}


SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    # name: (diffusers scheduler, what is set beyond the base's own scheduler config)
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", **_PLAIN}),
    "dpm++-karras": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", _PLAIN),
    "deis": ("DEISMultistepScheduler", _PLAIN),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", _PLAIN),
    "heun": ("HeunDiscreteScheduler", {"clip_sample": False, **_PLAIN}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
}


# Samplers whose steps are not those of a DDIM inversion of as many steps.
OTHER_LEVELS = {"dpm++-karras", "plms", "heun"}


STOCHASTIC_SAMPLERS = {"euler-ancestral"}


class Inflation(NamedTuple):
    """How an image UNet is made to see clips (see `inflate`)."""

    references: tuple[str, ...] = ("first", "previous")
    clip_norm: bool = True
    temporal_init: str = "zero"


class Settings(BaseModel):
    """Frozen; unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _choices_in_any_case(cls, value: Any, info: ValidationInfo) -> Any:
        return _as_chosen(cls.model_fields[str(info.field_name)].annotation, value)


class Sampling(Settings):
    """How an edit is made."""

    num_inference_steps: PositiveInt = 50
    """Denoising steps of an edit."""
    num_inv_steps: PositiveInt | None = None
    """Steps of the DDIM inversion that finds the noise the clip came from; none: as many as denoising steps."""
    guidance_scale: NonNegativeFloat = 12.5
    """Classifier-free guidance; 1 turns it off."""
    negative_prompt: str = ""
    """What the edits should not show."""
    guidance_interval: tuple[Share, Share] = (0.0, 1.0)
    """Guidance only between these shares of the steps; elsewhere a step costs half."""
    attention_injection: Share = 0.6
    """Share of the first steps in which edits look where the clip does: keeps its motion and layout, resists change."""
    sampler: Literal["ddim", "dpm++", "dpm++-karras", "unipc", "deis", "plms", "euler", "heun", "euler-ancestral"] = (
        "ddim"
    )
    """Sampler of the edits."""
    timestep_spacing: Literal["leading", "trailing"] | None = "trailing"
    """Where the steps lie: trailing starts at the last noise level whatever their number; none: as the base says."""
    strength: Annotated[float, Field(gt=0, le=1)] = 1.0
    """How far an edit may go: 1 starts from the whole inversion, less from a less noisy point of it."""
    fresh_noise: Share = 0.0
    """Share of new noise mixed into the inverted noise: 0 keeps the clip's layout, 1 forgets it."""
    seeds: Seeds = (0,)
    """One edit per prompt and seed; seeds differ only with fresh noise or a sampler that adds noise."""
    batch_guidance: bool = True
    """Both halves of guidance in one batch; off: one after the other, in less memory."""
    batch_prompts: PositiveInt = 1
    """Edits made together in one batch, in as many times the memory."""
    feature_reuse: PositiveInt = 1
    """Inner features are computed at every so many steps of an edit and used again in between; 1: at every step."""
    fps: PositiveFloat | None = None
    """Frame rate of the edits (that of frames taken: sample_fps), without sound; none: that of the frames taken, with
    the source's sound."""
    formats: tuple[Literal["mp4", "gif", "frames"], ...] = ("mp4",)
    """Files to write of each edit."""

    window: Annotated[int, Field(ge=2)] | None = None
    """Frames that the model sees at once, in tuning and in editing; none: all, or as many as `memory` allows."""
    window_overlap: NonNegativeInt | None = None
    """Frames that neighbouring windows of a longer clip share; none: a third of the window."""

    @property
    def inversion_steps(self) -> int:
        """Steps of the inversion."""
        return self.num_inv_steps or self.num_inference_steps

    @model_validator(mode="after")
    def _the_way_back_is_known(self) -> Sampling:
        if self.attention_injection and self.inversion_steps != self.num_inference_steps:
            raise ValueError(
                f"attention_injection needs the clip at every level of the sampling: set num_inv_steps (now "
                f"{self.inversion_steps}) to num_inference_steps ({self.num_inference_steps}), or attention_injection "
                "to 0"
            )
        if self.attention_injection and self.sampler in OTHER_LEVELS:
            raise ValueError(f"attention_injection does not go with sampler {self.sampler}: take ddim, or set it to 0")
        if self.attention_injection and self.sampler != "ddim" and self.timestep_spacing != "trailing":
            raise ValueError(
                f"attention_injection with sampler {self.sampler} needs timestep_spacing trailing (now "
                f"{self.timestep_spacing}), or set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _seeds_matter(self) -> Sampling:
        if len(self.seeds) > 1 and not self.fresh_noise and self.sampler not in STOCHASTIC_SAMPLERS:
            raise ValueError(
                f"{len(self.seeds)} seeds would give the same edit {len(self.seeds)} times: set fresh_noise above 0 "
                "(0.9 for edits that clearly differ), or give one seed"
            )
        return self

    @model_validator(mode="after")
    def _windows_advance(self) -> Sampling:
        if self.window and (self.window_overlap or 0) > self.window - 2:
            raise ValueError(
                f"window_overlap {self.window_overlap}: windows of {self.window} frames, the clip's first among them, "
                f"can share at most {self.window - 2}"
            )
        return self


class TuneSettings(Sampling):
    """A clip, its caption, and how its motion is learned."""

    video: str
    """Clip to learn from: a video file, a GIF, or a folder of images."""
    prompt: Annotated[str, Field(pattern=r"\S")]
    """What the clip shows, in words."""
    edit: tuple[str, ...] = ()
    """New prompts to edit the clip with when it is tuned; also used for previews."""
    base: str = "miniature"
    """Text-to-image model: a name of `tuneavideo models`, a hub id, a folder, or a .safetensors or .ckpt file."""
    preset: Literal["default", "official", "fast"] = "default"
    """`default`: corrected and improved; `official`: the published code's arithmetic, faults included; `fast`: edits in
    fewer steps, with features used again."""

    start: NonNegativeInt = 0
    """First frame taken."""
    start_time: Seconds = None
    """Second at which to start, instead of start; 1:30 is 90 seconds."""
    stride: PositiveInt | None = None
    """Take every so many frames; none: spread the frames over the clip, at least four of a second."""
    sample_fps: PositiveFloat | None = None
    """Frames taken of every second, instead of stride."""
    num_frames: PositiveInt | Literal["all"] | None = None
    """Frames to take, or all; none: 24 (8 for the miniature and Stable Diffusion XL), or all of a shorter clip."""
    resolution: PositiveInt | None = None
    """Side of a square of the area that frames are brought to; none: the base's own."""
    width: PositiveInt | None = None
    """Width, instead of resolution (with height)."""
    height: PositiveInt | None = None
    """Height, instead of resolution (with width)."""
    fit: Literal["crop", "pad", "stretch"] = "crop"
    """`crop` keeps the clip's aspect; `pad` its edges too, between black bars; `stretch` makes a square of it."""

    references: tuple[Literal["first", "middle", "previous", "own"], ...] = ("first", "previous")
    """Frames that sparse-causal attention looks at."""
    clip_norm: bool = True
    """Group norms of the residual blocks span all frames."""
    temporal_init: Literal["zero", "official"] = "zero"
    """`zero`: tuning starts from the image model; `official`: from a random output bias."""
    trainable_modules: tuple[str, ...] = ("attn1.to_q", "attn2.to_q", "attn_temp")
    """Layers that learn: every layer whose name ends so."""
    frozen_modules: tuple[str, ...] = ()
    """Layers that do not learn after all: every layer whose name begins so."""

    max_train_steps: PositiveInt = 500
    """Optimiser steps."""
    learning_rate: PositiveFloat = 3e-5
    """Learning rate, after warm-up."""
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant"
    """Schedule of the learning rate."""
    lr_warmup_steps: NonNegativeInt = 0
    """Steps in which the learning rate rises (schedules other than constant)."""
    train_batch_size: PositiveInt = 1
    """Noise levels drawn per step and process: the clip is repeated, noise and timestep are not."""
    gradient_accumulation_steps: PositiveInt = 1
    """Batches per optimiser step."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""

    timestep_sampling: Literal["uniform", "stratified", "antithetic"] = "uniform"
    """`stratified`: any stretch of steps covers all noise levels evenly; `antithetic`: each second one mirrored."""
    noise_shared: Share = 0.0
    """Share of the noise's variance that all frames have in common."""
    snr_gamma: PositiveFloat | None = None
    """Signal-to-noise ratio above which noise levels count less (min-SNR; 5 is usual); none: all count alike."""
    debias_weight: NonNegativeFloat = 0.0
    """Weight of the loss on differences to one frame, which looks at motion more than at appearance (1 is usual)."""
    prior_weight: NonNegativeFloat = 0.0
    """Weight of staying with the image model's predictions for single frames without a prompt."""
    lora_rank: PositiveInt | None = None
    """Rank of what is added to each tuned matrix; none: the matrices themselves are tuned."""
    early_stopping: Share | None = None
    """Stop when a fixed measure of the loss falls by less than this share; none: make all steps."""
    early_stopping_steps: PositiveInt = 25
    """Steps from one such measurement to the next."""
    early_stopping_patience: PositiveInt = 2
    """Measurements that may bring too little before tuning stops."""

    optimizer: str = "adamw"
    """`adamw`, `adamw8bit`, `adafactor`, a name of torch.optim (`sgd`), or an installed `package.Class`."""
    adam_beta1: Share = 0.9
    """First beta, for optimisers that have one."""
    adam_beta2: Share = 0.999
    """Second beta."""
    adam_weight_decay: NonNegativeFloat = 1e-2
    """Weight decay."""
    adam_epsilon: PositiveFloat = 1e-8
    """Epsilon."""
    use_ema: bool = False
    """Keep the moving average of the learned weights instead of the last ones."""
    ema_decay: Share = 0.99
    """Decay of that average."""
    gradient_checkpointing: bool = True
    """Compute activations twice to save memory."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the computation; none: bf16 on a GPU or CPU that computes in it, full otherwise."""
    seed: NonNegativeInt = 0
    """Of every random number of tuning."""

    checkpointing_steps: PositiveInt = 250
    """A state to resume from is kept every so many steps."""
    checkpoints_total_limit: PositiveInt = 2
    """How many such states are kept."""
    validation_steps: PositiveInt | None = None
    """Preview the edits at step 0 and every so many steps; none: no previews."""
    report_to: Literal["tensorboard", "trackio"] | None = None
    """Tracker that receives loss and learning rate."""

    memory: Literal[8, 12, 16, 24] | None = None
    """GB of the card that tuning and edits must fit into: settings that you leave alone are chosen so. None: what the
    GPU has."""
    offload: bool = False
    """Text encoder and VAE wait in the computer's memory, not the GPU's, while they are not needed."""

    @model_validator(mode="after")
    def _sides_go_together(self) -> TuneSettings:
        if (self.width is None) != (self.height is None):
            raise ValueError("width and height go together: give both, or resolution instead")
        return self

    @model_validator(mode="after")
    def _frames_are_chosen_one_way(self) -> TuneSettings:
        if self.start and self.start_time is not None:
            raise ValueError(f"start {self.start} and start_time {self.start_time:g} both say where to start; give one")
        if (self.stride or 1) > 1 and self.sample_fps is not None:
            raise ValueError(f"stride {self.stride} and sample_fps {self.sample_fps:g} both say how dense; give one")
        return self

    @property
    def inflation(self) -> Inflation:
        return Inflation(self.references, self.clip_norm, self.temporal_init)


class Styling(Settings):
    """What an edit has besides its prompt."""

    edit_model: str | None = None
    """Another base of the same shape to edit with, such as a DreamBooth model; none: the one that was tuned."""
    lora: tuple[str, ...] = ()
    """LoRA files of diffusers or kohya, or hub ids, each with a weight if need be: style.safetensors:0.8."""
    embedding: tuple[str, ...] = ()
    """Files of textual inversions; prompts name them by their token, or by the file's name if they have none."""
    controlnet: str | None = None
    """ControlNet that holds the edits to the clip's maps: a folder, a file or a hub id."""
    control: str = "canny"
    """Its maps: canny or depth, found in the clip, or a video or folder of maps, one per frame."""
    control_scale: NonNegativeFloat = 1.0
    """Strength of the ControlNet."""
    ip_adapter: str | None = None
    """IP-Adapter file with its image_encoder folder beside it, or OWNER/REPOSITORY/FOLDER/FILE on the hub."""
    ip_image: str | None = None
    """Picture that the edits should resemble, for the IP-Adapter."""
    ip_scale: NonNegativeFloat = 0.6
    """Strength of the IP-Adapter."""

    @model_validator(mode="after")
    def _parts_go_together(self) -> Styling:
        if (self.ip_adapter is None) != (self.ip_image is None):
            raise ValueError("ip_adapter and ip_image go together: give both, or none")
        if self.controlnet is None and self.control != "canny":
            raise ValueError(f"control {self.control!r} needs a controlnet that reads such maps")
        return self


class EditSettings(Styling, Sampling):
    """New prompts for a clip that has been tuned."""

    run: str
    """Run folder to edit with."""
    prompt: Annotated[tuple[str, ...], Field(min_length=1)]
    """What the edits should show; one edit each."""
    preset: Literal["default", "official", "fast"] | None = None
    """Preset instead of the one that the run was tuned with; none: the run's. Values that were set for the run itself
    stay, except those that the preset names."""


PRESETS: dict[str, dict[str, Any]] = {
    # Rows say where they differ from the built-in values; `official` spells its arithmetic out (docs/decisions.md).
    "default": {},
    "official": {
        "stride": 1,
        "fit": "stretch",
        "references": ("first", "previous"),
        "clip_norm": True,
        "temporal_init": "official",
        "trainable_modules": ("attn1.to_q", "attn2.to_q", "attn_temp"),
        "frozen_modules": ("down_blocks",),
        "optimizer": "adamw",
        "lr_scheduler": "constant",
        "use_ema": False,
        "train_batch_size": 1,
        "timestep_sampling": "uniform",
        "noise_shared": 0.0,
        "snr_gamma": None,
        "debias_weight": 0.0,
        "prior_weight": 0.0,
        "lora_rank": None,
        "early_stopping": None,
        "sampler": "ddim",
        "timestep_spacing": "leading",
        "num_inference_steps": 50,
        "num_inv_steps": 50,
        "attention_injection": 0.0,
        "guidance_interval": (0.0, 1.0),
        "feature_reuse": 1,
        "window": None,
    },
    "fast": {
        "sampler": "dpm++",
        "num_inference_steps": 20,
        "feature_reuse": 2,
    },
}


def choices(annotation: Any) -> tuple[str, ...]:
    """Words that a setting can be, or a list of such; empty for a setting of another kind."""
    if get_origin(annotation) is Literal:
        return tuple(word for word in get_args(annotation) if isinstance(word, str))
    if get_origin(annotation) in (tuple, Union, types.UnionType):
        found = [choices(each) for each in get_args(annotation) if each not in (type(None), ...)]
        return tuple(word for words in found for word in words) if all(found) else ()
    return ()


def _as_chosen(annotation: Any, value: Any) -> Any:
    """A choice, or several, as they are written, whatever their case."""
    if isinstance(value, list | tuple):
        return tuple(_as_chosen(annotation, each) for each in value)
    if not isinstance(value, str):
        return value
    return next((word for word in choices(annotation) if word.lower() == value.lower()), value)
