"""Options of a job, their default values, and presets. This module must not import torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from tuneavideo.samplers import OWN_TIMESTEPS, STOCHASTIC_SAMPLERS
from tuneavideo.setting_types import Fraction, Seconds, Seeds, Settings


class Inflation(NamedTuple):
    """Options of `inflate`, which turns an image UNet into a video UNet."""

    references: tuple[str, ...] = ("first", "previous")
    clip_norm: bool = True
    temporal_init: str = "zero"  # or "official"; or "copy", from the block's self-attention


class Sampling(Settings):
    """Sampling options of an edit."""

    num_inference_steps: PositiveInt = 50
    """Number of denoising steps of an edit."""
    num_inv_steps: PositiveInt | None = None
    """Number of DDIM inversion steps. Default: as many as `num_inference_steps`."""
    guidance_scale: NonNegativeFloat = 12.5
    """Classifier-free guidance scale. Values of 1 and below disable guidance and halve the cost of a step."""
    negative_prompt: str = ""
    """Text that the edits are guided away from. It has no effect without guidance."""
    guidance_interval: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Interval of the denoising process, as fractions from 0 to 1, in which guidance is applied."""
    attention_injection: Fraction = 0.6
    """Fraction of the denoising steps, from the start, that reuse the source clip's attention queries and keys.
    Higher preserves motion and layout."""
    temporal_consistency: Fraction = 0.0
    """Strength, from 0 to 1, of averaging the predicted frames along the clip's motion: less flicker, softer detail
    where things move. Measured on the miniature only."""
    keep: bool = False
    """Keep the clip where the prompt does not change it: where the predictions for caption and prompt agree."""
    sampler: Literal["ddim", "dpm++", "dpm++-karras", "unipc", "deis", "plms", "euler", "heun", "euler-ancestral"] = (
        "ddim"
    )
    """Sampler of the edits. Attention injection needs one with evenly spaced steps (not dpm++-karras, plms or heun)."""
    timestep_spacing: Literal["leading", "trailing"] | None = "trailing"
    """Timestep spacing of the sampler. `trailing` starts at the last training timestep. `None` takes the base's own."""
    strength: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Edit strength, above 0 and at most 1: the fraction of the denoising steps that is inverted and run again. Lower
    stays closer to the clip."""
    fresh_noise: Fraction = 0.0
    """Fraction of fresh noise mixed into the inverted latents. 0 keeps the clip's layout, 1 ignores it."""
    seeds: Seeds = (0,)
    """Random seeds of the edits: one edit is made per prompt and seed. Several seeds need `fresh_noise` or the
    euler-ancestral sampler."""
    batch_guidance: bool = True
    """Batch the conditional and unconditional predictions. Disable to lower peak memory."""
    batch_prompts: PositiveInt = 1
    """Number of edits per batch. Peak memory of the activations grows in proportion."""
    feature_reuse: PositiveInt = 1
    """Recompute the inner UNet features every N denoising steps (DeepCache). 1 disables the reuse."""
    fps: PositiveFloat | None = None
    """Frames per second of the edits. Another rate than the source's drops the sound. Default: that of the frames
    taken."""
    formats: tuple[Literal["mp4", "gif", "frames"], ...] = ("mp4",)
    """File formats of the edits. `frames` writes a folder of PNG files."""

    window: Annotated[int, Field(ge=2)] | None = None
    """Number of frames per forward pass, in tuning and in editing; at least 2. Default: all, or as many as `memory`
    allows."""
    window_overlap: NonNegativeInt | None = None
    """Number of frames that neighbouring windows have in common; at most `window` - 2. Default: a third of the
    window."""

    @property
    def inversion_steps(self) -> int:
        """Number of inversion steps."""
        return self.num_inv_steps or self.num_inference_steps

    @property
    def needs_trajectory(self) -> str:
        """Name of a setting that needs the inverted latents of every step; empty if none does."""
        return "attention_injection" if self.attention_injection else "keep" if self.keep else ""

    @model_validator(mode="after")
    def _check_trajectory(self) -> Sampling:
        name = self.needs_trajectory
        if not name:
            return self
        off = {"attention_injection": "0", "keep": "false"}.get(name, "None")
        if self.inversion_steps != self.num_inference_steps:
            raise ValueError(
                f"{name} needs one inversion step per denoising step: set num_inv_steps (now {self.inversion_steps}) "
                f"to num_inference_steps ({self.num_inference_steps}), or {name} to {off}"
            )
        if self.sampler in OWN_TIMESTEPS:
            raise ValueError(f"{name} does not work with sampler {self.sampler}: use ddim, or set it to {off}")
        if self.sampler != "ddim" and self.timestep_spacing != "trailing":
            raise ValueError(
                f"{name} with sampler {self.sampler} needs timestep_spacing trailing (now {self.timestep_spacing}), "
                f"or set it to {off}"
            )
        return self

    @model_validator(mode="after")
    def _check_seeds(self) -> Sampling:
        if len(self.seeds) > 1 and not self.fresh_noise and self.sampler not in STOCHASTIC_SAMPLERS:
            raise ValueError(
                f"{len(self.seeds)} seeds would give the same edit {len(self.seeds)} times: set fresh_noise above 0 "
                "(0.9 for edits that clearly differ), or give one seed"
            )
        return self

    @model_validator(mode="after")
    def _check_windows(self) -> Sampling:
        if self.window and (self.window_overlap or 0) > self.window - 2:
            raise ValueError(
                f"window_overlap {self.window_overlap}: windows of {self.window} frames, the clip's first among them, "
                f"can share at most {self.window - 2}"
            )
        return self


