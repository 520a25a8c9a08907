"""Knowledge vector weakening: without a gradient, neurons of the LLM that forget answers use more are turned down."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastvkd.errors import TrainingError
from fastvkd.models import families
from fastvkd.models.answers import AnswerBatch
from fastvkd.unlearning.answers import AnswerSampler, read_answers
from fastvkd.unlearning.ingredients import Trained

_READER = "down_proj"  # whose columns are the knowledge vectors of a gated MLP
_TINY = 1e-12

Readers = list[tuple[str, nn.Linear]]


class KnowledgeVectorWeakening:
    """Weakens the LLM's knowledge vectors batch by batch of forget questions, each by what is left of them.

    A knowledge vector is a column of an MLP's last matrix; its coefficient is the neuron's mean absolute activation at
    the positions that predict an answer. Each of at most `batches` forget batches multiplies every vector by

        g = exp(-gamma relu(log c_f - log c_r)) = min(1, (c_r / c_f) ** gamma)

    with c_f of that batch under the weights as they are then, and c_r of the retained questions under the original.

    Source: Kim et al., arXiv 2601.21794, and their code. They leave out the first and last few layers of the LLM, by
    search (gamma 0.01 to 0.03, batches of one); here all are weakened.
    """

    def __init__(self, gamma: float, batches: int):
        self.gamma, self.batches = gamma, batches

    def __call__(
        self, trained: Trained, sampler: AnswerSampler, device: torch.device
    ) -> list[tuple[str, nn.Parameter]]:
        """The weights that changed."""
        readers = find_readers(trained)
        retained = (batch.to(device) for batch in sampler.visited(self.batches, 1, "retain"))
        usual = coefficients(trained.model, readers, retained)
        for batch in sampler.visited(self.batches, 1, "forget"):
            weaken(readers, coefficients(trained.model, readers, [batch.to(device)]), usual, self.gamma)
        return [(name, nn.Parameter(layer.weight)) for name, layer in readers]


def find_readers(trained: Trained) -> Readers:
    """The LLM's layers of knowledge vectors, each with its weight's name; TrainingError where none may change."""
    allowed = {id(p): name for name, p in trained.parameters}
    llm = families.language_model(trained.model, families.family_of(trained.model))
    found = [
        (allowed[id(module.weight)], module)
        for name, module in llm.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] == _READER and id(module.weight) in allowed
    ]
    if not found:
        raise TrainingError("method=kvw weakens the MLPs of the LLM, which is not trained: set trainable=all")
    return found


@torch.no_grad()
def coefficients(model: nn.Module, readers: Readers, batches: Iterable[AnswerBatch]) -> list[Tensor]:
    """Mean absolute activation of every neuron at the positions that predict an answer: (neurons,) float32 a reader."""
    sums = [torch.zeros(layer.in_features, device=layer.weight.device) for _, layer in readers]
    count, wanted = 0, torch.empty(0)

    def add(i: int, activations: Tensor) -> None:
        sums[i] += activations[wanted.to(activations.device)].float().abs().sum(0)

    hooks = [
        layer.register_forward_pre_hook(lambda _, args, i=i: add(i, args[0])) for i, (_, layer) in enumerate(readers)
    ]
    try:
        for batch in batches:
            wanted = batch.predicts != -100
            count += int(wanted.sum())
            read_answers(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return [total / max(count, 1) for total in sums]


@torch.no_grad()
def weaken(readers: Readers, forget: list[Tensor], retain: list[Tensor], gamma: float) -> None:
    """Multiply each column of the readers' weights by its gate."""
    for (_, layer), c_f, c_r in zip(readers, forget, retain, strict=True):
        excess = ((c_f + _TINY).log() - (c_r + _TINY).log()).clamp(min=0)
        layer.weight *= (-gamma * excess).exp().to(layer.weight.dtype)
