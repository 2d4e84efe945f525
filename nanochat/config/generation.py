"""How a model is sampled where nobody says otherwise: written into its checkpoints, used by page, API and terminal."""

BASE = {"temperature": 1.0, "top_k": 50.0}
CHAT = {"temperature": 0.6, "top_k": 50.0}
"""At 0 two of 50 questions sent the demo's model round and round; so, none of 150 (2026-11-25)."""
