"""Raw text to the rows of a training step."""
