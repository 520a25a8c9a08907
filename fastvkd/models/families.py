"""Where each supported model family keeps its vision tower, projector, LLM and image token: one table, nothing else.

Module paths are relative to the *base* model (the one without lm_head); `base_model` finds it.
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from fastvkd.errors import ModelError

Trainable = Literal["vision+projector", "projector", "vision"]


@dataclass(frozen=True)
class Family:
    """The places of one family. Dotted paths; where releases differ, the first path that exists is taken."""

    name: str
    model_type: str
    tower: str  # vision tower (a pre-trained vision model)
    blocks: tuple[str, ...]  # candidate paths of the tower's transformer blocks, relative to the tower
    projector: tuple[str, ...]  # modules or parameters between tower and LLM
    language_model: str  # decoder without lm_head: has .layers and .norm
    image_token_keys: tuple[str, ...]  # config keys that hold the id of the image placeholder token
    causal: bool = True  # False: image tokens attend both ways, so text after the image changes their features
    fixed_resolution: bool = False  # every image becomes one (3, S, S) tensor and the same number of visual tokens


_VIT_BLOCKS = ("encoder.layers", "vision_model.encoder.layers", "encoder.layer", "transformer.layers")
_IMAGE_TOKEN = ("image_token_id", "image_token_index")

FAMILIES: tuple[Family, ...] = (
    Family(
        name="LLaVA-1.5",
        model_type="llava",
        tower="vision_tower",
        blocks=_VIT_BLOCKS,
        projector=("multi_modal_projector",),
        language_model="language_model",
        image_token_keys=_IMAGE_TOKEN,
        fixed_resolution=True,
    ),
)
_BY_TYPE = {family.model_type: family for family in FAMILIES}

REFUSED: dict[str, str] = {
    "mllama": "its images enter through cross-attention, so there are no visual tokens in the sequence to distil",
}


def family_of(model_or_config: Any) -> Family:
    """The `Family` of a transformers model or config.

    Raises:
        ModelError: the model type is unknown (names the nearest one) or cannot be supported (says why).
    """
    config = getattr(model_or_config, "config", model_or_config)
    model_type = getattr(config, "model_type", None) or type(config).__name__
    return family_of_type(model_type)


def family_of_type(model_type: str) -> Family:
    """As `family_of`, by the `model_type` string of a config.json."""
    if model_type in _BY_TYPE:
        return _BY_TYPE[model_type]
    known = ", ".join(_BY_TYPE)
    if model_type in REFUSED:
        raise ModelError(f"model_type {model_type!r} is not supported: {REFUSED[model_type]}; use one of {known}")
    near = difflib.get_close_matches(model_type, _BY_TYPE, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ModelError(f"model_type {model_type!r} is not a known vision-language family{hint} Supported: {known}")


def base_model(model: nn.Module) -> nn.Module:
    """The model without lm_head: `model.model`, or `model` itself when it is already the base."""
    family = family_of(model)
    inner = getattr(model, "model", None)
    return inner if isinstance(inner, nn.Module) and _find(inner, (family.language_model,)) is not None else model


def tower(model: nn.Module, family: Family) -> nn.Module:
    """The vision tower."""
    return _get(base_model(model), family.tower)


def tower_blocks(model: nn.Module, family: Family) -> nn.ModuleList:
    """The tower's transformer blocks in the order in which they run."""
    module = tower(model, family)
    blocks = _find(module, family.blocks)
    if not isinstance(blocks, nn.ModuleList):
        raise ModelError(
            f"vision tower {type(module).__name__} of a {family.name} model is not supported: none of "
            f"{', '.join(family.blocks)} exists in it; use a CLIP or SigLIP tower"
        )
    return blocks


def language_model(model: nn.Module, family: Family) -> nn.Module:
    """The decoder stack without lm_head; has `.layers` and `.norm`."""
    return _get(base_model(model), family.language_model)