class ClipSettings(Settings):
    """Base model, and the frames that are taken of a clip."""

    base: str = "miniature"
    """Text-to-image model: a name from `tuneavideo models`, a hub id, a folder, or a .safetensors or .ckpt file."""

    start: NonNegativeInt = 0
    """Index of the first frame taken, from 0."""
    start_time: Seconds = None
    """Time of the first frame taken, in seconds or as 1:30, instead of `start`."""
    stride: PositiveInt | None = None
    """Keep every Nth frame. Default: spread `num_frames` over the clip, at least four frames per second."""
    sample_fps: PositiveFloat | None = None
    """Number of frames taken per second of the clip, instead of `stride`."""
    num_frames: PositiveInt | Literal["all"] | None = None
    """Number of frames to take, or `all`. Default: 24 (8 for the miniature and SDXL), or all frames of a shorter
    clip."""
    resolution: PositiveInt | None = None
    """Target resolution N: frames of about N x N pixels in area. Default: the base's native resolution."""
    width: PositiveInt | None = None
    """Exact frame width in pixels, with `height`, instead of `resolution`."""
    height: PositiveInt | None = None
    """Exact frame height in pixels, with `width`, instead of `resolution`."""
    fit: Literal["crop", "pad", "stretch"] = "crop"
    """Fit of the frames to the target size. `crop` keeps the aspect ratio and cuts the edges. `pad` adds black bars.
    `stretch` distorts; without a width and height, to a square."""

    @model_validator(mode="after")
    def _check_size(self) -> ClipSettings:
        if (self.width is None) != (self.height is None):
            raise ValueError("width and height need each other: give both, or resolution instead")
        return self

    @model_validator(mode="after")
    def _check_frame_selection(self) -> ClipSettings:
        if self.start and self.start_time is not None:
            raise ValueError(
                f"start {self.start} and start_time {self.start_time:g} both set the first frame; give one"
            )
        if (self.stride or 1) > 1 and self.sample_fps is not None:
            raise ValueError(
                f"stride {self.stride} and sample_fps {self.sample_fps:g} both set the frame rate; give one"
            )
        return self


