"""Run by the DeepSpeed launcher: several runs one after another in one world, since starting a world takes longer than
a short run. The argument is a JSON file with the command line of `fastvkd/train.py` for each: `--config YAML key=value
...`."""

import json
import sys
from pathlib import Path

from fastvkd.engines.deepspeed_engine import leave_deepspeed
from fastvkd.environment import end_process
from fastvkd.settings import load_settings
from fastvkd.unlearning.loop import unlearn


def main(runs: Path) -> None:
    for _, config, *overrides in json.loads(runs.read_text()):
        unlearn(load_settings(config, overrides))
    leave_deepspeed()
    end_process(0)


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
