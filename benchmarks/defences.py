"""Defences against relearning that research tries on VKD: training against an attacker, in a null space, or from noise.

*Null space* (after Adam-NSCL, arXiv 2103.07113): an update of a matrix is projected on the directions of its input in
which retained images have least energy, so that what it gives for them stays. The optimiser's step itself is projected,
which makes this exact whatever Adam does to the gradient; one-dimensional weights and embeddings stand still.

*Worst case* (first order, after TAR, arXiv 2408.00761): a simulated attacker takes a few steps from the current weights
towards what the original sees of forget images; the gradient of the forget loss where it arrives is added to the
ordinary one. This attacker knows features, not answers: VKD never runs the LLM.

*Noise, then distil* (after UNDO, arXiv 2506.06278): training starts from weights to which noise was added, so that what
they knew has to come from the targets anew.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from fastvkd.engines.protocol import Engine
from fastvkd.models.visual_path import VisualBatch, VisualPath
from fastvkd.unlearning import loop
from fastvkd.unlearning.loop import build_engine
from fastvkd.unlearning.tasks import Prepared
from fastvkd.unlearning.vkd.objective import DistillBatch
from fastvkd.unlearning.vkd.task import FeatureTask

MOMENT_BATCHES = 32  # batches whose retained images tell what directions they use
ATTACK_RATE = 1e-3  # the relearning attack's own learning rate


@contextlib.contextmanager
def defended(*, energy: float | None = None, attack_steps: int = 0, noise: float = 0.0) -> Iterator[list["Defended"]]:
    """Runs of the product that are made within have these defences; gives the list of their engines.

    energy, attack_steps: see `Defended`. noise: that is added to the trained weights first, see `add_noise`.
    """
    engines: list[Defended] = []

    def build(run: Prepared, *rest: Any) -> Engine:
        if noise:
            add_noise(run.trained.parameters, noise, run.settings.seed)
        engines.append(Defended(build_engine(run, *rest), run, energy=energy, attack_steps=attack_steps))
        return engines[-1]

    with mock.patch.object(loop, "build_engine", build):  # all else of a run is the product's
        yield engines


@torch.no_grad()
def add_noise(parameters: Sequence[tuple[str, nn.Parameter]], size: float, seed: int) -> None:
    """Add normal noise to each weight, `size` times the standard deviation that its tensor has."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in parameters:
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        parameter.add_(noise * (size * parameter.float().std(correction=0)))


class Defended:
    """An engine whose `backward` adds the worst case, and whose `step` keeps to the null space.

    energy: the share of what retained images use that updates keep clear of; None lets them go anywhere. attack_steps:
    of the simulated attacker; 0 for none.
    """

    def __init__(self, engine: Engine, run: Prepared, *, energy: float | None, attack_steps: int):
        self._engine, self._run, self._attack_steps = engine, run, attack_steps
        self.space = None if energy is None else NullSpace(run, energy)
        engine.forward_module.register_forward_pre_hook(self._note)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """The two values that a loop may set are the engine's."""
        owner = self._engine if name in ("base_learning_rate", "schedule") else self
        object.__setattr__(owner, name, value)

    def _note(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._batch = inputs[-1]

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)
        if not self._attack_steps:
            return
        task, forget = feature_task(self._run), forget_side(self._batch)
        next_step = (self._engine.updates + 1) % self._run.settings.max_steps
        attack = attacker_loss(self._run, task.load(next_step, 0, 1))
        values = [p for _, p in self._run.trained.parameters]
        gradients = worst_case_gradient(
            values, attack, lambda: task.loss(forget)["loss"], self._attack_steps, ATTACK_RATE
        )
        for parameter, gradient in zip(values, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def step(self) -> Tensor | None:
        return self._engine.step() if self.space is None else self.space.step(self._engine.step)


class NullSpace:
    """Lets the weights of a task move only where that leaves alone what the original gives for retained images.

    For a matrix W with inputs x and an orthogonal projection P on directions that retained x do not use, an update D P
    changes nothing for them: D P x = 0. A convolution whose windows do not overlap is the matrix that it is on unfolded
    patches. Every other weight stands still. `free_share`: of all degrees of freedom, those that are left.
    """

    def __init__(self, run: Prepared, energy: float):
        teacher, task = run.trained.teacher, feature_task(run)
        assert teacher is not None, "the original must run beside, to be asked"
        self.parameters = run.trained.parameters
        path = VisualPath(teacher, list(run.settings.sites))

        def see_retained() -> None:
            for step in range(min(MOMENT_BATCHES, run.settings.max_steps)):
                batch = task.load(step, 0, 1)
                path(batch.images.tail(int(batch.is_forget.sum())))

        modules = dict(teacher.named_modules())
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
    def step(self, update: Callable[[], Tensor | None]) -> Tensor | None:
        """Run the optimiser's step `update`, of which only the part in the null space remains; returns what it does."""
        before = {}
        for name, parameter in self.parameters:
            if name not in self.projections:
                parameter.grad = None  # it is not to count in the gradient's norm either
            elif parameter.grad is not None:
                parameter.grad = self.project(name, parameter.grad)
                before[name] = parameter.clone()
        norm = update()
        for name, parameter in self.parameters:
            if name in before:
                parameter.copy_(before[name] + self.project(name, parameter - before[name]))
        return norm

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


def attacker_loss(run: Prepared, batch: DistillBatch) -> Callable[[], Tensor]:
    """How far the features of a batch's forget images lie from the original's, to be made small: mean squared error at
    the sites, each divided by the original's mean square there."""
    teacher, path = run.trained.teacher, feature_task(run).objective.path
    assert teacher is not None
    images = forget_side(batch).images
    with torch.no_grad():
        taught = {site: f.gathered() for site, f in VisualPath(teacher, path.sites)(images).items()}

    def loss() -> Tensor:
        seen = path(images)
        errors = [(seen[s].gathered() - taught[s]).square().mean() / taught[s].square().mean() for s in taught]
        return torch.stack(errors).sum()

    return loss


def forget_side(batch: DistillBatch) -> DistillBatch:
    """The forget images of a batch alone, which stand first in it."""
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
    targets = {site: dataclasses.replace(t, target_rows=t.target_rows[:n_rows]) for site, t in batch.targets.items()}
    return dataclasses.replace(batch, images=head, is_forget=batch.is_forget[:count], targets=targets, taught=None)


def feature_task(run: Prepared) -> FeatureTask:
    assert isinstance(run.task, FeatureTask)
    return run.task
