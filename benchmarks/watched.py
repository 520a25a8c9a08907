"""Runs a fastvkd command and writes to FILE the most GPU memory that torch allocated for it.

python benchmarks/watched.py FILE eval --model MODEL --data DATA
"""

import atexit
import sys
from pathlib import Path

import torch

from fastvkd.cli import main

if __name__ == "__main__":
    file, *arguments = sys.argv[1:]
    atexit.register(lambda: Path(file).write_text(str(torch.cuda.max_memory_allocated())))
    sys.exit(main(arguments))
