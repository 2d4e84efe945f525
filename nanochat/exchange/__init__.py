"""Models in the formats of others, out and in: Hugging Face folders, karpathy/nanochat's checkpoints."""
