"""Compile every kernel ahead of time for each GPU target and read registers and spills from the machine code.

Needs no GPU. The entries are recorded from the host functions' own launches at the shapes of LLaVA-1.5 7B and 13B, so
what is compiled here is what runs there.

    python benchmarks/aot_kernels.py --json benchmarks/results/aot.json
    python benchmarks/tables.py
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel cannot be compiled

import torch
import triton
from fastvkd_kernels.frozen_rms_norm import rms_norm_triton
from fastvkd_kernels.frozen_swiglu import swiglu_backward_triton, swiglu_triton
from fastvkd_kernels.saliency import apply_mask_, fisher_accumulate_, saliency_mask
from fastvkd_kernels.visual_distill_loss import distill_rows_triton, scale_gradient_triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 86, 89, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
HIDDEN_SIZES = {"7B": 4096, "13B": 5120}
MLP_SIZES = {"7B": 11008, "13B": 13824}


@dataclass(frozen=True)
class Launch:
    """One kernel launch as the host function makes it."""

    kernel: Any
    variant: str  # what was asked for, for people
    arguments: dict[str, Any]
    options: dict[str, Any]


class RecordingKernel:
    """Stands in for a kernel and notes its launches instead of running them."""

    def __init__(self, kernel: Any, launches: list[Launch], variant: str) -> None:
        self.kernel, self.launches, self.variant = kernel, launches, variant

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(**keywords: Any) -> None:
            names = self.kernel.arg_names
            arguments = {name: keywords.pop(name) for name in names}
            self.launches.append(Launch(self.kernel, self.variant, arguments, keywords))

        return launch


def record(variant: str, launches: list[Launch], function: Any, *args: Any, **kwargs: Any) -> None:
    """Call a host function with all kernels of its module replaced by recording ones."""
    module = sys.modules[function.__module__]
    kernels = {name: value for name, value in vars(module).items() if name.endswith("_kernel")}
    replaced: dict[str, Any] = {name: RecordingKernel(kernel, launches, variant) for name, kernel in kernels.items()}
    if hasattr(module, "choose_backend"):
        replaced["choose_backend"] = lambda *_: "triton"
    with mock.patch.multiple(module, **replaced):
        function(*args, **kwargs)


def recorded_launches() -> list[Launch]:
    """Every kernel in the variants that the 7B and 13B models need, and the looped ones for H = 16,384."""
    launches: list[Launch] = []
    meta = torch.device("meta")
    dtypes = {
        "bf16, bf16 target": (torch.bfloat16, torch.bfloat16),
        "bf16, fp8 target": (torch.bfloat16, torch.float8_e4m3fn),
        "fp16, fp16 target": (torch.float16, torch.float16),
        "fp32, fp32 target": (torch.float32, torch.float32),
    }
    T, N, M = 640, 576, 100
    rows = torch.empty(N, dtype=torch.int64, device=meta)
    weight, repel = torch.empty(N, device=meta), torch.empty(N, dtype=torch.bool, device=meta)

    def distill(H: int, label: str, distance: str, extras: bool, with_gradient: bool) -> None:
        hidden_dtype, target_dtype = dtypes[label]
        hidden = torch.empty(T, H, dtype=hidden_dtype, device=meta)
        target = torch.empty(M if extras else N, H, dtype=target_dtype, device=meta)
        options = (rows, weight, repel) if extras else (None, None, None)
        record(
            f"{distance}, {label}"
            + (", mapped + weights + repel" if extras else "")
            + ("" if with_gradient else ", no gradient"),
            launches,
            distill_rows_triton,
            *(hidden, rows, target, *options, 1.0, distance, 1.0, 1.0, with_gradient),
        )

    for H in HIDDEN_SIZES.values():
        for distance in ("mse", "cosine", "smooth_l1"):
            for label in dtypes:
                distill(H, label, distance, extras=True, with_gradient=True)
        distill(H, "bf16, bf16 target", "mse", extras=False, with_gradient=True)
        distill(H, "bf16, bf16 target", "mse", extras=True, with_gradient=False)
    for distance in ("mse", "cosine", "smooth_l1"):
        distill(16384, "bf16, fp8 target", distance, extras=True, with_gradient=True)

    for name, dtype in {"bf16": torch.bfloat16, "fp32": torch.float32}.items():
        for H in (*HIDDEN_SIZES.values(), 16384):
            x, norm_weight = torch.empty(T, H, dtype=dtype, device=meta), torch.empty(H, dtype=dtype, device=meta)
            record(name, launches, rms_norm_triton, x, norm_weight, None, 1e-6)
            record(name, launches, rms_norm_triton, x, norm_weight, x, 1e-6)
        for H in MLP_SIZES.values():
            gate = torch.empty(T, H, dtype=dtype, device=meta)
            record(name, launches, swiglu_triton, gate, gate)
            record(name, launches, swiglu_backward_triton, gate, gate, gate)
        gradient = torch.empty(T, 4096, dtype=dtype, device=meta)
        factor = torch.empty((), device=meta)
        record(f"{name}, in place", launches, scale_gradient_triton, gradient, factor, None)
        record(f"{name}, new tensor", launches, scale_gradient_triton, gradient, factor, torch.empty_like(gradient))
        grad, fisher = torch.zeros(64, 64, dtype=dtype), torch.zeros(64, 64)
        record(name, launches, fisher_accumulate_, fisher, grad)
        for granularity in ("weight", "neuron"):
            mask = saliency_mask(fisher, fisher, threshold=1.0, granularity=granularity, backend="torch")
            record(f"{name}, per {granularity}", launches, apply_mask_, grad, mask)
    record("fp32", launches, saliency_mask, fisher, fisher, threshold=1.0)
    return launches


TYPE_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


def specialise(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list]]:
    """(signature, constants, attributes) as Triton's launcher derives them from these arguments."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list] = {}
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and specialised):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPE_NAMES[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
        # torch's allocations are aligned to 16 bytes and more
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and specialised and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def usage(compiled: Any, target: GPUTarget) -> dict[str, int | None]:
    """Registers and spills a thread (NVIDIA: bytes of stack and local memory; AMD: registers and private bytes),
    shared memory in bytes a block, and (NVIDIA) 16-byte loads and stores of global memory in the program's text.
    """
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]

        def note(key: str) -> int:
            found = re.search(rf"\.{key}:\s+(\d+)", text)
            assert found, f"{key} is not in the assembly"
            return int(found[1])

        spills = note("vgpr_spill_count") + note("sgpr_spill_count") + note("private_segment_fixed_size")
        found = {"registers": note("vgpr_count"), "spills": spills, "shared": note("group_segment_fixed_size")}
        return {**found, "loads_16": None, "stores_16": None}
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(triton.knobs.nvidia.cuobjdump.path), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage_line = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    assert usage_line, f"no resource usage in the output of cuobjdump: {text}"
    registers, stack, shared, local = map(int, usage_line.groups())
    wide = {
        f"{kind}s_16": len(re.findall(rf"\b{name}\.global\S*\.v4\.b32", ptx))
        for kind, name in (("load", "ld"), ("store", "st"))
    }
    return {"registers": registers, "spills": stack + local, "shared": max(shared, compiled.metadata.shared), **wide}


