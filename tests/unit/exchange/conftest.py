"""Tests here use the second implementation of the model."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "model"))
