"""Token ids to loss: the transformer, its attention, its optimiser, and the depth dial."""
