"""A model's LLM in bfloat16, NF4 and int8: bytes, seconds to load, and how far its features and gradients are off.

python benchmarks/quantised.py MODEL IMAGE... --device cuda --json out/quantised.json
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from gauges import free_memory
from torch import Tensor

from fastvkd.environment import measured_on
from fastvkd.models.families import family_of, train_only, visual_parameters
from fastvkd.models.loading import load_model, load_processor
from fastvkd.models.visual_path import VisualPath, collate_images
from fastvkd.photos import decode_image

KINDS = (None, "nf4", "int8")


def looked_at(model: Any, processor: Any, images: list[Any], site: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Features (N, H) at `site`, and the gradient of their mean square by all visual weights as one vector."""
    parameters = [p for _, p in visual_parameters(model, family_of(model), "vision+projector", [site])]
    train_only(model, parameters)
    batch = collate_images(processor, model.config, images).to(device)
    features = VisualPath(model, [site])(batch)[site].gathered().float()
    gradients = torch.autograd.grad(features.square().mean(), parameters)
    return features.detach(), torch.cat([g.float().flatten() for g in gradients])


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def measure(folder: Path, files: list[Path], device: torch.device, layers: int) -> dict[str, Any]:
    """A row for each kind; `errors` are L2 norms beside those of the bfloat16 model."""
    processor, site = load_processor(folder), f"llm:{layers}"
    images = [decode_image(file.read_bytes(), str(file)) for file in files]
    rows: list[dict[str, Any]] = []
    plain: tuple[Tensor, Tensor] | None = None
    for kind in KINDS:
        free_memory()
        allocated = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
        started = time.perf_counter()
        model = load_model(folder, dtype=torch.bfloat16, llm_layers=layers, device=device, quantize_llm=kind)
        seconds = time.perf_counter() - started
        tensors = [*model.parameters(), *model.buffers()]
        row = {"kind": kind or "bf16", "seconds": round(seconds, 2), "tensor_bytes": sum(t.nbytes for t in tensors)}
        if allocated is not None:
            row["allocated_bytes"] = torch.cuda.memory_allocated(device) - allocated
        found = looked_at(model, processor, images, site, device)
        plain = plain or found
        row |= {"feature_error": off(found[0], plain[0]), "gradient_error": off(found[1], plain[1])}
        rows.append(row)
        del model, tensors, found
    return {**measured_on(device), "site": site, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=4, help="of the LLM; their output is compared")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    report = measure(arguments.model, arguments.images, torch.device(arguments.device), arguments.layers)
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    for row in report["rows"]:
        print(row)


if __name__ == "__main__":
    main()
