"""What tuning needs besides the method: checkpoints, optimizers, memory."""
