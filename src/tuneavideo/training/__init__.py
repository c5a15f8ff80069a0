"""Checkpoints, optimizers, memory and disk space of a tuning."""