class TuneSettings(ClipSettings, Sampling):
    """Options of a tuning: the clip, its caption and the training."""

    video: str
    """Clip to learn from: a video file, a GIF or a folder of images."""
    prompt: Annotated[str, Field(pattern=r"\S")]
    """Caption of the clip."""
    edit: tuple[str, ...] = ()
    """Prompt of an edit to make after tuning. It is also used for previews."""
    preset: Literal["default", "official", "fast"] = "default"
    """Group of settings: `default` (recommended), `official` (the arithmetic of the published code, bugs included) or
    `fast` (edits in 20 steps with DPM-Solver++ and feature reuse)."""

    references: tuple[Literal["first", "previous", "own"], ...] = ("first", "previous")
    """Frames whose keys and values each frame attends to in sparse-causal attention."""
    clip_norm: bool = True
    """Compute the group norms of the residual blocks over all frames, as the published code does."""
    temporal_init: Literal["zero", "official"] = "zero"
    """Initial output of the temporal attention. `zero` starts from the image model. `official` keeps a random output
    bias."""
    trainable_modules: tuple[str, ...] = ("attn1.to_q", "attn2.to_q", "attn_temp")
    """Name suffixes of the trainable modules."""
    frozen_modules: tuple[str, ...] = ()
    """Name prefixes of modules that are excluded from training."""
    lora_rank: PositiveInt | None = None
    """Rank of the LoRA that is trained for each trainable matrix: an adapter of a few MB. The temporal attention starts
    as a copy of the self-attention, with zero output. Default: whole matrices, as in the paper."""

    max_train_steps: PositiveInt = 500
    """Number of optimiser steps."""
    learning_rate: PositiveFloat = 3e-5
    """Learning rate of the optimiser."""
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant"
    """Learning rate schedule."""
    lr_warmup_steps: NonNegativeInt = 0
    """Number of warm-up steps of the learning rate. The `constant` schedule has none."""
    train_batch_size: PositiveInt = 1
    """Batch size per device: number of independent samples of noise and timestep for the clip."""
    gradient_accumulation_steps: PositiveInt = 1
    """Number of batches per optimiser step."""
    max_grad_norm: PositiveFloat = 1.0
    """Maximum norm of the gradients, above which they are clipped."""

    snr_gamma: PositiveFloat | None = None
    """Gamma of the min-SNR loss weighting; 5 is recommended. Default: no weighting."""

    optimizer: str = "adamw"
    """Optimiser: `adamw`, `adamw8bit`, `adafactor`, a name of torch.optim such as `sgd`, or an installed
    `package.Class`."""
    adam_beta1: Fraction = 0.9
    """First beta of Adam optimisers."""
    adam_beta2: Fraction = 0.999
    """Second beta of Adam optimisers."""
    adam_weight_decay: NonNegativeFloat = 1e-2
    """Weight decay of the optimiser."""
    adam_epsilon: PositiveFloat = 1e-8
    """Epsilon of Adam optimisers."""
    use_ema: bool = False
    """Save the exponential moving average (EMA) of the trained weights instead of their last values."""
    ema_decay: Fraction = 0.99
    """Decay of the EMA, from 0 to 1."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass (gradient checkpointing): less memory, slower steps."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the computation; `no` is fp32. Default: bf16 on devices that support it, otherwise fp32."""
    seed: NonNegativeInt = 0
    """Random seed of the tuning."""

    checkpointing_steps: PositiveInt = 250
    """Save a checkpoint to resume from every N optimiser steps."""
    checkpoints_total_limit: PositiveInt = 2
    """Maximum number of checkpoints to keep. The oldest are deleted."""
    validation_steps: PositiveInt | None = None
    """Preview the edits before tuning and every N optimiser steps. Default: no previews."""
    keep_weights: bool = False
    """Keep the trained weights of every preview, from which edits can be made (`edit --step`)."""
    report_to: Literal["tensorboard", "trackio"] | None = None
    """Experiment tracker that receives the loss and learning rate. Default: no tracker."""

    memory: Literal[8, 12, 16, 24] | None = None
    """Choose unset memory options to fit this GPU memory in GB (10^9 bytes). Default: the GPU's memory."""
    offload: bool = False
    """Keep the text encoder and VAE in CPU memory while they are idle."""

    @model_validator(mode="after")
    def _check_lora_rank(self) -> TuneSettings:
        if self.lora_rank and self.temporal_init == "official":
            raise ValueError(
                f"lora_rank {self.lora_rank} starts the temporal attention from the self-attention, temporal_init "
                "official (as in the preset official) from random numbers; leave one of them out"
            )
        return self

    @property
    def inflation(self) -> Inflation:
        return Inflation(self.references, self.clip_norm, "copy" if self.lora_rank else self.temporal_init)


