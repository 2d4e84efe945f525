"""How a model is sampled where nobody says otherwise: written into its checkpoints, used by page, API and terminal."""

BASE = {"temperature": 1.0, "top_k": 50}
CHAT = {"temperature": 0.6, "top_k": 50, "repetition_penalty": 1.1}
"""So 2 of 2,000 answers of the demo's model say 8 tokens three times over; without the penalty 14, at temperature 0 two
of 50 (tests/e2e/test_demo.py, its 50 prompts and 40 seeds, 2026-11-25)."""
