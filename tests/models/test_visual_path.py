"""The truncated, suffix-free visual path gives what the full model gives, and gradients reach what they should."""

from functools import partial

import pytest
import tiny
import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from fastvkd.errors import ModelError
from fastvkd.models.families import family_of, train_only, visual_parameters
from fastvkd.models.loading import load_model
from fastvkd.models.prompts import adds_special_tokens, chat_prompt
from fastvkd.models.visual_path import VisualPath, batch_from_pixels, collate_images, encode_pixels

L = 2  # decoder layers of the truncated model; the full one has tiny.DEPTH
SITES = ["vision:0", "vision:1", f"vision:{tiny.TOWER_DEPTH}", "projector", "llm:0", "llm:1", f"llm:{L}"]
SIZES = [(24, 20), (40, 20), (17, 33)]  # unequal images: crops, patch grids and lengths differ where a family allows it


def batch_of(case, sizes=SIZES):
    return collate_images(case.processor, case.config, tiny.photos(*sizes), question=tiny.QUESTION)


def truncated(case):
    return load_model(case.folder, llm_layers=L)


def full_text_features(case) -> dict[str, torch.Tensor]:
    """What hooks see in the untouched full model on the full text: question, answer, padding and masks."""
    prompt = chat_prompt(case.processor, tiny.QUESTION, image=True)
    images = [[image] for image in tiny.photos(*SIZES)]
    texts = [prompt] * len(images)
    options = {"padding": True, "return_tensors": "pt"}
    options["add_special_tokens"] = adds_special_tokens(case.processor, prompt)
    if case.name == "paligemma":  # its prompt sees both ways, its answer is a suffix of its own
        encoded = case.processor(text=texts, images=images, suffix=[tiny.ANSWER] * len(images), **options)
    else:
        encoded = case.processor(text=[text + tiny.ANSWER for text in texts], images=images, **options)
    base = case.model.model
    blocks = base.get_submodule(case.places.blocks)
    layers = base.get_submodule(case.places.llm).layers
    seen: dict[str, torch.Tensor] = {}

    def keep(site, module, args, kwargs=None, output=None):
        value = output if output is not None else (args[0] if args else kwargs["hidden_states"])
        seen[site] = value[0] if isinstance(value, tuple) else value

    handles = [blocks[0].register_forward_pre_hook(partial(keep, "vision:0"), with_kwargs=True)]
    for k in (1, tiny.TOWER_DEPTH):
        handles.append(blocks[k - 1].register_forward_hook(partial(keep, f"vision:{k}"), with_kwargs=True))
    for k in range(L + 1):
        handles.append(layers[k].register_forward_pre_hook(partial(keep, f"llm:{k}"), with_kwargs=True))
    with torch.no_grad():
        case.model(**encoded)
    for handle in handles:
        handle.remove()
    is_image = encoded["input_ids"] == 4
    for site in list(seen):
        if site.startswith("llm"):
            seen[site] = seen[site][is_image]
        elif case.name in ("llava", "llava_next", "internvl"):  # towers with a CLS token
            seen[site] = seen[site][:, 1:].flatten(0, 1)
        elif seen[site].dim() == 3:
            seen[site] = seen[site].flatten(0, 1)
    return seen | {"projector": seen["llm:0"]}


def assert_same(found: torch.Tensor, wanted: torch.Tensor, model: nn.Module, site: str) -> None:
    """Up to rounding, which is a CPU's own: inner products of n terms may differ by n eps, and features are as large as
    a family makes them."""
    assert found.shape == wanted.shape, site
    terms = max(module.in_features for module in model.modules() if isinstance(module, nn.Linear))
    bound = terms * torch.finfo(wanted.dtype).eps * wanted.abs().max()
    assert (found - wanted).abs().max() <= bound, site


def test_features_equal_those_of_the_full_model_on_the_full_text(case):
    wanted = full_text_features(case)
    for model in (truncated(case), case.model):
        found = VisualPath(model, SITES)(batch_of(case))
        for site in SITES:
            rows = found[site].gathered().detach()
            assert rows.std() > 0.05, f"{site} is too flat to prove anything"
            assert_same(rows, wanted[site], case.model, site)
    assert (wanted["llm:1"] - wanted["llm:2"]).abs().max() > 1e-2


def test_a_question_matters_only_where_images_see_the_text_behind_them(case):
    images = tiny.photos((20, 20))
    path = VisualPath(case.model, ["llm:2"])
    first, second = (
        path(collate_images(case.processor, case.config, images, question=q))["llm:2"].gathered()
        for q in ("who is this", "the photo : A")
    )
    differ = first.shape != second.shape or bool((first - second).abs().max() > 1e-4)
    assert differ == (case.name == "paligemma")


