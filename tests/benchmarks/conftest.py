"""Lets tests import the scripts of benchmarks/ as these import one another."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
