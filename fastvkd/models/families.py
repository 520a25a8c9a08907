"""Where each supported model family keeps its vision tower, projector, LLM and image token: one table, nothing else.

Module paths are relative to the *base* model (the one without lm_head); `base_model` finds it.
"""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from fastvkd.errors import ModelError

Trainable = Literal["vision+projector", "projector", "vision"]


@dataclass(frozen=True)
class Family:
    """The places of one family, as dotted paths. Where towers differ, the first path that exists is taken."""

    name: str
    model_type: str
    tower: str = "vision_tower"  # a pre-trained vision model
    blocks: tuple[str, ...] = (
        "encoder.layers",
        "vision_model.encoder.layers",
        "encoder.layer",
    )  # relative to the tower
    projector: tuple[str, ...] = ("multi_modal_projector",)  # modules and parameters between tower and LLM
    deepstack: str | None = None  # list of projectors, the k-th of which adds to the visual tokens after LLM layer k
    language_model: str = "language_model"  # decoder without lm_head: has .layers and .norm
    token_types: str | None = None  # name of the input that tells image tokens from text, where the model needs one
    fixed_resolution: bool = False  # every image becomes one (3, S, S) tensor and the same number of visual tokens
    causal: bool = True  # False: image tokens attend to each other both ways
    sees_suffix: bool = False  # True: image tokens also attend to the text behind them, so it cannot be cut
    normed_last_feature: bool = False  # vision_feature_layer -1 means: after the tower's post-norm


_ANYRES = ("multi_modal_projector", "image_newline")
_QWEN: dict[str, Any] = {
    "tower": "visual",
    "blocks": ("blocks",),
    "projector": ("visual.merger",),
    "token_types": "mm_token_type_ids",
}
_IDEFICS: dict[str, Any] = {"tower": "vision_model", "projector": ("connector",), "language_model": "text_model"}

