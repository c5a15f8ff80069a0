"""Weights and settings of other programs: read, renamed, written.

    lazy.py         a tensor that is read when it is asked for
    safe.py         bytes: safetensors
    mindspore.py    bytes: MindSpore's .ckpt
    pickled.py      bytes: PyTorch's .bin, .pt, .pth, .ckpt
    names.py        the same tensor under the names of diffusers, Stable Diffusion's first code (ldm) and MindONE
    shapes.py       configs of the models that tensors make up, and the names and shapes these want
    official.py     the published code's own names and config
    opening.py      what a path is, and its tensors in our names
    writing.py      tensors in our names to the files of another program
    lora.py         tuned query projections as a LoRA
    convert.py      from one to the other, with a report
    yamls.py        settings of the published code and of MindONE as ours (free of torch)
    flags.py        MindONE's two commands as ours (free of torch)
    optimizer.py    MindONE's AdamW

Three jobs are kept apart: reading bytes, renaming, building models. In the middle stands a dict of *our* names
(`unet.`, `vae.`, `text_encoder.` and the names of diffusers) to lazily read tensors; imports go up the list only.
"""
