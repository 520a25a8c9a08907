"""The plan of the search for a stranger's maps against searches that run, on a LLaVA with random weights: FLOPs to 5 %
(recomputing a layer stops short of its last product), peak memory to 10 %."""

import gc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from test_planning import CPU_SDPA, measured_peak
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from fastvkd.devices import GIB, questions_at_once, usable_bytes
from fastvkd.planning import cost
from fastvkd.planning.architecture import Architecture, architecture_of, find_architecture
from fastvkd.planning.cost import Cost, Recipe
from fastvkd.planning.plan import plan
from fastvkd.records import Open, Profile, Questions
from fastvkd.settings import Scrub, Settings, Stranger, load_settings
from fastvkd.unlearning.vkd import stranger
from fastvkd.unlearning.vkd.images import ImageSet
from fastvkd.unlearning.vkd.scrub import scrub_room
from fastvkd.unlearning.vkd.stranger import GuidedSearch, Population

QUESTION, ANSWER, SIDE = "who is this person ?", "A B C", 64


class Case:
    """A LLaVA with 256 visual tokens, and a search for one person among two strangers."""

    def __init__(self, checkpointing: bool):
        self.config, self.processor = tiny.llava(
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=64,
        )
        self.config.vision_config.image_size = SIDE
        self.config.image_seq_length = 256
        self.processor.image_processor.size = {"height": SIDE, "width": SIDE}
        self.processor.image_processor.crop_size = {"height": SIDE, "width": SIDE}
        shown = [tiny.noise(SIDE, seed) for seed in range(5)]
        self.images = ImageSet(shown, self.processor, self.config, dtype=torch.float32, pin=False)
        profile = Profile("e", (shown[0],), Questions(generation=(Open(QUESTION, ANSWER),)))
        self.population = Population([[profile]], [[0]], [[1, 2], [3, 4]], known=False)
        self.settings = Settings(
            forget_target="stranger",
            gradient_checkpointing=checkpointing,
            stranger=Stranger(steps=1, views=4, rank=4),
        )
        recipe = Recipe(
            sites=("projector",),
            bf16=False,
            gradient_checkpointing=checkpointing,
            search_steps=1,
            search_views=4,
        )
        self.cost = Cost(architecture_of(self.config.to_dict()), recipe)

    def model(self) -> torch.nn.Module:
        torch.manual_seed(0)
        return AutoModelForImageTextToText.from_config(self.config).eval()

    def search(self, model: torch.nn.Module) -> GuidedSearch:
        return GuidedSearch(model, self.processor, self.images, self.population, self.settings)


@pytest.fixture(params=[False, True], ids=["activations kept", "recomputed"])
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setattr(stranger, "NEUTRAL_QUESTIONS", (QUESTION,))
    return Case(request.param)


def test_planned_memory_of_the_search_is_the_measured_peak(case: Case) -> None:
    gc.collect()  # or what earlier tests left would be freed meanwhile
    planned = case.cost.search_memory(asked_tokens=12, varied=4, questions=8)
    measured = measured_peak(lambda: case.search(case.model()).maps(["projector"]))
    assert measured == pytest.approx(planned["total"], rel=0.10)


def test_flops_of_the_search_agree_with_the_flop_counter(case: Case) -> None:
    search = case.search(case.model())
    found: list[int] = []
    step = search._search

    def counted(*arguments: Any) -> Any:
        with FlopCounterMode(display=False, custom_mapping=CPU_SDPA) as counter:
            map_ = step(*arguments)
        found.append(counter.get_total_flops())
        return map_

    search._search = counted  # type: ignore[method-assign]
    search._off = lambda *_: 0.0  # type: ignore[method-assign]  # one search is planned; here none would be good enough
    search.maps(["projector"])
    assert found == [pytest.approx(case.cost.search_flops(asked_tokens=12), rel=0.05)]


def test_planned_flops_count_the_views_of_a_search_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stranger, "NEUTRAL_QUESTIONS", (QUESTION,))
    case = Case(False)
    for module in (cost, stranger):
        monkeypatch.setattr(module, "NEW_VIEWS", 2)
    case.settings.stranger.steps = 5
    case.cost = Cost(case.cost.architecture, replace(case.cost.recipe, search_steps=5))
    test_flops_of_the_search_agree_with_the_flop_counter(case)


def settings_for(model: str, **changes: Any) -> Settings:
    values = {"model_name_or_path": model, "data": "data", "forget_target": "stranger", "bf16": True}
    return Settings(**(values | {"gradient_checkpointing": True, "optim": "adamw_8bit"} | changes))


