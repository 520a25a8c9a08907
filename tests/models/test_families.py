"""Families are found or refused by name, and prompts begin as the visual prefix does."""

import pytest
import tiny
from transformers import MllamaConfig

from fastvkd.errors import ModelError
from fastvkd.models.families import FAMILIES, family_of, family_of_type
from fastvkd.models.loading import llm_layers_needed
from fastvkd.models.prompts import chat_prompt, visual_prefix


def test_every_family_of_the_table_has_a_tiny_model():
    assert {family.model_type for family in FAMILIES} == set(tiny.BUILDERS)
    for name, build in tiny.BUILDERS.items():
        assert family_of(build()[0]).model_type == name


def test_only_gemma_looks_both_ways():
    assert {f.model_type for f in FAMILIES if not f.causal} == {"gemma3", "paligemma"}
    assert {f.model_type for f in FAMILIES if f.sees_suffix} == {"paligemma"}


@pytest.mark.parametrize(
    ("found", "meant"),
    [("llavanext", "llava_next"), ("qwen2vl", "qwen2_vl"), ("internvl_chat", "internvl"), ("qwen3_vl_moe", "qwen3_vl")],
)
def test_an_unknown_family_suggests_the_nearest(found, meant):
    with pytest.raises(ModelError, match=f"did you mean '{meant}'") as error:
        family_of_type(found)
    assert "\n" not in str(error.value)


def test_a_family_like_none_lists_them_all():
    with pytest.raises(ModelError) as error:
        family_of_type("bert")
    assert all(family.model_type in str(error.value) for family in FAMILIES)


def test_mllama_is_refused_with_the_reason():
    with pytest.raises(ModelError, match="cross-attention"):
        family_of(MllamaConfig())


def test_the_layers_needed_are_those_below_the_deepest_site():
    config, _ = tiny.llava()
    assert llm_layers_needed(["vision:3", "projector"], config) == 0
    assert llm_layers_needed(["vision:1", "llm:3", "llm:1"], config) == 3
    assert llm_layers_needed([], config) == 0
    for site in ("llm:5", "vision:4"):
        with pytest.raises(ModelError, match="deeper"):
            llm_layers_needed([site], config)


@pytest.mark.parametrize("name", list(tiny.BUILDERS))
def test_a_prompt_begins_with_the_visual_prefix(name):
    _, processor = tiny.BUILDERS[name]()
    prefix, prompt = visual_prefix(processor), chat_prompt(processor, tiny.QUESTION, image=True)
    assert prompt.startswith(prefix) and tiny.QUESTION in prompt[len(prefix) :]
    text = chat_prompt(processor, tiny.QUESTION, image=False)
    assert tiny.QUESTION in text and "<image>" not in text and "image_pad" not in text


def test_without_a_template_llavas_own_prompt_is_used():
    _, processor = tiny.llava()
    assert chat_prompt(processor, "who?", image=True) == "USER: <image>\nwho? ASSISTANT:"
    assert chat_prompt(processor, "who?", image=False) == "USER: who? ASSISTANT:"
    assert visual_prefix(processor) == "USER: <image>"


def test_a_template_that_writes_no_image_is_an_error():
    _, processor = tiny.llava()
    processor.chat_template = "{{ messages[0]['role'] }}"
    with pytest.raises(ModelError, match="template"):
        visual_prefix(processor)
