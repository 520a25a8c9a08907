"""Loads a model of many shards and prints its peak of anonymous host memory; alone, or as a ZeRO-3 rank when launched.

Arguments: a small model folder (loaded first, for what libraries allocate once), the folder to measure.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

import torch

from fastvkd.models.loading import load_model

LAYERS = 6


def anonymous_bytes() -> int:
    """What only swapping could take back; pages mapped from files are not counted."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))


def main(small: Path, large: Path) -> None:
    partitioning = None
    if "LOCAL_RANK" in os.environ:
        from fastvkd.engines.deepspeed_engine import start_deepspeed
        from fastvkd.engines.ds_config import complete_ds_config, read_ds_config

        config = complete_ds_config(
            read_ds_config("zero3"),
            micro_batch=1,
            gradient_accumulation_steps=1,
            max_grad_norm=1.0,
            bf16=True,
            optim="adamw_torch",
            quantize_llm="none",
            world_size=int(os.environ["WORLD_SIZE"]),
            on_gpu=False,
        )
        partitioning = start_deepspeed(config)
    load_model(small, llm_layers=1, dtype=torch.bfloat16)
    before, peak, running = anonymous_bytes(), 0, True

    def watch() -> None:
        nonlocal peak
        while running:
            peak = max(peak, anonymous_bytes())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_model(large, llm_layers=LAYERS, dtype=torch.bfloat16)  # stored in float16: every tensor is converted
    running = False
    watcher.join()
    held = sum(getattr(p, "ds_tensor", p).numel() for p in model.parameters()) * 2
    print("figures", json.dumps({"peak": peak - before, "held": held}), flush=True)
    if partitioning is not None:
        from fastvkd.engines.deepspeed_engine import leave_deepspeed
        from fastvkd.environment import end_process

        leave_deepspeed()
        end_process(0)


if __name__ == "__main__":
    main(*map(Path, sys.argv[-2:]))
