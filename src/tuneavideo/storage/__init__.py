"""Files of a run: paths, atomic writes, cached tensors."""