class Styling(Settings):
    """Mask of an edit, additional models, and their conditioning inputs."""

    mask: str | None = None
    """Picture, clip or folder of pictures, bright where the edits may change the clip. The rest stays as it is.
    Default: everything may change."""

    edit_model: str | None = None
    """Base of the same architecture to edit with, such as a DreamBooth model. Default: the base that was tuned."""
    lora: tuple[str, ...] = ()
    """LoRA files of diffusers or kohya, or hub ids, each with an optional weight: style.safetensors:0.8."""
    embedding: tuple[str, ...] = ()
    """Textual inversion files. A prompt uses one by its token, or by its file name if it has none."""
    controlnet: str | None = None
    """ControlNet that guides the edits by maps of the clip: a folder, a file or a hub id."""
    control: str = "canny"
    """Maps for the ControlNet: `canny` or `depth` computes them from the clip; or a video or folder with one map per
    frame."""
    control_scale: NonNegativeFloat = 1.0
    """Conditioning scale of the ControlNet. 0 disables it."""
    ip_adapter: str | None = None
    """IP-Adapter file in a folder that has image_encoder, or OWNER/REPOSITORY/FOLDER/FILE on the hub."""
    ip_image: str | None = None
    """Reference image for the IP-Adapter."""
    ip_scale: NonNegativeFloat = 0.6
    """Conditioning scale of the IP-Adapter. 0 disables it."""

    @model_validator(mode="after")
    def _check_style(self) -> Styling:
        if (self.ip_adapter is None) != (self.ip_image is None):
            raise ValueError("ip_adapter and ip_image need each other: give both or neither")
        if self.controlnet is None and self.control != "canny":
            raise ValueError(
                f"control {self.control!r} has no effect without controlnet: set controlnet to a model for such maps"
            )
        return self


class EditSettings(Styling, Sampling):
    """Options of the edits of a tuned clip."""

    run: str
    """Run folder of the tuned clip."""
    prompt: Annotated[tuple[str, ...], Field(min_length=1)]
    """Prompts of the edits. One edit is made per prompt and seed."""
    step: PositiveInt | None = None
    """Step of the tuning whose weights edits are made with: of a preview with `keep_weights`, or of a checkpoint.
    Default: the last."""
    preset: Literal["default", "official", "fast"] | None = None
    """Preset to use instead of the run's. Values that were set for the run itself stay, except those that the preset
    sets. Default: the run's preset."""

    @property
    def needs_trajectory(self) -> str:
        return super().needs_trajectory or ("mask" if self.mask else "")


class ClipEditSettings(ClipSettings, EditSettings):
    """Options of the edits of a run, or of a clip without tuning."""

    run: str
    """Run folder of the tuned clip, or a clip to edit without tuning: a video file, a GIF or a folder of images."""
    source_prompt: str | None = None
    """Caption of a clip that is edited without tuning. Frames, size and base are options of such a clip only."""


PRESETS: dict[str, dict[str, Any]] = {
    # Values that differ from the defaults; `official` lists all that its arithmetic depends on (docs/decisions.md).
    "default": {},
    "official": {
        "stride": 1,
        "fit": "stretch",
        "references": ("first", "previous"),
        "clip_norm": True,
        "temporal_init": "official",
        "trainable_modules": ("attn1.to_q", "attn2.to_q", "attn_temp"),
        "frozen_modules": ("down_blocks",),
        "lora_rank": None,
        "optimizer": "adamw",
        "lr_scheduler": "constant",
        "use_ema": False,
        "train_batch_size": 1,
        "snr_gamma": None,
        "sampler": "ddim",
        "timestep_spacing": "leading",
        "num_inference_steps": 50,
        "num_inv_steps": 50,
        "attention_injection": 0.0,
        "temporal_consistency": 0.0,
        "keep": False,
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
