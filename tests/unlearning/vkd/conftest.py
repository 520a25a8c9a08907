"""The tiny models of every family, which tests of targets share with those of the models."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "models"))
