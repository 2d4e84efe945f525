"""Loss to checkpoints: schedules, one optimiser step, the pretraining loop, metrics."""
