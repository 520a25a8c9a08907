"""Speed of the kernels, forward + backward: milliseconds, GB/s beside a copy ceiling of the same run, and extra memory.

An implementation's row appears only where the correctness gate of the same run, device, dtype and width is green. On a
CPU what runs is the plain-torch twin, and the rows say so; such figures tell nothing about a GPU.

    python benchmarks/kernel_speed.py --device cuda --json benchmarks/results/kernels-<device>.json
"""

import argparse
import importlib.util
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from fastvkd_kernels import frozen_rms_norm, frozen_swiglu, visual_distill_loss
from gauges import copy_ceiling, milliseconds, peak_bytes
from torch import Tensor

from fastvkd.environment import measured_on


@dataclass(frozen=True)
class Shape:
    """Rows of the sequence and visual tokens among them for one image; hidden and MLP size."""

    rows: int
    visual_tokens: int
    hidden: int
    mlp: int


SHAPES = {
    "CLIP-L/14-336": Shape(577, 576, 1024, 4096),
    "LLaVA-7B": Shape(611, 576, 4096, 11008),
    "LLaVA-13B": Shape(611, 576, 5120, 13824),
    "LLaVA-34B": Shape(611, 576, 7168, 20480),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LOSSES = ("mse", "cosine", "smooth_l1")
OPERATIONS = (*LOSSES, "rms_norm", "swiglu")


@dataclass(frozen=True)
class Work:
    """One operation at one shape: tensors to differentiate, implementations, and the bytes that have to move."""

    leaves: list[Tensor]
    implementations: dict[str, Any]
    upstream: Tensor | None  # gradient of the output; None for a scalar loss
    bytes_moved: int
    gate: Callable[[], None]


def load_gate() -> ModuleType:
    """The correctness gate of the kernels' tests."""
    file = Path(__file__).resolve().parents[1] / "tests" / "kernels" / "kernel_gate.py"
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # torch.compile looks functions' modules up there
    spec.loader.exec_module(module)
    return module


def loss_work(gate: ModuleType, distance: str, shape: Shape, batch: int, dtype: torch.dtype, device: str) -> Work:
    T, N, H = batch * shape.rows, batch * shape.visual_tokens, shape.hidden
    hidden = torch.randn(batch, shape.rows, H, device=device, dtype=dtype, requires_grad=True)
    target = torch.randn(N, H, device=device, dtype=dtype)
    first = shape.rows - shape.visual_tokens  # the prefix comes before the image
    rows = torch.cat([torch.arange(first, shape.rows, device=device) + b * shape.rows for b in range(batch)])
    ours = partial(visual_distill_loss, rows=rows, target=target, distance=distance)

    def eager(hidden: Tensor) -> Tensor:
        return gate.eager_loss(hidden, rows, target, distance=distance)[0]

    def check() -> None:
        for options in (False, True):
            case = gate.make_case(H, dtype, distance, options=options)
            case = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in case.items()}
            gate.check_distill_loss(visual_distill_loss, case)

    size = hidden.element_size()
    # read every visual token and its target, write the gradient of every row
    return Work([hidden], {"eager": eager, "ours": ours}, None, (2 * N + T) * H * size, check)


def frozen_work(gate: ModuleType, operation: str, shape: Shape, batch: int, dtype: torch.dtype, device: str) -> Work:
    norm = operation == "rms_norm"
    H = shape.hidden if norm else shape.mlp
    new = partial(torch.randn, batch, shape.rows, H, device=device, dtype=dtype)
    weight = torch.randn(H, device=device, dtype=dtype)
    implementations: dict[str, Any]
    if norm:
        implementations = {
            "eager": partial(gate.eager_rms_norm, weight=weight, eps=1e-6),
            "ours": partial(frozen_rms_norm, weight=weight, eps=1e-6),
        }
        truth: Callable[..., Tensor] = partial(gate.eager_rms_norm, weight=weight.double(), eps=1e-6)
    else:
        implementations, truth = {"eager": gate.eager_swiglu, "ours": frozen_swiglu}, gate.eager_swiglu
    if device == "cuda" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        if norm:
            implementations["Liger"] = lambda x: LigerRMSNormFunction.apply(x, weight, 1e-6)
        else:
            implementations["Liger"] = LigerSiLUMulFunction.apply
    leaves = [new(requires_grad=True) for _ in range(1 if norm else 2)]

    def check() -> None:
        few = [leaf.detach()[:1, :32] for leaf in leaves]
        grad_y = torch.randn_like(few[0])
        ours, eager = (gate.worst_error(implementations[name], truth, few, grad_y) for name in ("ours", "eager"))
        for value, allowed in zip(ours, eager, strict=True):
            assert value <= allowed + gate.SLACK, f"{operation}: error {value:.2e}, eager {allowed:.2e}"

    # forward reads the inputs and writes y; backward reads inputs and dy and writes the inputs' gradients
    n_tensors = len(leaves) + 1 + len(leaves) + 1 + len(leaves)
    bytes_moved = n_tensors * leaves[0].numel() * leaves[0].element_size()
    return Work(leaves, implementations, torch.randn_like(leaves[0]), bytes_moved, check)


