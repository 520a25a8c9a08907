"""Qwen2.5-VL's tower forward and backward, as transformers has it and with pieces of one length attended to at once.

    python benchmarks/tower.py --preset qwen2.5-vl-7b --device cuda --json out/tower.json

Random weights and photos, SDPA, four photos of a side a pass, everything trained. `error` is the largest difference of
the tower's outputs over their largest value.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from gauges import free_memory, peak_bytes, seconds_of
from rig import PRESETS, configuration
from torch import Tensor
from transformers import AutoModel

from fastvkd.environment import measured_on
from fastvkd.models import families
from fastvkd.models.families import family_of
from fastvkd.models.loading import truncated_config
from fastvkd.models.patch_sequences import batch_pieces

PHOTOS = 4


def tower_of(config: Any, device: torch.device, *, batched: bool) -> Any:
    """The visual tower of a model with the same random weights, in bfloat16 on a GPU."""
    torch.manual_seed(0)
    with device:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model: Any = AutoModel.from_config(truncated_config(config, 0), dtype=dtype)
    if batched:
        batch_pieces(model)
    return families.tower(model, family_of(model)).eval()


def measure(config: Any, side: int, device: torch.device, count: int) -> list[dict[str, Any]]:
    """A row for each way."""
    rows: list[dict[str, Any]] = []
    outputs: list[Tensor] = []
    for batched in (False, True):
        free_memory()
        tower = tower_of(config, device, batched=batched)
        patches = side // tower.config.patch_size
        grid = torch.tensor([[1, patches, patches]] * PHOTOS, device=None if batched else device)
        generator = torch.Generator().manual_seed(1)
        width = 3 * tower.config.temporal_patch_size * tower.config.patch_size**2
        pixels = torch.randn(PHOTOS * patches**2, width, generator=generator)
        pixels = pixels.to(device, next(tower.parameters()).dtype)

        def run(tower: Any = tower, pixels: Tensor = pixels, grid: Tensor = grid) -> None:
            tower.zero_grad(set_to_none=True)
            found(tower(pixels, grid_thw=grid)).float().square().mean().backward()

        with torch.no_grad():
            outputs.append(found(tower(pixels, grid_thw=grid)).float().cpu())
        peak = peak_bytes(run, device)
        times = [1e3 * seconds_of(run, device) for _ in range(count)]
        row = {"side": side, "way": "pieces of one length at once" if batched else "transformers"}
        rows.append({**row, "ms": statistics.median(times), "peak_bytes": peak})
        del tower, run
    top = outputs[0].abs().max()
    rows[-1]["error"] = float((outputs[1] - outputs[0]).abs().max() / top)
    return rows


def found(output: Any) -> Tensor:
    """What the tower hands to the LLM, in whichever form the installed transformers returns it."""
    if isinstance(output, Tensor):
        return output
    return output.pooler_output


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--preset", choices=[name for name in PRESETS if "qwen" in name], required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sides", type=int, nargs="+", default=[448, 1036], help="pixels, multiples of 28")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    report: dict[str, Any] = {**measured_on(device), "preset": arguments.preset, "photos": PHOTOS, "rows": []}
    config = configuration(PRESETS[arguments.preset]())
    for side in arguments.sides:
        report["rows"] += measure(config, side, device, arguments.repetitions)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
        print(*report["rows"][-2:], sep="\n", flush=True)


if __name__ == "__main__":
    main()