def test_every_row_belongs_to_its_image(case):
    """An image alone has the features that it has in a batch, at every site: rows, padding and masks are right."""
    path = VisualPath(truncated(case), SITES)
    together = path(batch_of(case))
    for i, image in enumerate(tiny.photos(*SIZES)):
        alone = path(collate_images(case.processor, case.config, [image], question=tiny.QUESTION))
        for site in SITES:
            mine = together[site].gathered()[together[site].image_of_row == i]
            assert_same(mine, alone[site].gathered(), case.model, site)


def test_the_tail_of_a_batch_has_its_features(case):
    path, batch = VisualPath(truncated(case), SITES), batch_of(case)
    together, tail = path(batch), path(batch.tail(1))
    for site in SITES:
        mine = together[site].gathered()[together[site].image_of_row >= 1]
        assert torch.equal(tail[site].image_of_row, together[site].image_of_row[together[site].image_of_row >= 1] - 1)
        assert_same(mine, tail[site].gathered(), case.model, site)


@pytest.mark.parametrize("sites", [[f"llm:{L}"], ["projector"], ["vision:1"], ["vision:3", "llm:1"]])
def test_gradients_reach_exactly_the_visual_parameters(case, sites):
    model, batch = truncated(case), batch_of(case)
    family = family_of(model)
    language = model.model.get_submodule(case.places.llm)
    llm_ids = {id(p) for p in language.parameters()}

    def reached() -> set[str]:
        model.zero_grad(set_to_none=True)
        generator = torch.Generator().manual_seed(1)
        rows = [features.gathered() for features in VisualPath(model, sites)(batch).values()]
        sum((r * torch.randn(r.shape, generator=generator)).sum() for r in rows).backward()
        return {name for name, p in model.named_parameters() if p.grad is not None and id(p) not in llm_ids}

    # with everything trainable, what gets a gradient is what the list promises: no more and no less
    model.requires_grad_(True)
    listed = visual_parameters(model, family, "vision+projector", sites)
    assert reached() == {name for name, _ in listed}
    parts = ["vision"] if sites == ["vision:1"] else ["vision", "projector"]
    for trainable in parts:
        chosen = visual_parameters(model, family, trainable, sites)
        train_only(model, [p for _, p in chosen])
        assert reached() == {name for name, _ in chosen}
        assert all(p.grad is None for p in language.parameters())
        assert any(p.grad.abs().max() > 0 for _, p in chosen)
    names = {t: {n for n, _ in visual_parameters(model, family, t, sites)} for t in parts}
    assert set.union(*names.values()) == {name for name, _ in listed}
    if len(parts) == 2:
        assert not names["vision"] & names["projector"]
        projector = model.model.get_submodule(case.places.projector)
        ids = {id(p) for p in projector.parameters()}
        assert {n for n, p in model.named_parameters() if id(p) in ids} <= names["projector"]


def test_training_the_projector_for_a_vision_site_is_refused(case):
    with pytest.raises(ModelError, match="no weights"):
        visual_parameters(case.model, family_of(case.model), "projector", ["vision:1"])


@pytest.mark.parametrize("depth", [-1, -2, [1, 2]])
def test_llavas_unused_blocks_are_not_parameters(depth):
    config, _ = tiny.llava(feature_layer=depth)
    model = AutoModelForImageTextToText.from_config(config)
    names = " ".join(name for name, _ in visual_parameters(model, family_of(model), "vision"))
    assert ("layers.2." in names) == (depth == -1)
    assert "layers.1." in names and "post_layernorm" not in names


def count_calls(modules: dict[str, nn.Module]) -> tuple[dict[str, int], list]:
    calls = dict.fromkeys(modules, 0)

    def count(name, *_):
        calls[name] += 1

    return calls, [module.register_forward_hook(partial(count, name)) for name, module in modules.items()]


def test_nothing_runs_behind_the_deepest_site(case):
    base = case.model.model
    blocks, llm = base.get_submodule(case.places.blocks), base.get_submodule(case.places.llm)
    watched = {"block 2": blocks[1], "layer 0": llm.layers[0], "layer 1": llm.layers[1], "head": case.model.lm_head}
    runs = {
        ("vision:1",): [],
        ("vision:0", "projector"): ["block 2"],
        ("llm:0",): ["block 2"],
        ("llm:1", "vision:1"): ["block 2", "layer 0"],
        ("projector", f"llm:{tiny.DEPTH}"): ["block 2", "layer 0", "layer 1"],
    }
    for sites, expected in runs.items():
        calls, handles = count_calls(watched)
        VisualPath(case.model, sites)(batch_of(case))
        for handle in handles:
            handle.remove()
        assert [name for name, n in calls.items() if n] == expected, sites


