"""What makes VKD resist relearning, on the demo's data: worst-case training, null-space projection, masks, and sites.

    python benchmarks/robustness.py

writes benchmarks/results/robustness.json, row by row (finished rows are kept when it is run again), and the table as
Markdown beside it. Every row is one run of `STEPS` steps on one thread, then asked and attacked as in methods.py.
`saturate` is configs/demo.yaml as it is, `noise` the gentle recipe of ablation.py.

*Null space* (after Adam-NSCL, arXiv 2103.07113): an update of a matrix is projected on the directions of its input in
which retained images have least energy, so that what it gives for them stays. The optimiser's step itself is projected,
which makes this exact whatever Adam does to the gradient; one-dimensional weights and embeddings stand still.

*Worst case* (first order, after TAR, arXiv 2408.00761): a simulated attacker takes a few steps from the current weights
towards what the original sees of forget images; the gradient of the forget loss where it arrives is added to the
ordinary one. This attacker knows features, not answers: VKD never runs the LLM.
"""

import argparse
import dataclasses
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from ablation import COMMON
from methods import ATTACK_SAMPLES, ATTACK_SHARE, SAMPLES
from torch import Tensor, nn
from world import World, command, write

from fastvkd.attacks.relearning import area_under_curve
from fastvkd.demo.run import SIZES
from fastvkd.engines.checkpoints import identify_base, local_folder
from fastvkd.environment import measured_on
from fastvkd.models.families import tower_depth
from fastvkd.models.loading import load_config, load_model
from fastvkd.models.visual_path import VisualBatch, VisualPath
from fastvkd.paths import shipped
from fastvkd.settings import Settings
from fastvkd.unlearning.loop import build_engine
from fastvkd.unlearning.objective import DistillBatch
from fastvkd.unlearning.targets import SiteTargets
from fastvkd.unlearning.tasks import StepBatch, Task, prepare

STEPS = {"noise": 300, "saturate": 800}  # the latter as in configs/demo.yaml: fewer leave forget photos open
MOMENT_BATCHES = 32  # batches whose retained images tell what directions they use
ATTACK_RATE = 1e-3  # the relearning attack's own learning rate
RECIPES: dict[str, dict[str, Any]] = {"noise": {"forget_target": "noise", **COMMON}, "saturate": {}}
NamedParameters = Sequence[tuple[str, nn.Parameter]]


@dataclass(frozen=True)
class Variant:
    """What is added to a recipe. energy: the share of retained energy that updates keep clear of. attack_steps: of the
    simulated attacker. last_block: also supervise the tower's last block, with half the weight."""

    recipe: str
    energy: float | None = None
    attack_steps: int = 0
    last_block: bool = False
    overrides: dict[str, Any] = field(default_factory=dict)


def _half(granularity: str) -> dict[str, Any]:
    return {"saliency": {"granularity": granularity, "fraction": 0.5}}


