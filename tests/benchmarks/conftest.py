"""Lets tests import the scripts of benchmarks/ as these import one another."""

import sys

from benchmark_script import ROOT

sys.path.append(str(ROOT / "benchmarks"))  # last: `kernels.py` there must not answer to transformers' probe