def test_the_model_is_left_as_it_was(case):
    def state():
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in case.model.modules()]
        return hooks, [(n, p.requires_grad) for n, p in case.model.named_parameters()], repr(case.model.config)

    path, batch = VisualPath(case.model, SITES), batch_of(case)
    path(batch)  # transformers registers hooks of its own on the first pass
    before, deltas = state(), getattr(case.model.model, "rope_deltas", None)
    path(batch)
    broken = collate_images(case.processor, case.config, tiny.photos((20, 20)), question=tiny.QUESTION)
    broken.inputs["pixel_values"] = broken.inputs["pixel_values"][..., :3]
    with pytest.raises((RuntimeError, ValueError)):
        path(broken)
    assert state() == before
    assert getattr(case.model.model, "rope_deltas", None) is deltas


def test_no_mask_is_built_for_causal_families(case):
    if case.name in ("gemma3", "paligemma"):
        assert not family_of(case.config).causal
        return
    masks = []
    layer = case.model.model.get_submodule(case.places.llm).layers[0]
    handle = layer.register_forward_pre_hook(lambda m, a, kw: masks.append(kw["attention_mask"]), with_kwargs=True)
    VisualPath(case.model, ["llm:1"])(batch_of(case))
    handle.remove()
    assert masks == [None]


def test_gemmas_image_tokens_attend_to_each_other_both_ways():
    """Without its token types Gemma 3 would be causal, and every feature behind the first layer another one."""
    config, processor = tiny.gemma3()
    path = VisualPath(tiny.randomised(config), ["llm:1"])
    batch = collate_images(processor, config, tiny.photos((20, 20)))
    right = path(batch)["llm:1"].gathered()
    del batch.inputs["token_type_ids"]
    assert (path(batch)["llm:1"].gathered() - right).abs().max() > 1e-3


def test_gradient_checkpointing_changes_nothing(case):
    model, batch = truncated(case), batch_of(case)
    chosen = visual_parameters(model, family_of(model), "vision+projector", SITES)
    train_only(model, [p for _, p in chosen])
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.train()
        model.zero_grad(set_to_none=True)
        sum(f.gathered().square().mean() for f in VisualPath(model, SITES)(batch).values()).backward()
        gradients.append([p.grad.clone() for _, p in chosen])
    for (name, _), plain, checkpointed in zip(chosen, *gradients, strict=True):
        assert torch.allclose(plain, checkpointed, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("site", ["llm:5", "vision:4", "llm", "llm:-1", "llm:x", "vison:1", "projector:1", ""])
def test_a_site_that_does_not_exist_is_an_error_of_one_line(llava, site):
    with pytest.raises(ModelError, match="site") as error:
        VisualPath(llava.model, [site])
    assert "\n" not in str(error.value) and (site in str(error.value))


def test_a_truncated_model_has_no_deeper_sites(llava):
    VisualPath(load_model(llava.folder, llm_layers=1), ["llm:1"])
    with pytest.raises(ModelError, match="deeper"):
        VisualPath(load_model(llava.folder, llm_layers=1), ["llm:2"])
    with pytest.raises(ModelError, match="empty"):
        VisualPath(llava.model, [])


def test_cached_pixels_make_the_same_batch(case):
    images = tiny.photos((24, 20), (40, 20))
    whole = collate_images(case.processor, case.config, images)
    if family_of(case.config).fixed_resolution:
        pixels = torch.cat([encode_pixels(case.processor, [image]) for image in images])
        batch = batch_from_pixels(case.processor, case.config, pixels)
        assert batch.n_images == whole.n_images == 2
        assert batch.inputs.keys() == whole.inputs.keys()
        assert all(torch.equal(batch.inputs[key], whole.inputs[key]) for key in whole.inputs)
        is_image = batch.inputs["input_ids"] == 4
        assert torch.equal(batch.token_rows, is_image.flatten().nonzero().squeeze(1))
        assert torch.equal(batch.token_images, is_image.nonzero()[:, 0])
    else:
        with pytest.raises(ModelError, match="collate_images"):
            batch_from_pixels(case.processor, case.config, whole.inputs["pixel_values"])


def test_a_processor_of_another_model_is_refused(llava):
    config, _ = tiny.llava()
    config.image_token_id = 90
    with pytest.raises(ModelError, match="image token"):
        collate_images(llava.processor, config, tiny.photos((20, 20)))
