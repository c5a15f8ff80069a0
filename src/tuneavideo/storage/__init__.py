"""Files on the disk: run folders, atomic writes, cached tensors, weight files read one tensor at a time."""