def compile_all(targets: list[str]) -> list[dict[str, Any]]:
    """One row per kernel, variant and target; variants that compile to the same code are compiled once."""
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    for launch in recorded_launches():
        signature, constants, attributes = specialise(launch)
        key = repr((launch.kernel.fn.__name__, signature, constants, attributes, launch.options))
        if key in seen:
            continue
        seen.add(key)
        for name in targets:
            source = ASTSource(launch.kernel, signature, constants, attributes)
            compiled = triton.compile(source, target=TARGETS[name], options=dict(launch.options))
            row = {"kernel": launch.kernel.fn.__name__, "H": constants.get("H"), "variant": launch.variant}
            row |= {"target": name, "warps": launch.options.get("num_warps", 4), **usage(compiled, TARGETS[name])}
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write all entries here")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope():
        triton.knobs.cache.dir = cache  # never an old build
        entries = compile_all(args.targets)
    report = {
        "triton": triton.__version__,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "unit": "registers a thread, spills a thread (NVIDIA: bytes of stack and local memory, AMD: registers and "
        "private bytes), shared memory in bytes a block",
        "entries": entries,
    }
    if args.json:
        lines = ",\n".join(f"  {json.dumps(row)}" for row in entries)  # one a line
        head = json.dumps({**report, "entries": None}, indent=1)
        args.json.write_text(head.replace('"entries": null', f'"entries": [\n{lines}\n ]') + "\n")
    spilled = [row for row in entries if row["spills"]]
    print(f"{len(entries)} entries compiled, {len(spilled)} with spills")
    for row in spilled:
        print("  spills:", row)
    sys.exit(1 if spilled else 0)


if __name__ == "__main__":
    main()
