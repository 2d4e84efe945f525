"""Checkpoint to scores."""
