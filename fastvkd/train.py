"""Entry point for launchers: `deepspeed fastvkd/train.py --config configs/llava-1.5-13b.yaml key=value ...`."""

import os
import sys
from pathlib import Path

# A launcher puts this file's folder first on the path, where our `data` and `models` would shadow other packages'.
_HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _HERE]
if str(_HERE.parent) not in sys.path:
    sys.path.insert(0, str(_HERE.parent))

from fastvkd.cli import main  # noqa: E402
from fastvkd.environment import end_process  # noqa: E402

if __name__ == "__main__":
    code = main(["train", *sys.argv[1:]])
    if "RANK" in os.environ:
        end_process(code)
    sys.exit(code)
