"""Tests of the plan use the tiny models of tests/models too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