def image_token_id(config: Any) -> int:
    """The id of the image placeholder token of a (top-level) config."""
    family = family_of(config)
    for key in family.image_token_keys:
        value = getattr(config, key, None)
        if value is not None:
            return int(value)
    raise ModelError(f"config of a {family.name} model has none of {', '.join(family.image_token_keys)}: add one")


def tower_prefix_tokens(module: nn.Module) -> int:
    """How many tokens that are no image patch (CLS) stand first in the sequence of a tower: 0 or 1."""
    return int(
        any(name.rsplit(".", 1)[-1] in ("class_embedding", "cls_token") for name, _ in module.named_parameters())
    )


def tower_depth(config: Any) -> int:
    """Number of transformer blocks of the tower described by a (top-level) config."""
    vision = config.vision_config
    return int(getattr(vision, "depth", None) or vision.num_hidden_layers)


def llm_depth(config: Any) -> int:
    """Number of decoder layers of the LLM described by a (top-level) config."""
    return int(config.text_config.num_hidden_layers)


def visual_parameters(model: nn.Module, family: Family, trainable: Trainable) -> list[tuple[str, nn.Parameter]]:
    """The (live name, parameter) pairs of the visual part that a feature loss at `projector` or `llm:<k>` reaches.

    Parameters that take no part in those features are left out, because no gradient ever arrives there: blocks above
    LLaVA's `vision_feature_layer` (-2 leaves out CLIP's last block), the tower's post-norm where features are taken
    before it, and pooling heads. A site `vision:<k>` reaches fewer of them still.
    """
    if trainable not in ("vision+projector", "projector", "vision"):
        raise ModelError(f"trainable is {trainable!r}: allowed are 'vision+projector', 'projector', 'vision'")
    base = base_model(model)
    wanted: set[int] = set()
    if trainable != "projector":
        unreached = {id(p) for module in _unreached(model, family) for p in module.parameters()}
        wanted |= {id(p) for p in tower(model, family).parameters()} - unreached
    for path in family.projector:
        part = _find(base, (path,))
        ids = {id(part)} if isinstance(part, nn.Parameter) else {id(p) for p in part.parameters()} if part else set()
        # a projector may live inside the tower module (Qwen's merger): then it belongs to the projector only
        wanted = wanted | ids if trainable != "vision" else wanted - ids
    return [(name, p) for name, p in model.named_parameters() if id(p) in wanted]


def train_only(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Sets requires_grad on exactly these parameters and clears it on every other one of `model`."""
    wanted = {id(p) for p in parameters}
    for p in model.parameters():
        if p.is_floating_point():
            p.requires_grad_(id(p) in wanted)


def _unreached(model: nn.Module, family: Family) -> Sequence[nn.Module]:
    """Modules of the tower that do not take part in what enters the projector."""
    vision, blocks = tower(model, family), tower_blocks(model, family)
    config: Any = base_model(model).config
    found: list[nn.Module] = [part for path in ("head", "vision_model.head") if (part := _find(vision, (path,)))]
    layer = getattr(config, "vision_feature_layer", None)
    if layer is None:
        return found
    # hidden_states has len(blocks) + 1 entries, entry k is the output of block k, and none has passed the post-norm
    layers = [layer] if isinstance(layer, int) else list(layer)
    deepest = max(k if k >= 0 else len(blocks) + 1 + k for k in layers)
    found += list(blocks[deepest:])
    found += [part for path in ("post_layernorm", "vision_model.post_layernorm") if (part := _find(vision, (path,)))]
    return found


def _find(module: nn.Module, paths: Sequence[str]) -> Any:
    for path in paths:
        here: Any = module
        for part in path.split("."):
            here = getattr(here, part, None)
            if here is None:
                break
        else:
            if isinstance(here, nn.Module | torch.Tensor):
                return here
    return None


def _get(module: nn.Module, path: str) -> nn.Module:
    found = _find(module, (path,))
    if found is None:
        raise ModelError(
            f"{type(module).__name__} has no module {path!r}: this release of transformers is not supported"
        )
    return found
