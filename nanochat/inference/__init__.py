"""Checkpoint to text: KV cache and sampling."""
