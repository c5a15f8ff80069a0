"""Checkpoints and configs of other programs.

    mindspore.py        MindSpore's .ckpt files
    names.py            tensor names of diffusers, the original code, the published code and MindONE
    model_configs.py    configs of the models, and the names and shapes these need
    reading.py          a file or folder of any program -> tensors under our names
    writing.py          tensors under our names -> files of another program
    lora.py             tuned query projections -> a LoRA
    convert.py          reading, then writing, with a report
    foreign_configs.py  YAML files of the published code and of MindONE (without torch)
    mindone_flags.py    flags of MindONE's two scripts (without torch)
    optimizer.py        MindONE's AdamW

"Our names" are those of diffusers with a prefix (`unet.`, `vae.`, `text_encoder.`). Between reading and writing, a
checkpoint is a dict from our names to lazily read tensors (`storage/tensors.py`).
"""
