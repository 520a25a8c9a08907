"""Neuron pruning without training: zero the MLP neurons that answer to forget questions more than to retained ones."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastvkd.errors import TrainingError
from fastvkd.methods import SIDES
from fastvkd.models import families
from fastvkd.models.answers import AnswerBatch
from fastvkd.unlearning.answers import AnswerSampler, read_answers
from fastvkd.unlearning.ingredients import Trained

# The layer that reads an MLP's neurons, in CLIP and SigLIP towers, LLaVA projectors, Qwen-VL mergers, Llama-like LLMs.
READERS = ("fc2", "linear_2", "down_proj")


class NeuronPruning:
    """Zeroes `fraction` of the trainable MLPs' neurons, judged on `batches` batches of each side."""

    def __init__(self, fraction: float, batches: int):
        self.fraction, self.batches = fraction, batches

    def __call__(
        self, trained: Trained, sampler: AnswerSampler, device: torch.device
    ) -> list[tuple[str, nn.Parameter]]:
        """The weights that changed."""
        readers = find_readers(trained.model, trained.parameters)
        forget, retain = (
            importance(trained.model, readers, (batch.to(device) for batch in sampler.visited(self.batches, 1, side)))
            for side in SIDES
        )
        return prune(readers, forget, retain, self.fraction)


def find_readers(model: nn.Module, parameters: Iterable[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Linear]]:
    """The linear layers that read MLP neurons and whose weights are in `parameters`, each with the weight's name.

    Raises TrainingError when there is none: nothing would be pruned.
    """
    allowed = {id(p): name for name, p in parameters}
    found = [
        (allowed[id(module.weight)], module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in READERS and id(module.weight) in allowed
    ]
    if not found:
        raise TrainingError(
            f"method=manu finds no MLP ({', '.join(READERS)}) among the trainable weights: choose another `trainable`"
        )
    return found


@torch.no_grad()
def importance(model: nn.Module, readers: list[tuple[str, nn.Linear]], batches: Iterable[AnswerBatch]) -> list[Tensor]:
    """Root mean square activation of every neuron over the tokens of `batches`, padding left out.

    Returns (neurons,) float32 for each reader.
    """
    in_llm = {id(module) for module in families.language_model(model, families.family_of(model)).modules()}
    sums = [torch.zeros(layer.in_features, device=layer.weight.device) for _, layer in readers]
    counts = [0] * len(readers)
    inputs: dict[int, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, i=i: inputs.__setitem__(i, args[0].detach()))
        for i, (_, layer) in enumerate(readers)
    ]
    try:
        for batch in batches:
            read_answers(model, batch)
            for i, value in inputs.items():
                if id(readers[i][1]) in in_llm:
                    value = value[batch.inputs["attention_mask"].bool()]
                flat = value.reshape(-1, value.shape[-1]).float()
                sums[i] += flat.square().sum(0)
                counts[i] += len(flat)
            inputs.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return [(total / max(count, 1)).sqrt() for total, count in zip(sums, counts, strict=True)]


@torch.no_grad()
def prune(
    readers: list[tuple[str, nn.Linear]], forget: list[Tensor], retain: list[Tensor], fraction: float
) -> list[tuple[str, nn.Parameter]]:
    """Zero the `fraction` of all MLPs' neurons with the highest I_forget / I_retain; returns the weights they are in.

    A neuron is zeroed by its column in the layer that reads it, so it gives nothing whatever the input.

    Source: MANU, "Modality-Aware Neuron Unlearning" (arXiv 2502.15910). The paper combines four measures of activation
    (absolute, frequency, variance, root mean square) over inputs with and without an image. Here the importance I is
    the root mean square over the tokens of image questions.
    """
    scores = torch.cat([f / r.clamp(min=1e-12) for f, r in zip(forget, retain, strict=True)])
    count = round(fraction * len(scores))
    if not count:
        raise TrainingError(f"manu_fraction={fraction} of {len(scores)} neurons is none: raise it")
    chosen = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    chosen[scores.topk(count).indices] = True
    for (_, layer), own in zip(readers, chosen.split([len(f) for f in forget]), strict=True):
        layer.weight[:, own] = 0
    return [(name, nn.Parameter(layer.weight)) for name, layer in readers]
