"""Finds the direction that test-time steering (`fastvkd.models.steering`) pushes forget-like inputs along.

Source: MLLMEraser (arXiv 2510.04217). Its direction contrasts image-text pairs that recall knowledge with others that
erase it, and a map that is zero on retained inputs says how far to follow it. Ours are simpler. The erasing counterpart
of a question about a photo is the same question about a noise image. The map is one affine function of the hidden
state, cut to [0, 1]: ridge regression fits it to 1 on forget and 0 on retained inputs. Legend: n positions, H width.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from fastvkd.data.sources import read_forget_retain
from fastvkd.data.texts import refuse_marks
from fastvkd.errors import SettingsError
from fastvkd.models import families
from fastvkd.models.answers import collate_answers
from fastvkd.models.folder import local_folder
from fastvkd.models.loading import load_processor
from fastvkd.models.placement import loading_of
from fastvkd.models.processing import special_tokens
from fastvkd.models.steering import Steering, decoder_layers
from fastvkd.options import DeviceMap, ModelOptions, Quantized
from fastvkd.photos import decode_image
from fastvkd.records import Photo, Profile
from fastvkd.unlearning.answers import image_questions, text_questions
from fastvkd.unlearning.sampling import draw
from fastvkd.unlearning.vkd.images import noise_image

QUESTIONS = 256
_POSITIONS = 2048  # of a batch, at most
Question = tuple[Image.Image | None, str, str]


def fit(
    model: nn.Module,
    processor: Any,
    forget: Sequence[Profile],
    retain: Sequence[Profile],
    *,
    layers: Sequence[int],
    strength: float = 1.0,
    questions: int = QUESTIONS,
    ridge: float = 1e-2,
    seed: int = 0,
    batch_size: int = 16,
) -> Steering:
    """Find direction and gate at every one of `layers` from at most `questions` questions of each side.

    h is the layer's output at the positions that predict the answer. The direction is the mean over forget questions of
    h(noise image) - h(photo). The gate opens for h(photo). It closes at the same positions of retained image questions.
    It also closes at all positions of these and of text questions of both sides, since all inputs share some. `ridge`
    is relative to the mean variance of the hidden states. Raises SettingsError for a layer that the model lacks.
    """
    depth = len(decoder_layers(model))
    for name, count in (("questions", questions), ("batch_size", batch_size)):
        if count < 1:
            raise SettingsError(f"{name}={count}: at least 1 is needed")
    wrong = [layer for layer in layers if not 0 <= layer < depth]
    if wrong or not layers:
        raise SettingsError(f"steering layers {list(layers)}: name some of 0 to {depth - 1}")
    about_forget = _drawn(image_questions(forget), questions, (seed, 30))
    about_retain = _drawn(image_questions(retain), questions, (seed, 31))
    texts = _drawn(text_questions([*forget, *retain]), questions, (seed, 33))
    noise = [
        (noise_image(image.size, (seed, 32, i)), question, answer)
        for i, (image, question, answer) in enumerate(about_forget)
        if image is not None
    ]

    def states(asked: Sequence[Question], *, everywhere: bool) -> dict[int, Tensor]:
        return _hidden_states(model, processor, asked, layers, batch_size, everywhere=everywhere)

    recalled, erased, retained = (states(asked, everywhere=False) for asked in (about_forget, noise, about_retain))
    shared, in_words = states(about_retain, everywhere=True), states(texts, everywhere=True)
    directions, weights, biases = {}, {}, {}
    for layer in layers:
        directions[layer] = (erased[layer] - recalled[layer]).mean(0)
        elsewhere = torch.cat([shared[layer], in_words[layer]]) if in_words else shared[layer]
        weights[layer], biases[layer] = _gate(recalled[layer], [retained[layer], elsewhere], ridge)
    return Steering(directions, weights, biases, strength)


def fit_to_folder(
    model_name_or_path: str,
    data: str,
    *,
    forget_split: str = "forget_5",
    retain_split: str = "retain_95",
    device: str = "auto",
    bf16: bool = False,
    fp32: bool = False,
    quantize: Quantized = "auto",
    device_map: DeviceMap = "none",
    max_pixels: int | None = None,
    **options: Any,
) -> Steering:
    """`fit` of a model folder on a data folder (or hub ids); `options` are those of `fit`. Raises FastVKDError."""
    forget, retain = read_forget_retain(data, forget_split, retain_split)
    told = ModelOptions(
        model=model_name_or_path,
        data=data,
        device=device,
        bf16=bf16,
        fp32=fp32,
        quantize=quantize,
        device_map=device_map,
    )
    processor = load_processor(model_name_or_path, max_pixels=max_pixels)
    refuse_marks([*forget, *retain], special_tokens(processor))
    model = loading_of(told, local_folder(model_name_or_path)).model(model_name_or_path)
    return fit(model, processor, forget, retain, **options)


def _gate(forget: Tensor, retain: Sequence[Tensor], ridge: float) -> tuple[Tensor, Tensor]:
    """Weight (H,) and bias () of the affine function nearest to 1 on `forget` (n, H) and to 0 on each of `retain`.

    Both sides count the same, and so do the parts of `retain`, whatever their numbers.
    """
    states = torch.cat([forget, *retain]).double()
    parts = [(forget, 0.5), *((part, 0.5 / len(retain)) for part in retain)]
    share = torch.cat([torch.full((len(part),), weight / len(part)) for part, weight in parts]).double()
    aim = (torch.arange(len(states)) < len(forget)).double()
    mean, mean_aim = share @ states, share @ aim
    centred = states - mean
    covariance = (centred * share[:, None]).T @ centred
    covariance += ridge * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
    weight = torch.linalg.solve(covariance, (centred * share[:, None]).T @ (aim - mean_aim))
    return weight.float(), (mean_aim - mean @ weight).float()


@torch.no_grad()
def _hidden_states(
    model: nn.Module,
    processor: Any,
    asked: Sequence[Question],
    layers: Iterable[int],
    batch_size: int,
    *,
    everywhere: bool,
) -> dict[int, Tensor]:
    """Every layer's output at the positions that predict the answers, (n, H) float32 on the CPU; {} without questions.

    With `everywhere` at all tokens, evenly thinned out where a batch has more than `_POSITIONS`.
    """
    if not asked:
        return {}
    device = next(model.parameters()).device
    decoder = decoder_layers(model)
    seen: dict[int, Tensor] = {}

    def note(layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            seen[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [decoder[layer].register_forward_hook(note(layer)) for layer in layers]
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    try:
        for start in range(0, len(asked), batch_size):
            part = asked[start : start + batch_size]
            batch = collate_answers(processor, part, range(len(part)), [True] * len(part)).to(device)
            families.base_model(model)(**batch.inputs, use_cache=False)
            wanted = batch.inputs["attention_mask"].bool() if everywhere else batch.predicts != -100
            positions = wanted.nonzero()
            positions = positions[:: -(-len(positions) // _POSITIONS)]
            for layer, parts in found.items():
                parts.append(seen[layer].to(device)[positions[:, 0], positions[:, 1]].float().cpu())
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def _drawn(questions: Sequence[tuple[Photo | None, str, str]], count: int, seed: Sequence[int]) -> list[Question]:
    """At most `count` of the questions, with their photos decoded."""
    chosen = draw(len(questions), 0, min(count, len(questions)), seed) if questions else []
    return [
        (None if photo is None else decode_image(photo.data, photo.source), question, answer)
        for photo, question, answer in (questions[i] for i in chosen)
    ]
