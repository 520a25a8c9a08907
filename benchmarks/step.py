"""One training step, from the way public unlearning code takes it to ours, one change at a time, in one run.

    python benchmarks/step.py --preset tiny --json benchmarks/results/step-tiny-cpu.json
    python benchmarks/step.py --preset llava-1.5-13b --device cuda

Weights are random at the model's real shapes, made on the device; nothing is downloaded. (a) is written as the public
RMU and MMUnlearner loops are: the whole prompt through all layers up to the logits, one pass for each set, a second
model as the teacher, a mean squared error over `hidden[mask]`. All variants train the same visual weights with the same
data; a row is printed only where loss and gradients equal those of (a), or of the first variant given, within
TOLERANCE. (h) has another objective, at `projector`: it is compared with a plain step there. A batch larger than (a)
has the memory for is measured without (a):

    python benchmarks/step.py --preset llava-1.5-13b --device cuda --variants fgh --batch 32
"""

import argparse
import contextlib
import importlib.util
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fastvkd_kernels import visual_distill_loss
from gauges import copy_ceiling, free_memory, matmul_ceiling, milliseconds, peak_bytes, seconds_of
from rig import (
    PRESETS,
    VARIANTS,
    Images,
    Preset,
    Rig,
    Variant,
    analytic_flops,
    build_rigs,
    configuration,
    counted_flops,
    gradients,
    least_bytes,
    run_alone,
    teacher_scale,
)
from torch import Tensor

from fastvkd.engines.optimizers import EIGHT_BIT
from fastvkd.environment import measured_on
from fastvkd.planning.architecture import Architecture, architecture_of
from fastvkd.planning.cards import peak_flops

# Largest error of the loss, and of the gradient (L2 norm of the difference over that of (a)'s), that is rounding. In
# float32, sums in another order: every parameter by itself is held to it. In bf16, activations of thirty blocks and
# layers rounded at other places: the biases of the tower's norms add up thousands of numbers that almost cancel, and a
# fifth of such a gradient is rounding, so there all parameters count as one vector.
TOLERANCE = {torch.float32: (1e-5, 1e-3), torch.bfloat16: (2e-2, 5e-2)}
NO_MEMORY = "out of memory with one image of each set"


@dataclass(frozen=True)
class Reference:
    """What the first variant computes of `images` at `weights`, with the scale of the loss: others are held to it."""

    images: Images
    scale: float
    weights: list[Tensor]
    loss: float
    gradients: list[Tensor]
    tolerance: tuple[float, float]


def make_reference(rig: Rig, images: Images) -> Reference:
    scale = teacher_scale(rig.preset, images, rig)
    rig.load(images, scale)
    weights = [parameter.detach().cpu().clone() for _, parameter in rig.parameters]
    dtype = next(rig.student.parameters()).dtype
    return Reference(images, scale, weights, *gradients(rig), TOLERANCE[dtype])


def compare(rigs: dict[str, Rig], reference: Reference | None) -> dict[str, dict[str, Any] | str]:
    """The errors of every rig's loss and gradients beside `reference`; or why a rig has no row."""
    result: dict[str, dict[str, Any] | str] = {}
    for letter, rig in rigs.items():
        assert reference is not None  # it is there as soon as one rig is
        rig.load(reference.images, reference.scale)
        with torch.no_grad():  # steps of a variant that trains the same weights have moved them
            for (_, parameter), value in zip(rig.parameters, reference.weights, strict=True):
                parameter.copy_(value)
        loss, found = math.nan, []
        with contextlib.suppress(torch.OutOfMemoryError):
            loss, found = gradients(rig)
        if not found:
            result[letter] = "out of memory with as many images as the reference"
            free_memory()
            continue
        error = {
            "max_loss_error": abs(loss - reference.loss) / abs(reference.loss),
            "max_grad_error": gradient_error(found, reference.gradients, next(rig.student.parameters()).dtype),
            "compared_batch": reference.images.forget + reference.images.retain,
        }
        allowed_loss, allowed_gradient = reference.tolerance
        # written so that NaN fails
        agrees = error["max_loss_error"] <= allowed_loss and error["max_grad_error"] <= allowed_gradient
        result[letter] = error if agrees else f"differs from the reference: {error}"
    return result