FAMILIES: tuple[Family, ...] = (
    Family("LLaVA-1.5", "llava", fixed_resolution=True),
    Family("LLaVA-NeXT", "llava_next", projector=_ANYRES),
    Family("LLaVA-OneVision", "llava_onevision", projector=_ANYRES),
    Family("Qwen2-VL", "qwen2_vl", **_QWEN),
    Family("Qwen2.5-VL", "qwen2_5_vl", **_QWEN),
    Family("Qwen3-VL", "qwen3_vl", **_QWEN, deepstack="visual.deepstack_merger_list"),
    Family("InternVL", "internvl", normed_last_feature=True),
    Family("Idefics3", "idefics3", **_IDEFICS),
    Family("SmolVLM", "smolvlm", **_IDEFICS),
    Family("Gemma 3", "gemma3", token_types="token_type_ids", fixed_resolution=True, causal=False),
    Family(
        "PaliGemma", "paligemma", token_types="token_type_ids", fixed_resolution=True, causal=False, sees_suffix=True
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


def family_of_type(model_type: str, place: str = "") -> Family:
    """As `family_of`, by the `model_type` string of a config.json; `place`, where it stands, opens the message."""
    where = f"{place}: " if place else ""
    if model_type in _BY_TYPE:
        return _BY_TYPE[model_type]
    known = ", ".join(_BY_TYPE)
    if model_type in REFUSED:
        raise ModelError(
            f"{where}model_type {model_type!r} is not supported: {REFUSED[model_type]}; use one of {known}"
        )
    near = difflib.get_close_matches(model_type, _BY_TYPE, n=1)
    hint = f"did you mean {near[0]!r}? Supported" if near else "supported"
    raise ModelError(f"{where}model_type {model_type!r} is not a known vision-language family; {hint}: {known}")


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


def projector_modules(model: nn.Module, family: Family) -> list[nn.Module]:
    """All modules between tower and LLM, in the order in which they are declared."""
    parts = [_find(base_model(model), (path,)) for path in family.projector]
    return [module for part in parts if isinstance(part, nn.Module) for module in part.modules()]


def image_token_id(config: Any) -> int:
    """The id of the image placeholder token of a (top-level) config."""
    for key in ("image_token_id", "image_token_index"):
        value = getattr(config, key, None)
        if value is not None:
            return int(value)
    raise ModelError(f"config of a {family_of(config).name} model has no image_token_id: add it")


def tower_prefix_tokens(module: nn.Module) -> int:
    """How many tokens of a tower's sequence stand before the image patches: 1 with CLS, else 0."""
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


def visual_parameters(
    model: nn.Module, family: Family, trainable: Trainable, sites: Sequence[str] | None = None
) -> list[tuple[str, nn.Parameter]]:
    """The (live name, parameter) pairs of the visual part that a loss on features at `sites` reaches.

    `sites` defaults to the output of the whole LLM. Parameters that no gradient reaches are left out:

    - tower blocks above LLaVA's `vision_feature_layer` (-2 leaves out CLIP's last block);
    - the tower's post-norm where features are taken before it, and pooling heads;
    - for `vision:<k>` alone, the blocks above k and the projector;
    - for `llm:<k>`, Qwen3-VL's deepstack projectors after layer k.

    Raises:
        ModelError: `trainable` is none of its three values, or nothing in it is reached from `sites`.
    """
    if trainable not in get_args(Trainable):
        raise ModelError(f"trainable is {trainable!r}: allowed are {', '.join(get_args(Trainable))}")
    base = base_model(model)
    parsed = [parse_site(site) for site in sites] if sites else [("llm", llm_depth(base.config))]
    projected = any(kind != "vision" for kind, _ in parsed)
    projector = _projector_parameters(base, family, max((k for kind, k in parsed if kind == "llm"), default=0))
    wanted: set[int] = set()
    if trainable != "projector":
        deepest = max((k for kind, k in parsed if kind == "vision"), default=0)
        # Qwen keeps its projectors inside the tower's module: they count as projector only
        wanted |= _tower_parameters(model, family, deepest, projected) - _projector_parameters(base, family, None)
    if trainable != "vision" and projected:
        wanted |= projector
    found = [(name, p) for name, p in model.named_parameters() if id(p) in wanted]
    if not found:
        raise ModelError(
            f"trainable {trainable!r} has no weights that act on sites {list(sites or [])}: train the vision"
        )
    return found


def all_parameters(model: nn.Module, family: Family) -> list[tuple[str, nn.Parameter]]:
    """The (live name, parameter) pairs of everything that acts on the model's answers: LLM, head, and visual part."""
    visual = visual_parameters(model, family, "vision+projector")
    reached = {id(p) for _, p in visual}
    unreached = {id(p) for p in tower(model, family).parameters()} - reached
    return [(name, p) for name, p in model.named_parameters() if id(p) not in unreached]


def train_only(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Sets requires_grad on exactly these parameters and clears it on every other one of `model`."""
    wanted = {id(p) for p in parameters}
    for p in model.parameters():
        if p.is_floating_point():
            p.requires_grad_(id(p) in wanted)


@contextmanager
def training_only(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """`train_only` until the end; then every parameter requires a gradient if it did before."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    train_only(model, parameters)
    try:
        yield
    finally:
        for p, was in before:
            p.requires_grad_(was)


def parse_site(site: str) -> tuple[str, int]:
    """`vision:3` -> ("vision", 3), `llm:8` -> ("llm", 8), `projector` -> ("projector", 0). ModelError when misspelt."""
    if site == "projector":
        return "projector", 0
    kind, _, number = site.partition(":")
    if kind not in ("vision", "llm") or not number.isdecimal():
        raise ModelError(f"site {site!r} is not known: write vision:<k>, projector or llm:<k> with a number k >= 0")
    return kind, int(number)


def check_sites(sites: Iterable[str], config: Any) -> None:
    """Raises ModelError when a site is misspelt or deeper than the model that `config` describes."""
    depths = {"vision": ("tower blocks", tower_depth(config)), "llm": ("LLM layers", llm_depth(config))}
    for site in sites:
        kind, k = parse_site(site)
        if kind in depths and k > depths[kind][1]:
            what, depth = depths[kind]
            raise ModelError(
                f"site {site!r} is deeper than the model: this {family_of(config).name} has {depth} {what}; allowed: "
                f"{kind}:0 to {kind}:{depth}"
            )


def _tower_parameters(model: nn.Module, family: Family, deepest: int, projected: bool) -> set[int]:
    """Ids of the tower's parameters that act on the output of block `deepest`, or if `projected` on the projector."""
    vision, blocks = tower(model, family), tower_blocks(model, family)
    layer = getattr(base_model(model).config, "vision_feature_layer", None)
    normed = projected
    if projected and layer is not None:
        # hidden_states has len(blocks) + 1 entries: entry k is the output of block k, before the post-norm
        layers = [layer] if isinstance(layer, int) else list(layer)
        deepest = max(deepest, *(k if k >= 0 else len(blocks) + 1 + k for k in layers))
        normed = family.normed_last_feature and layer == -1
    elif projected:
        deepest = len(blocks)
    unreached: list[nn.Module] = list(blocks[deepest:])
    # pooling heads read the sequence and feed nothing here
    unused = ("head", "vision_model.head") + (
        () if normed else ("post_layernorm", "vision_model.post_layernorm", "layernorm")
    )
    unreached += [part for path in unused if (part := _find(vision, (path,))) is not None]
    skipped = {id(p) for module in unreached for p in module.parameters()}
    # InternVL's mask token serves masked pre-training only
    return {id(p) for name, p in vision.named_parameters() if id(p) not in skipped and not name.endswith("mask_token")}


def _projector_parameters(base: nn.Module, family: Family, llm_layers: int | None) -> set[int]:
    """Ids of the parameters between tower and LLM; of the deepstack projectors the first `llm_layers` (None: all)."""
    parts: list[Any] = [_find(base, (path,)) for path in family.projector]
    if family.deepstack is not None:
        parts += list(_get(base, family.deepstack).children())[:llm_layers]
    return {id(p) for part in parts for p in ([part] if isinstance(part, nn.Parameter) else part.parameters())}


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