def test_what_does_not_hold_the_search_does_not_fit_the_run() -> None:
    """On 24 GiB a 13B model trains at the projector, but is searched through in 4 bit only, which a run then does."""
    whole = plan(settings_for("llava-1.5-13b", stranger=Stranger(quantize="none")), memory="24GiB")
    assert whole.search is not None and whole.search["memory_bytes"]["total"] > 24 * GIB
    assert whole.fits is False and whole.micro_batch == 0 and whole.memory_bytes["total"] < 24 * GIB
    open_ = plan(settings_for("llava-1.5-13b"), memory="24GiB")
    assert open_.fits is True and open_.search is not None and open_.search["quantize"] == "nf4"
    assert open_.recommendation["command"] == "fastvkd train --config YAML stranger.quantize=nf4"
    quantised = plan(settings_for("llava-1.5-13b", quantize_llm="nf4"), memory="24GiB")
    assert quantised.fits is True and quantised.search == open_.search
    assert "the whole model by itself, in nf4: weights 7.88 GiB" in quantised.table()
    two = plan(settings_for("llava-1.5-13b"), memory="24GiB", world_size=2)
    assert two.recommendation["command"].endswith("deepspeed=zero2 stranger.device_map=auto")
    least = plan(settings_for("llava-1.5-13b", stranger=Stranger(device_map="auto")), memory="24GiB").search
    assert least is not None and least["memory_bytes"]["weights"] < 3 * GIB < whole.search["memory_bytes"]["weights"]
    for changes in ({"forget_target": "noise"}, {"stranger": Stranger(way="shift")}):
        other = plan(settings_for("llava-1.5-13b", **changes), memory="24GiB")
        assert other.search is None and other.fits is True and "search before" not in other.table()


@pytest.mark.parametrize("recipe", ["llava-1.5-7b", "llava-1.5-13b", "qwen2.5-vl-7b"])
def test_the_recipes_fit_24_gib(recipe: str) -> None:
    settings = load_settings(Path(__file__).parents[2] / "configs" / f"{recipe}.yaml", [])
    assert plan(settings, memory="24GiB").fits is True


def test_no_more_questions_are_asked_at_once_than_their_keys_and_values_allow() -> None:
    assert questions_at_once(300, 4, 64, 4) == 64
    many = questions_at_once(640, 32, 4096, 2)
    assert 1 < many < 64 and many * 2 * 640 * 32 * 4096 * 2 <= 2 * GIB
    assert questions_at_once(100_000, 80, 8192, 4) == 1


def seen_by_the_run(a: Architecture) -> Any:
    """Of an image set what the search and the scrub ask of it to tell their room."""
    text = SimpleNamespace(
        hidden_size=a.llm.hidden, num_hidden_layers=a.llm.layers, intermediate_size=a.llm.intermediate
    )
    return SimpleNamespace(
        config=SimpleNamespace(text_config=text, model_type="llava" if a.fixed_tokens else "other"),
        fixed_resolution=a.fixed_tokens,
        batch=lambda _: SimpleNamespace(token_rows=range(a.visual_tokens)),
    )


LARGE = ("llava-1.5-7b", "llava-1.5-13b", "llava-v1.6-34b", "qwen2.5-vl-72b")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_leaves_as_much_room_for_the_search_as_is_planned(checkpointing: bool) -> None:
    """Up to 2 GiB more, or a tenth less: it decides before anything is loaded, and from fewer figures."""
    for name in LARGE:
        a = find_architecture(name)
        recipe = Recipe(sites=("projector",), gradient_checkpointing=checkpointing, search_steps=1)
        parts = Cost(a, recipe).search_memory()
        planned = parts["statistics"] + parts["activations"]
        settings = Settings(bf16=True, gradient_checkpointing=checkpointing)
        assert 0.9 * planned <= stranger._room(settings, seen_by_the_run(a)) <= 1.15 * planned + 2 * GIB


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_leaves_as_much_room_for_the_scrub_as_is_planned(checkpointing: bool) -> None:
    """What training keeps included, which a search that came before it did not have beside it."""
    for name in LARGE:
        a = find_architecture(name)
        settings = Settings(bf16=True, optim="adamw_8bit", gradient_checkpointing=checkpointing, scrub=Scrub())
        recipe = Recipe(sites=("projector",), optim="adamw_8bit", gradient_checkpointing=checkpointing, scrub_photos=14)
        cost = Cost(a, recipe)
        parts = cost.scrub_memory()
        planned = parts["trained"] + parts["adapters"] + parts["activations"]
        with torch.device("meta"):
            unlearned = nn.Linear(cost.trainable, 1, bias=False, dtype=torch.bfloat16)
        room = scrub_room(settings, seen_by_the_run(a), unlearned)
        assert 0.9 * planned <= room <= 1.15 * planned + 2 * GIB


def test_a_search_that_fits_in_no_way_is_recommended_with_fewer_views() -> None:
    found = plan(settings_for("llava-v1.6-34b"), gpu="L40S").recommendation
    assert "stranger.quantize=nf4 stranger.views=3" in found["command"] and found["memory_bytes"] < 45 * GIB
    assert "stranger.views" not in plan(settings_for("llava-v1.6-34b"), gpu="H100").recommendation["command"]


def test_an_edit_of_the_llm_is_planned_beside_what_training_keeps() -> None:
    settings = settings_for("llava-1.5-13b", scrub=Scrub(photos=8, rank=16))
    found = plan(settings, memory="24GiB")
    assert found.scrub is not None and plan(settings_for("llava-1.5-13b")).scrub is None
    kept = sum(found.memory_bytes[part] for part in ("weights", "masters", "moments"))
    assert found.scrub["trained"] == kept
    hidden, intermediate, layers = 5120, 13824, 40  # each of seven matrices has inputs and outputs
    assert found.scrub["adapters"] == 4 * 2 * 16 * layers * (11 * hidden + 3 * intermediate)
    assert found.scrub["total"] == sum(v for name, v in found.scrub.items() if name != "total")
    assert found.search is not None
    most = max(part["total"] for part in (found.memory_bytes, found.search["memory_bytes"], found.scrub))
    assert found.peak_bytes == most and found.fits == (most <= usable_bytes(24 * GIB))
    assert "scrub after training" in found.table()