def gradient_error(found: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> float:
    """|g - g_a| / |g_a| (L2): in float32 the largest over parameters, in bf16 of all parameters as one vector.

    Below a thousandth of the largest |g_a| all is rounding in float32 too.
    """
    norms = torch.stack([g.norm() for g in expected])
    differences = torch.stack([(g - e).norm() for g, e in zip(found, expected, strict=True)])
    if dtype == torch.bfloat16:
        return float(differences.norm() / norms.norm())
    return float((differences / norms.clamp(min=1e-3 * norms.max())).max())


def loss_seconds(preset: Preset, architecture: Architecture, device: torch.device) -> float:
    """Seconds an image of the fused loss alone, forward and backward."""
    dtype = torch.bfloat16 if preset.bf16 else torch.float32
    tokens, width = architecture.visual_tokens, architecture.llm.hidden
    hidden = torch.randn(preset.batch, preset.prefix + tokens, width, device=device, dtype=dtype, requires_grad=True)
    image = torch.arange(preset.batch, device=device)
    rows = (image[:, None] * hidden.shape[1] + preset.prefix + torch.arange(tokens, device=device)).flatten()
    target = torch.randn(len(rows), width, device=device, dtype=dtype)

    def forward_backward() -> Any:
        return torch.autograd.grad(visual_distill_loss(hidden, rows, target), hidden)

    return milliseconds(forward_backward, device, 0.3, cold=False) / 1e3 / preset.batch


@dataclass
class Measured:
    """What is known of a variant so far. `steps`: seconds an image of its steps, each with the first one's before."""

    variant: Variant
    errors: dict[str, Any]
    batch: int = 0
    steps: list[tuple[float, float | None]] = field(default_factory=list)
    counted: float | None = None
    peak: int | None = None
    peak_batch: int | None = None


def row_of(found: Measured, preset: Preset, architecture: Architecture, report: dict[str, Any]) -> dict[str, Any]:
    """What is not measured yet, or had no memory to be measured in, is None."""
    seconds = sorted(own for own, _ in found.steps)
    median = statistics.median(seconds)
    # of steps that were taken one after the other, so that a busy spell counts in both
    ratios = [reference / own for own, reference in found.steps if reference is not None]
    flops = analytic_flops(found.variant, preset, architecture)
    moved = least_bytes(found.variant, preset, architecture, found.batch)
    datasheet = report["datasheet_flops_per_s"]
    return {
        "variant": found.variant.letter,
        "name": found.variant.name,
        "site": found.variant.on(preset).site,
        "ms_per_image": 1e3 * median,
        "ms_per_image_quartiles": [1e3 * seconds[len(seconds) // 4], 1e3 * seconds[-1 - len(seconds) // 4]],
        "images_per_s": 1 / median,
        "speedup": statistics.median(ratios) if ratios else None,
        "batch": found.batch,
        "flops_per_image": flops,
        "counted_flops_per_image": found.counted,
        "least_bytes_per_image": moved,
        "roofline_ms_per_image": 1e3 * max(flops / report["matmul_flops_per_s"], moved / report["copy_bytes_per_s"]),
        "mfu_of_matmul": flops / median / report["matmul_flops_per_s"],
        "mfu": flops / median / datasheet if datasheet else None,
        "peak_bytes": found.peak,
        "peak_batch": found.peak_batch,
        **found.errors,
    }


class Race:
    """Variants side by side: compared with the first, their steps timed in turn, their FLOPs counted.

    `found` holds what is known of each, `left_out` why a variant has no row. `publish` is called when more is known.
    """

    def __init__(self, letters: str, preset: Preset, device: torch.device, folder: Path, say: Callable[[str], None]):
        self.preset, self.device, self.say = preset, device, say
        self.found: dict[str, Measured] = {}
        self.left_out: dict[str, str] = {}
        self.first = min(letters)
        self.rigs, self._resources = build_rigs(letters, preset, device, folder)
        self._config = configuration(preset)
        self._made: dict[int, Images] = {}
        self._group: dict[str, Rig] = {}  # those still in the race, of the compiled ones or of the others

    def images(self, count: int) -> Images:
        if count not in self._made:
            pin = self.device.type == "cuda"
            self._made[count] = Images(self.preset, self._config, count // 2, count - count // 2, pin=pin)
        return self._made[count]

    def halving(self, images: Images, attempt: Callable[[Images], Any]) -> tuple[Images, Any]:
        """`attempt` with as many images as fit: half of them each time memory runs out, down to one of each set."""
        while True:
            try:
                return images, attempt(images)
            except torch.OutOfMemoryError:
                if images.forget == 1:
                    raise
            free_memory()
            images = self.images(2 * (images.forget // 2))

    def drop(self, letter: str, reason: str) -> None:
        self.left_out[letter] = reason
        self.found.pop(letter, None)
        self._group.pop(letter).close()
        free_memory()

    def run(self, repetitions: int, batch: int, publish: Callable[[], None]) -> None:
        """Compiled ones come after the others, beside (a) again: what they take to compile then holds nothing up."""
        with self._resources:
            reference: Reference | None = None
            for compiled in (False, True):
                self._group = {letter: rig for letter, rig in self.rigs.items() if rig.variant.compiled == compiled}
                reference = reference or self.reference(self.images(batch))
                for letter, error in self.errors(reference, batch).items():
                    if isinstance(error, str):
                        self.say(f"({letter}) {error}")
                        self.drop(letter, error)
                    else:
                        self.found[letter] = Measured(self.rigs[letter].variant, error)
                # Lightest first: what engines and caches hold is there when the heaviest, (a), finds out how much fits.
                for letter in reversed(list(self._group)):
                    self.warm_up(letter, self.images(batch))
                if compiled and self.first in self.found and self._group:
                    self._group = {self.first: self.rigs[self.first], **self._group}
                for _ in range(repetitions if self._group else 0):
                    self.take_steps()
                    publish()
            for letter, own in self.found.items():
                if own.variant.compiled and own.variant.site is None and "e" in self.found:
                    own.counted = self.found["e"].counted  # the same operations
                else:
                    with contextlib.suppress(torch.OutOfMemoryError):
                        own.counted = counted_flops(self.rigs[letter], own.batch)
                free_memory()
            publish()
        self.rigs, self._group = {}, {}  # their memory is for those that are weighed alone

    def reference(self, images: Images) -> "Reference | None":
        """Of the first variant that has the memory; None where none of the group has, or each has its own."""
        while (first := next((k for k, rig in self._group.items() if rig.plain is None), None)) is not None:
            with contextlib.suppress(torch.OutOfMemoryError):
                return self.halving(images, lambda images, rig=self._group[first]: make_reference(rig, images))[1]
            self.drop(first, NO_MEMORY)
        return None

    def errors(self, reference: Reference | None, batch: int) -> dict[str, dict[str, Any] | str]:
        """As `compare`, of the whole group: a rig with a plain one of its own is held to that."""
        found = compare({k: rig for k, rig in self._group.items() if rig.plain is None}, reference)
        for letter, rig in self._group.items():
            if (plain := rig.plain) is None:
                continue
            try:
                _, own = self.halving(self.images(batch), lambda images, plain=plain: make_reference(plain, images))
                found |= compare({letter: rig}, own)
            except torch.OutOfMemoryError:
                found[letter] = NO_MEMORY
            plain.close()
        return found

    def warm_up(self, letter: str, images: Images) -> None:
        """Two steps with as many images as fit, at most `images`; a variant that has no memory for any is dropped."""
        rig = self._group[letter]

        def attempt(images: Images) -> None:
            rig.load(images, rig.scale)
            rig.step()
            rig.step()

        try:
            images, _ = self.halving(images, attempt)
            self.found[letter].batch = images.forget + images.retain
        except torch.OutOfMemoryError:
            self.drop(letter, NO_MEMORY)
        free_memory()

    def take_steps(self) -> None:
        """One timed step of every variant. Where memory has run short since the warm-up, fewer images, timed anew."""
        reference: float | None = None
        for letter, rig in list(self._group.items()):
            own = self.found[letter]
            while letter in self._group:
                with contextlib.suppress(torch.OutOfMemoryError):
                    if self.device.type == "cuda":
                        rig.step()  # in which the allocator takes back what the variant before has left in pieces
                    seconds = seconds_of(rig.step, self.device) / own.batch
                    if letter == self.first:
                        reference = seconds
                    own.steps.append((seconds, reference))
                    break
                free_memory()  # here, where the error no longer holds what ran out of it
                own.steps.clear()
                if rig.images.forget > 1:
                    self.warm_up(letter, self.images(2 * (rig.images.forget // 2)))
                else:
                    self.drop(letter, "out of memory beside the other variants")

    def weigh(self, letter: str, folder: Path) -> None:
        """The peak of memory of a variant alone; the row stands without one where even that runs out."""
        own = self.found[letter]

        def alone(images: Images) -> int:
            return peak_bytes(lambda: run_alone(own.variant, self.preset, self.device, images, folder), self.device)

        with contextlib.suppress(torch.OutOfMemoryError):
            images, own.peak = self.halving(self.images(own.batch), alone)
            own.peak_batch = images.forget + images.retain


def measure(
    preset: Preset, device: torch.device, *, letters: str = "abcdefgh", repetitions: int = 7, batch: int | None = None,
    say: Callable[[str], None] = print, keep: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:  # fmt: skip
    """The benchmark's JSON: `device`, `versions`, `rows`, and `left_out` with the reason for every missing row.

    `keep` is given the report whenever something was added to it, so that what stops the run loses no more than what
    was not measured yet.
    """
    architecture = architecture_of(configuration(preset).to_dict(), name=preset.facts.get("name_or_path", "tiny"))
    report = head(preset, architecture, device)
    missing = {}
    if importlib.util.find_spec("bitsandbytes") is None:
        missing = {v.letter: "bitsandbytes is not installed" for v in VARIANTS if v.optim in EIGHT_BIT}
        missing = {letter: reason for letter, reason in missing.items() if letter in letters}
        letters = "".join(letter for letter in letters if letter not in missing)
    keep(report)
    with tempfile.TemporaryDirectory() as name:
        race = Race(letters, preset, device, Path(name), say)
        race.left_out = report["left_out"] = missing
        report["speedup_over"] = race.first

        def publish() -> None:
            report["rows"] = [row_of(f, preset, architecture, report) for f in race.found.values() if f.steps]
            keep(report)

        race.run(repetitions, batch or preset.batch, publish)
        for letter in race.found:
            race.weigh(letter, Path(name))
            publish()
            say(line(next(row for row in report["rows"] if row["variant"] == letter)))
    return report


def head(preset: Preset, architecture: Architecture, device: torch.device) -> dict[str, Any]:
    """The report without rows: what is measured, on what, and the ceilings of the device."""
    dtype = torch.bfloat16 if preset.bf16 else torch.float32
    origin = measured_on(device)
    return {
        **origin,
        "model": architecture.name,
        "site": preset.site,
        "tokens": {"visual": architecture.visual_tokens, "text": preset.prefix + preset.suffix},
        "dtype": str(dtype).removeprefix("torch."),
        "tolerance": dict(zip(("loss", "gradient"), TOLERANCE[dtype], strict=True)),
        "matmul_flops_per_s": matmul_ceiling(device, dtype),
        "datasheet_flops_per_s": peak_flops(origin["device"]) if device.type == "cuda" else None,
        "copy_bytes_per_s": copy_ceiling(device),
        "loss_ms_per_image": 1e3 * loss_seconds(preset, architecture, device),
        "rows": [],
        "left_out": {},
    }


def line(row: dict[str, Any]) -> str:
    low, high = row["ms_per_image_quartiles"]
    speedup = "" if row["speedup"] is None else f", {row['speedup']:.2f}x"
    peak = "" if row["peak_bytes"] is None else f", peak {row['peak_bytes'] / 1e9:.3f} GB"
    return (
        f"({row['variant']}) {row['ms_per_image']:9.2f} ms/image ({low:.2f} ... {high:.2f}){speedup}, "
        f"{row['flops_per_image'] / 1e12:.4f} TFLOP/image, MFU {row['mfu'] or row['mfu_of_matmul']:.1%}{peak}; "
        f"errors of loss {row['max_loss_error']:.0e}, gradient {row['max_grad_error']:.0e}: {row['name']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--variants", default="abcdefgh", help="which rows; the first is the reference of the others")
    parser.add_argument("--repetitions", type=int, default=7, help="steps of each variant, taken in turn")
    parser.add_argument("--batch", type=int, help="images a step, half of each set; halved where memory runs out")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: no GPU is visible to torch; use --device cpu")
    if args.batch is not None and args.batch < 2:
        parser.error(f"--batch {args.batch}: at least 2, one image of each set")

    def keep(report: dict[str, Any]) -> None:
        about = {"preset": args.preset, "command": " ".join(["python benchmarks/step.py", *sys.argv[1:]])}
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps({"benchmark": "step", **about, **report}, indent=1) + "\n")

    report = measure(
        PRESETS[args.preset](), device, letters=args.variants, repetitions=args.repetitions, batch=args.batch, keep=keep
    )
    keep(report)
    for letter, reason in report["left_out"].items():
        print(f"({letter}) left out: {reason}")
    sys.exit(1 if report["left_out"] else 0)


if __name__ == "__main__":
    main()
