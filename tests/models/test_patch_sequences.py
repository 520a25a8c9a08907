"""Qwen-VL's tower attends to all pieces of one length at once, and waits for nothing: same outputs, few launches."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, vision_utils
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from fastvkd.models.families import family_of, train_only, visual_parameters
from fastvkd.models.loading import load_model
from fastvkd.models.patch_sequences import batch_pieces, pieces_of, rope_positions
from fastvkd.models.visual_path import VisualPath, collate_images

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
SIZES = [(24, 20), (40, 20), (17, 33), (24, 20), (40, 20)]  # windows of several sizes, images that are alike
SITES = ["vision:1", f"vision:{tiny.TOWER_DEPTH}", "projector", "llm:2"]


@pytest.fixture(params=QWEN, scope="module")
def qwen(request):
    """A family twice with the same weights: as transformers has it, and with its pieces as batches."""
    config, processor = tiny.BUILDERS[request.param]()
    plain, batched = tiny.randomised(config), tiny.randomised(config)
    batch_pieces(batched)
    batch = collate_images(processor, config, tiny.photos(*SIZES))
    return SimpleNamespace(
        name=request.param, config=config, processor=processor, plain=plain, batched=batched, batch=batch
    )


@contextmanager
def attention_calls() -> Iterator[list[int]]:
    """A list of the batch size of every SDPA call."""
    calls: list[int] = []
    original = F.scaled_dot_product_attention

    def counted(query, *args, **kwargs):
        calls.append(query.shape[0])
        return original(query, *args, **kwargs)

    F.scaled_dot_product_attention = counted
    try:
        yield calls
    finally:
        F.scaled_dot_product_attention = original


def test_pieces_of_one_length_are_one_group_and_every_patch_keeps_its_piece() -> None:
    lengths = [4, 2, 4, 4, 1, 2]
    pieces = pieces_of(lengths)
    assert pieces.groups == ((3, 4), (2, 2), (1, 1))
    piece_of = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    assert pieces.order is not None and pieces.back is not None
    assert piece_of[pieces.order].tolist() == [0] * 4 + [2] * 4 + [3] * 4 + [1] * 2 + [5] * 2 + [4]
    assert torch.equal(pieces.order[pieces.back], torch.arange(sum(lengths)))
    assert pieces_of([3, 3, 2]).order is None  # together already: nothing need be moved


def features_and_gradients(model, batch) -> dict[str, torch.Tensor]:
    chosen = visual_parameters(model, family_of(model), "vision+projector", SITES)
    train_only(model, [p for _, p in chosen])
    found = {site: features.gathered() for site, features in VisualPath(model, SITES)(batch).items()}
    generator = torch.Generator().manual_seed(1)
    model.zero_grad(set_to_none=True)
    sum((f * torch.randn(f.shape, generator=generator)).mean() for f in found.values()).backward()
    return {site: f.detach() for site, f in found.items()} | {name: p.grad for name, p in chosen}


def test_features_and_gradients_are_those_of_the_original(qwen) -> None:
    wanted, found = (features_and_gradients(model, qwen.batch) for model in (qwen.plain, qwen.batched))
    assert wanted.keys() == found.keys() and len(wanted) > len(SITES)
    for name, value in wanted.items():
        assert value.abs().max() > 1e-4, name
        assert (found[name] - value).abs().max() <= 1e-5 * max(1, value.abs().max()), name


def test_attention_is_called_once_for_each_length(qwen) -> None:
    with torch.no_grad(), attention_calls() as before:
        VisualPath(qwen.plain, ["projector"])(qwen.batch)
    with torch.no_grad(), attention_calls() as after:
        VisualPath(qwen.batched, ["projector"])(qwen.batch)
    distinct = len(set(SIZES))
    windowed = 2 if qwen.name == "qwen2_5_vl" else 0  # of three layers
    whole = tiny.TOWER_DEPTH - windowed
    assert len(before) >= len(SIZES) * tiny.TOWER_DEPTH and sum(before) == len(before)
    assert sum(after) == sum(before)
    assert len(after) <= whole * distinct + windowed * 4  # inner windows, those of two borders, a corner
    assert len(after) <= 0.6 * len(before)


@pytest.mark.parametrize(
    ("side", "depth", "before", "after"),
    [(448, 32, 28 * 64 + 4 * 4, 28 + 4), (1036, 8, 7 * 400 + 4, 7 * 3 + 1)],
)
def test_qwen2_5_vl_of_real_size_launches_little(side: int, depth: int, before: int, after: int) -> None:
    """Four photos through the tower of the 3B and 7B models, or its first layers, on the meta device."""
    config = Qwen2_5_VLVisionConfig(
        depth=depth, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584, window_size=112
    )
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        tower = Qwen2_5_VisionTransformerPretrainedModel(config).to(torch.bfloat16)
    assert real_size_calls(tower, side // 14) == (before, after)


@pytest.mark.parametrize(
    ("tower_class", "config"),
    [
        (Qwen2VisionTransformerPretrainedModel, Qwen2VLVisionConfig(depth=32)),
        (Qwen3VLVisionModel, Qwen3VLVisionConfig(depth=27)),
    ],
)
def test_towers_of_whole_images_launch_once_a_layer(tower_class, config) -> None:
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        tower = tower_class(config)
    assert real_size_calls(tower, 32) == (4 * config.depth, config.depth)


def real_size_calls(tower, side: int) -> tuple[int, int]:
    """SDPA calls for four photos of `side` patches squared: of transformers, and with pieces as batches."""
    vision = tower.config
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.empty(4 * side * side, values, device="meta", dtype=tower.patch_embed.proj.weight.dtype)
    grid = torch.tensor([[1, side, side]] * 4)
    # nothing can be read from the meta device, so transformers gets what it would compute there
    known = {"position_ids": vision_utils.get_vision_position_ids(grid, 2).to("meta")}
    known["cu_seqlens"] = vision_utils.get_vision_cu_seqlens(grid)
    if hasattr(tower, "window_size"):
        index, known["cu_window_seqlens"] = vision_utils.get_vision_window_index(grid, 2, 112, 14)
        known["window_index"] = index.to("meta")
    if hasattr(tower, "pos_embed"):
        taps = vision_utils.get_vision_interpolation_indices_and_weights(grid, 48)
        known["interp_indices"], known["interp_weights"] = (tap.to("meta") for tap in taps)
    with torch.no_grad(), attention_calls() as before:
        tower(pixels, grid_thw=grid, **known)
    batch_pieces(as_model(tower))
    with torch.no_grad(), attention_calls() as after:
        tower(pixels, grid_thw=grid)
    return len(before), len(after)


def as_model(tower) -> nn.Module:
    """What `batch_pieces` looks for, around a tower."""
    model = nn.Module()
    model.config = SimpleNamespace(model_type=tower.config.model_type.removesuffix("_vision"))
    model.visual, model.language_model = tower, nn.Module()
    return model


def test_nothing_is_read_back_from_the_device(qwen) -> None:
    """The meta device has no values that could be read."""
    away = copy.deepcopy(qwen.batched).to("meta")
    features = VisualPath(away, ["vision:2", "projector"])(qwen.batch.to("meta"))
    assert {f.hidden.device.type for f in features.values()} == {"meta"}
    if qwen.name == "qwen3_vl":  # its decoder looks for the visual tokens again, to add its deepstack features
        with pytest.raises((RuntimeError, NotImplementedError), match=r"meta|nonzero"):
            VisualPath(away, ["llm:2"])(qwen.batch.to("meta"))
    else:
        VisualPath(away, ["projector", "llm:2"])(qwen.batch.to("meta"))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        VisualPath(copy.deepcopy(qwen.plain).to("meta"), ["projector"])(qwen.batch.to("meta"))


@pytest.mark.parametrize("name", QWEN)
def test_positions_are_those_of_the_model(name: str) -> None:
    config, _ = tiny.BUILDERS[name]()
    model = AutoModelForImageTextToText.from_config(config)
    grids = [(1, 4, 6), (1, 2, 2), (1, 8, 2)]
    tokens = [height * width // 4 for _, height, width in grids]
    rows = [[0] * 3 + [1] * tokens[0] + [0] * 2 + [1] * tokens[1] + [0], [0] + [1] * tokens[2]]
    length = max(map(len, rows))
    types = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    wanted, _ = model.model.get_rope_index(types, mm_token_type_ids=types, image_grid_thw=torch.tensor(grids))
    assert torch.equal(rope_positions(types, grids, 2), wanted)


def test_a_loaded_model_has_it_and_its_copy_too(qwen, tmp_path) -> None:
    """It stands on the modules of the model alone: another model of the class is as transformers made it."""
    qwen.plain.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, llm_layers=2)
    fewer = []
    for model in (loaded, copy.deepcopy(loaded), qwen.plain):
        with torch.no_grad(), attention_calls() as calls:
            VisualPath(model, ["projector"])(qwen.batch)
        fewer.append(len(calls))
    assert fewer[0] == fewer[1] < fewer[2]
    assert all("forward" not in vars(module) for module in qwen.plain.modules())
    assert loaded.state_dict().keys() <= qwen.plain.state_dict().keys()