def measure(args: argparse.Namespace, report: dict[str, Any], keep: Callable[[], None]) -> None:
    """Fill `rows`, and `gate_failed` where an operation is less accurate than eager code; `keep` after every row."""
    gate, device = load_gate(), torch.device(args.device)
    for operation in args.operations:
        make = loss_work if operation in LOSSES else frozen_work
        for shape, dtype in itertools.product(args.shapes, args.dtypes):
            for batch in args.batches:
                work = make(gate, operation, SHAPES[shape], batch, DTYPES[dtype], args.device)
                if batch == args.batches[0]:
                    try:
                        work.gate()
                    except AssertionError as error:
                        report["gate_failed"].append([operation, shape, dtype, str(error)])
                        print(f"{operation}, {shape}, {dtype}: gate is red: {error}")
                        break
                implementations = dict(work.implementations)
                if not args.no_compile:
                    torch._dynamo.reset()
                    implementations["torch.compile"] = torch.compile(work.implementations["eager"], dynamic=False)
                about = {"operation": operation, "shape": shape, "batch": batch, "dtype": dtype}
                for name, function in implementations.items():
                    label = "ours (torch twin)" if name == "ours" and args.device == "cpu" else name
                    row = {**about, "implementation": label, **cost(work, function, device, args.seconds)}
                    report["rows"].append(row | {"of_copy": round(row["gb_per_s"] / report["copy_gb_per_s"], 4)})
                    print(", ".join(f"{key} {value}" for key, value in report["rows"][-1].items()), flush=True)
                    keep()


def cost(work: Work, function: Callable[..., Tensor], device: torch.device, seconds: float) -> dict[str, Any]:
    """`ms` of forward and backward, `gb_per_s` of the bytes that have to move, and `extra_bytes`: the peak above what
    was there before, gradients included (None on a CPU)."""

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*work.leaves), work.leaves, work.upstream)

    ms = milliseconds(forward_backward, device, seconds)
    extra = peak_bytes(forward_backward, device) if device.type == "cuda" else None
    return {"ms": round(ms, 4), "gb_per_s": round(work.bytes_moved / ms / 1e6, 2), "extra_bytes": extra}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write all rows here")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--seconds", type=float, default=0.5, help="time budget of one measurement")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU is visible to torch; use --device cpu, which measures the torch twin")

    torch.manual_seed(0)
    report: dict[str, Any] = {
        "benchmark": "kernels",
        **measured_on(args.device),
        "command": " ".join(["python benchmarks/kernel_speed.py", *sys.argv[1:]]),
        "torch": torch.__version__,
        "copy_gb_per_s": round(copy_ceiling(torch.device(args.device)) / 1e9, 2),
        "gate": "passed for every row listed: error against float64 <= eager's + 1e-5",
        "rows": [],
        "gate_failed": [],
    }

    def keep() -> None:
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(report, indent=1) + "\n")

    keep()
    if args.device == "cpu":
        print("CPU: 'ours' is the plain-torch twin; nothing here tells how fast the Triton kernels are on a GPU.")
    print(f"{report['device']}, torch {torch.__version__}; copy ceiling {report['copy_gb_per_s']} GB/s")
    measure(args, report, keep)
    keep()
    sys.exit(1 if report["gate_failed"] else 0)


if __name__ == "__main__":
    main()