VARIANTS = {
    "noise": Variant("noise"),
    "noise, null space of 99 %": Variant("noise", energy=0.99),
    "noise, null space of 99.9 %": Variant("noise", energy=0.999),
    "noise, null space of 99.99 %": Variant("noise", energy=0.9999),
    "noise, worst case of 1 step": Variant("noise", attack_steps=1),
    "noise, worst case of 3 steps": Variant("noise", attack_steps=3),
    "noise, null space of 99.9 %, worst case of 3 steps": Variant("noise", energy=0.999, attack_steps=3),
    "saturate": Variant("saturate"),
    "saturate, null space of 99.9 %": Variant("saturate", energy=0.999),
    "saturate, worst case of 1 step": Variant("saturate", attack_steps=1),
    "saturate, half of the neurons": Variant("saturate", overrides=_half("neuron")),
    "saturate, half of the weights": Variant("saturate", overrides=_half("weight")),
    "saturate, last block supervised too": Variant("saturate", last_block=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/robustness.json"))
    parser.add_argument("--out", type=Path, default=Path("out/robustness"))
    parser.add_argument("--size", default="default", choices=SIZES)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=VARIANTS, metavar="VARIANT")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(arguments.json.read_text())["rows"] if arguments.json.exists() else []
    for seed in arguments.seeds:
        done = {row["key"] for row in rows}
        missing = [name for name in arguments.variants if key(arguments.size, seed, name) not in done]
        world = World(seed, arguments.out, size=arguments.size) if missing else None
        for name in missing:
            assert world is not None
            row = measure(world, arguments.size, name)
            rows = [r for r in rows if (r["size"], r["seed"], r["variant"]) != (row["size"], seed, name)]
            rows = sorted([*rows, row], key=lambda r: (r["size"], list(VARIANTS).index(r["variant"]), r["seed"]))
            print(json.dumps({k: v for k, v in row.items() if k != "curves"}), flush=True)
            write(arguments.json, {**measured_on("cpu"), "command": command(__file__), **ABOUT, "rows": rows})
    arguments.json.with_suffix(".md").write_text(table(rows))


ABOUT: dict[str, Any] = {
    "steps": STEPS,
    "samples": SAMPLES,
    "moment_batches": MOMENT_BATCHES,
    "attack_share": ATTACK_SHARE,
    "attack_samples": ATTACK_SAMPLES,
    "attack_rate": ATTACK_RATE,
    "recipes": {name: {"config": "configs/demo.yaml", **changes} for name, changes in RECIPES.items()},
}


def key(size: str, seed: int, name: str) -> str:
    """What a finished row depends on."""
    facts = [size, repr(SIZES[size]), seed, repr(VARIANTS[name]), shipped("configs/demo.yaml").read_text(), ABOUT]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def measure(world: World, size: str, name: str) -> dict[str, Any]:
    """One row: the run, multiple choice on every set, and the relearning attack with visual and with all weights."""
    variant = VARIANTS[name]
    overrides = {
        **world.spec.overrides,
        **RECIPES[variant.recipe],
        **variant.overrides,
        "max_steps": STEPS[variant.recipe],
    }
    if variant.last_block:
        depth = tower_depth(load_config(str(world.vanilla)))
        overrides["sites"] = {"projector": 1.0, f"vision:{depth}": 0.5}
    with tempfile.TemporaryDirectory(dir=world.out) as folder:
        model, run = train(world.settings(Path(folder), overrides), variant, world.vanilla)
    curves = world.relearn(model, ATTACK_SHARE, ATTACK_SAMPLES)
    return {
        "key": key(size, world.seed, name),
        "size": size,
        "seed": world.seed,
        "variant": name,
        **run,
        "vqa": world.accuracy(model, min(SAMPLES, world.spec.max_samples)),
        "relearning_auc": {weights: area_under_curve(curve) for weights, curve in curves.items()},
        "curves": curves,
    }


def train(settings: Settings, variant: Variant, vanilla: Path) -> tuple[Any, dict[str, Any]]:
    """The whole model after a run, and the run's figures. The loop of `fastvkd.unlearning.loop`, without its files."""
    settings.check()
    torch.manual_seed(settings.seed)
    device = torch.device("cpu")
    started = time.perf_counter()
    task = prepare(settings, device, identify_base(local_folder(settings.model_name_or_path)))
    engine = build_engine(settings, task, device, {})
    space = NullSpace(task, variant.energy) if variant.energy is not None else None
    values = [p for _, p in task.parameters]
    open_share: list[float] = []
    for step in range(task.max_steps):
        batch = task.batch(step, 0, 1)
        terms = task.module(batch)
        engine.backward(terms["loss"])
        if variant.attack_steps:
            attack = attacker_loss(task, task.load((step + 1) % task.max_steps, 0, 1).distill)
            forget = StepBatch(forget_side(batch.distill), None)
            gradients = worst_case_gradient(
                values, attack, lambda forget=forget: task.module(forget)["loss"], variant.attack_steps, ATTACK_RATE
            )
            for parameter, gradient in zip(values, gradients, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        if space is not None:
            space.step(engine.step)
        else:
            engine.step()
        if "forget_open" in terms:
            open_share.append(float(terms["forget_open"]))
    model = load_model(vanilla)
    whole = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in engine.weights().items():
            whole[name].copy_(value)
    run = {
        # of the trained weights' degrees of freedom, those that a mask or the null space leaves
        "free_share": space.free_share if space is not None else task.trained_share,
        "forget_open": sum(open_share[-20:]) / 20 if open_share else None,  # of the last 20 batches' forget views
        "seconds": time.perf_counter() - started,
    }
    return model, run


class NullSpace:
    """Lets the weights of a task move only where that leaves alone what the original gives for retained images.

    For a matrix W with inputs x and an orthogonal projection P on directions that retained x do not use, an update D P
    changes nothing for them: D P x = 0. A convolution whose windows do not overlap is the matrix that it is on unfolded
    patches. Every other weight stands still. `free_share`: of all degrees of freedom, those that are left.
    """

    def __init__(self, task: Task, energy: float):
        assert task.teacher is not None, "the original must run beside, to be asked"
        self.parameters = task.parameters
        path = VisualPath(task.teacher, list(_path(task).sites))

        def see_retained() -> None:
            for step in range(min(MOMENT_BATCHES, task.max_steps)):
                distill = task.load(step, 0, 1).distill
                assert distill is not None
                path(distill.images.tail(int(distill.is_forget.sum())))

        modules = dict(task.teacher.named_modules())
        layers = {
            name: modules[name.removesuffix(".weight")]
            for name, _ in self.parameters
            if isinstance(modules.get(name.removesuffix(".weight")), nn.Linear | nn.Conv2d)
        }
        moments = second_moments(layers, see_retained)
        self.projections = {name: null_space(moment, energy) for name, moment in moments.items()}
        free = sum(len(p) * self.projections[n].trace() for n, p in self.parameters if n in self.projections)
        self.free_share = float(free) / sum(p.numel() for _, p in self.parameters)

    @torch.no_grad()
    def step(self, update: Callable[[], Any]) -> None:
        """Run the optimiser's step `update`, of which only the part in the null space remains."""
        before = {}
        for name, parameter in self.parameters:
            if name not in self.projections:
                parameter.grad = None  # it is not to count in the gradient's norm either
            elif parameter.grad is not None:
                parameter.grad = self.project(name, parameter.grad)
                before[name] = parameter.clone()
        update()
        for name, parameter in self.parameters:
            if name in before:
                parameter.copy_(before[name] + self.project(name, parameter - before[name]))

    def project(self, name: str, change: Tensor) -> Tensor:
        return (change.flatten(1) @ self.projections[name].to(change.dtype)).view_as(change)


@torch.no_grad()
def second_moments(layers: dict[str, nn.Module], run: Callable[[], None]) -> dict[str, Tensor]:
    """Uncentred second moment, (in, in) float64, of what each linear or convolutional layer is given during `run`."""
    moments: dict[str, Tensor] = {}
    hooks = []
    for name, layer in layers.items():

        def note(layer: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
            rows = inputs[0]
            if isinstance(layer, nn.Conv2d):
                assert layer.stride == layer.kernel_size and layer.padding == (0, 0)
                rows = nn.functional.unfold(rows, layer.kernel_size, stride=layer.stride).transpose(1, 2)
            rows = rows.flatten(0, -2).double()
            moments[name] = moments.get(name, 0) + rows.T @ rows

        hooks.append(layer.register_forward_pre_hook(note))
    run()
    for hook in hooks:
        hook.remove()
    return moments


def null_space(moment: Tensor, energy: float) -> Tensor:
    """The orthogonal projection (in, in) on those eigenvectors of a second moment that are not needed to hold the share
    `energy` of its trace: all but the fewest largest whose sum reaches it."""
    values, vectors = torch.linalg.eigh(moment)  # rising
    values = values.clamp(min=0)
    free = vectors[:, values.cumsum(0) <= (1 - energy) * values.sum()]
    return free @ free.T


def worst_case_gradient(
    parameters: Sequence[nn.Parameter],
    attack: Callable[[], Tensor],
    loss: Callable[[], Tensor],
    steps: int,
    rate: float,
) -> tuple[Tensor | None, ...]:
    """The gradient of `loss` where an attacker arrives who descends `attack` for `steps` steps; the weights stay.

    A step is Adam's first: `rate * g / (|g| + 1e-8)`. The attacker's path counts as constant (first order). `.grad` is
    neither read nor written.
    """
    before = [p.detach().clone() for p in parameters]
    for _ in range(steps):
        gradients = torch.autograd.grad(attack(), parameters, allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.sub_(rate * gradient / (gradient.abs() + 1e-8))
    found = torch.autograd.grad(loss(), parameters, allow_unused=True)
    with torch.no_grad():
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
    return found


def attacker_loss(task: Task, batch: DistillBatch | None) -> Callable[[], Tensor]:
    """How far the features of a batch's forget images lie from the original's, to be made small: mean squared error at
    the sites, each divided by the original's mean square there."""
    assert batch is not None and task.teacher is not None
    images, path = forget_side(batch).images, _path(task)
    with torch.no_grad():
        taught = {site: f.gathered() for site, f in VisualPath(task.teacher, path.sites)(images).items()}

    def loss() -> Tensor:
        seen = path(images)
        errors = [(seen[s].gathered() - taught[s]).square().mean() / taught[s].square().mean() for s in taught]
        return torch.stack(errors).sum()

    return loss


def forget_side(batch: DistillBatch | None) -> DistillBatch:
    """The forget images of a batch alone, which stand first in it."""
    assert batch is not None
    count, images = int(batch.is_forget.sum()), batch.images
    tokens, entries = images.token_images < count, images.tower_images < count
    head = VisualBatch(
        {k: v[:count] if len(v) == images.n_images else v[entries] for k, v in images.inputs.items()},
        count,
        images.token_rows[tokens],
        images.token_images[tokens],
        images.tower_images[entries],
    )
    n_rows = int(tokens.sum())
    targets = {site: SiteTargets(t.target, t.target_rows[:n_rows]) for site, t in batch.targets.items()}
    return dataclasses.replace(batch, images=head, is_forget=batch.is_forget[:count], targets=targets, taught=None)


def _path(task: Task) -> Any:
    distill: Any = task.module.distill
    return distill.path


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Markdown: a line for each run; figures in %, `freedom` and `open` as in `train`."""
    lines = [
        "| recipe | seed | freedom | forget | test | retain | real world | open "
        "| relearnt, visual weights: 2 steps / 5 / AUC | all weights: 2 steps / 5 / AUC | seconds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        figures = [row["free_share"], *(row["vqa"][cell] for cell in ("forget", "test", "retain", "realworld"))]
        shown = ["" if value is None else f"{100 * value:.1f}" for value in [*figures, row["forget_open"]]]
        for weights, area in row["relearning_auc"].items():
            after = {point["step"]: point["accuracy"] for point in row["curves"][weights]}
            shown.append(" / ".join(f"{100 * value:.1f}" for value in (after[2], after[5], area)))
        lines.append("| " + " | ".join([row["variant"], str(row["seed"]), *shown, f"{row['seconds']:.0f}"]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
