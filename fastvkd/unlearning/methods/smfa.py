"""Sculpted memory forgetting: learn to refuse, then take back what pulls hard against learning the retained answers."""

import torch
from torch import Tensor, nn

from fastvkd.engines.local import LocalEngine
from fastvkd.methods import Side
from fastvkd.unlearning.answers import AnswerSampler, AnswerTask
from fastvkd.unlearning.ingredients import Trained
from fastvkd.unlearning.methods.idk import refusal

Deltas = list[Tensor]  # of every trained weight, float32


class SculptedForgetting:
    """W = W_0 + (1 - M) D_f, where the mask M takes entries of the update D_f out.

    D_f: what `max_steps` updates on refusals in place of forget answers, and on retained answers, change. D_a, the
    retaining anchor: what as many updates on retained answers alone change, again from W_0. M is 1 where the two have
    opposite signs and |D_f| > k rho |D_a|, rho = ||D_f|| / ||D_a|| being of the whole weight. So k = 0 takes out every
    entry in conflict, and a large k none.

    Source: Zeng et al., arXiv 2511.20196. There the updates are low-rank adapters and retained answers are few; here
    they are of the weights that `trainable` names, and of the whole retain set.
    """

    def __init__(
        self,
        k: float,
        optim: str,
        learning_rate: float,
        weight_decay: float,
        max_steps: int,
        warmup_steps: int,
        schedule: str,
        gradient_accumulation_steps: int,
        max_grad_norm: float,
    ):
        self.k, self.micro_steps = k, max_steps * gradient_accumulation_steps
        self._how = {
            "optim": optim,
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "max_steps": max_steps,
            "warmup_steps": warmup_steps,
            "lr_scheduler_type": schedule,
            "gradient_accumulation_steps": gradient_accumulation_steps,
            "max_grad_norm": max_grad_norm,
        }

    def __call__(
        self, trained: Trained, sampler: AnswerSampler, device: torch.device
    ) -> list[tuple[str, nn.Parameter]]:
        """The weights, changed."""
        task = AnswerTask(trained.model, refusal, sampler, device, 1.0, 1.0)
        forget, anchor = self._learn(trained, task, device), self._learn(trained, task, device, "retain")
        with torch.no_grad():
            for (_, parameter), d_f, d_a in zip(trained.parameters, forget, anchor, strict=True):
                parameter.copy_((parameter.float() + sculpted(d_f, d_a, self.k)).to(parameter.dtype))
        return trained.parameters

    def _learn(self, trained: Trained, task: AnswerTask, device: torch.device, only: Side | None = None) -> Deltas:
        """What training on the task, or on one side of it, changes; the weights are put back."""
        before = [p.detach().clone() for _, p in trained.parameters]
        engine = LocalEngine(
            trained.parameters,
            module=trained.runner,
            device=device,
            **self._how,  # type: ignore[arg-type]
        )
        for step in range(self.micro_steps):
            engine.backward(task.loss(task.place(task.load(step, 0, 1)), only)["loss"])
            engine.step()
        engine.release()
        deltas = [p.detach().float() - was.float() for (_, p), was in zip(trained.parameters, before, strict=True)]
        with torch.no_grad():
            for (_, parameter), was in zip(trained.parameters, before, strict=True):
                parameter.copy_(was)
        return deltas


def sculpted(forget: Tensor, anchor: Tensor, k: float) -> Tensor:
    """The forgetting update of one weight without its entries that conflict with the anchor and outweigh it."""
    rho = forget.norm() / (anchor.norm() + 1e-12)
    harmful = (forget * anchor < 0) & (forget.abs() > k * rho * anchor.abs())
    return forget.masked_fill(harmful, 0.0)
