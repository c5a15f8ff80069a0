"""Groups of the options in the help and on the page. This module must not import torch."""

# Groups of the options in the help and on the page; every option is in one of them.
GROUPS: dict[str, tuple[str, ...]] = {
    "clip": (
        "video", "run", "prompt", "source_prompt", "mask", "num_frames", "start", "start_time", "stride", "sample_fps",
        "resolution", "width", "height", "fit",
    ),
    "model": (
        "base", "preset", "references", "clip_norm", "temporal_init", "trainable_modules", "frozen_modules",
        "edit_model", "lora", "embedding", "controlnet", "control", "control_scale", "ip_adapter", "ip_image",
        "ip_scale",
    ),
    "training": (
        "max_train_steps", "learning_rate", "lr_scheduler", "lr_warmup_steps", "train_batch_size",
        "gradient_accumulation_steps", "max_grad_norm", "snr_gamma", "lora_rank", "optimizer", "adam_beta1",
        "adam_beta2", "adam_weight_decay", "adam_epsilon", "use_ema", "ema_decay", "seed", "checkpointing_steps",
        "checkpoints_total_limit", "report_to",
    ),
    "editing": (
        "edit", "negative_prompt", "guidance_scale", "guidance_interval", "attention_injection", "temporal_consistency",
        "keep", "strength", "seeds", "fresh_noise", "num_inference_steps", "num_inv_steps", "sampler",
        "timestep_spacing", "feature_reuse", "validation_steps", "keep_weights", "step",
    ),
    "memory": (
        "memory", "mixed_precision", "gradient_checkpointing", "offload", "batch_guidance", "batch_prompts", "window",
        "window_overlap",
    ),
    "output": ("out", "resume", "checkpoint", "formats", "fps", "config", "json", "debug"),
}  # fmt: skip
# Options that `--help` shows; `--help-all` shows all.
COMMON = {
    "tune": {
        "video", "prompt", "num_frames", "start_time", "resolution", "base", "preset", "max_train_steps",
        "learning_rate", "edit", "guidance_scale", "attention_injection", "memory", "out", "resume",
    },
    "edit": {
        "run", "prompt", "source_prompt", "mask", "base", "num_frames", "lora", "controlnet", "preset",
        "negative_prompt", "guidance_scale", "attention_injection", "strength", "seeds", "fresh_noise",
        "num_inference_steps", "formats", "out",
    },
}  # fmt: skip
