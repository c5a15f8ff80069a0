"""The method of the paper: tensors in, tensors out."""
