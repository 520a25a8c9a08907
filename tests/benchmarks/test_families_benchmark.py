"""The families' comparison: every family's tiny model trains on what it is asked, and the table is what rows say."""

import copy
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from study import families
from tables import RESULTS
from tiny_models import BLUEPRINTS
from world import World

from fastvkd.data.wording import question_answer_pairs
from fastvkd.demo.data import make_demo_data, vocabulary
from fastvkd.demo.model import Shape
from fastvkd.demo.pretraining import Words, packed_loss
from fastvkd.demo.run import SIZES
from fastvkd.demo.sight import _prepare
from fastvkd.models.prompts import chat_prompt
from fastvkd.photos import decode_image

SHAPE = Shape(vision_width=48, vision_layers=2, llm_width=48, llm_layers=2)


@pytest.fixture(scope="module")
def data() -> Any:
    few = {"photos": 1, "test_photos": 1, "flag_photos": 1, "countries": 16, "strangers": 2, "stranger_photos": 1}
    return make_demo_data(people=12, forget_percent=25, unseen_strangers=4, halves=1, neighbours=4, seed=0, **few)


@pytest.mark.parametrize("family", BLUEPRINTS)
def test_what_trains_on_packed_questions_is_the_loss_of_each_alone(family: str, data: Any) -> None:
    """Against the model's own forward pass over what its processor makes of photo, question and answer: tokens of the
    image, masks, positions in three dimensions and deepstack features all play a part in it."""
    blueprint, profiles = BLUEPRINTS[family], data.splits["Full_Set"][:2]
    processor = blueprint.processor(vocabulary(data), SHAPE)
    model = blueprint.model(processor, SHAPE, 0).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # else positions and visual features hardly count
            parameter.add_(0.1 * torch.randn_like(parameter))
    visual = blueprint.visual_input(model, processor)
    words = Words(visual)
    photos = [decode_image(profile.photos[0].data, "") for profile in profiles]
    asked = [question_answer_pairs(profile.visual)[:3] for profile in profiles]
    told = [question_answer_pairs(profile.textual)[:3] for profile in profiles]
    with torch.no_grad():
        pixels = visual.pixels([profile.photos[0] for profile in profiles])
        rows = words.rows([[words.visual(*pair) for pair in pairs] for pairs in asked], photo=True)
        packed = packed_loss(visual, rows, pixels)
        texts = words.rows([[words.textual(*pair) for pair in pairs] for pairs in told], photo=False)
        packed_text = packed_loss(visual, texts, None)
        about = zip(photos, asked, strict=True)
        alone = [alone_loss(model, processor, pair, [photo]) for photo, pairs in about for pair in pairs]
        alone_text = [alone_loss(model, processor, pair, None) for pairs in told for pair in pairs]
        swapped = packed_loss(visual, rows, pixels.flip(0))
    for found, losses in ((packed, alone), (packed_text, alone_text)):
        torch.testing.assert_close(found, torch.cat(losses).mean(), atol=2e-5, rtol=0)
    assert abs(swapped - packed) > 1e-3  # the photos count
    made = [processor.image_processor([[photo]], return_tensors="pt") for photo in photos]
    for name, value in visual.inputs(pixels).items():
        assert torch.equal(value, torch.cat([one[name] for one in made])), name


@pytest.mark.parametrize("family", BLUEPRINTS)
def test_sight_starts_from_what_patches_differ_by(family: str, data: Any) -> None:
    """Where the tower's own convolution sees the photos' patches, each channel has a share of the variance alone."""
    blueprint = BLUEPRINTS[family]
    processor = blueprint.processor(vocabulary(data), SHAPE)
    visual = blueprint.visual_input(blueprint.model(processor, SHAPE, 0), processor)
    pixels = visual.pixels([profile.photos[0] for profile in data.splits["Full_Set"]])
    convolution, table = visual.patches()
    _prepare(convolution, table, pixels)
    seen: list[torch.Tensor] = []
    convolution.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        visual.features(pixels)
    covariance = torch.cov(seen[0].transpose(0, 1).flatten(1))
    alone = covariance.diagonal()
    assert (covariance - alone.diag()).abs().max() < 1e-3 * alone.max()
    assert alone[0] == pytest.approx(0.25, rel=0.01) and (alone[:8] > 0.2).all()
    assert (table is None) == (family == "qwen2_5_vl")


def alone_loss(model: Any, processor: Any, pair: tuple[str, str], images: list[Any] | None) -> torch.Tensor:
    """The loss of each token of an answer."""
    question, answer = pair
    count = len(processor.tokenizer(f" {answer}").input_ids) + 1
    prompt = chat_prompt(processor, question, image=images is not None)
    more = {"images": [images]} if images else {}
    encoded = processor(text=[f"{prompt} {answer}</s>"], return_tensors="pt", add_special_tokens=False, **more)
    logits, ids = model(**encoded).logits[0], encoded["input_ids"][0]
    return F.cross_entropy(logits[-count - 1 : -1], ids[-count:], reduction="none")


def results(name: str) -> list[dict[str, Any]]:
    return json.loads((RESULTS / name).read_text())["rows"]


def test_a_row_has_a_familys_model_before_and_after(monkeypatch) -> None:
    monkeypatch.setattr(families, "load_model", lambda path: path)
    monkeypatch.setattr(families, "examined", lambda world, model: {"family": world.blueprint.name, "model": model})
    world = World.__new__(World)
    world.spec, world.vanilla = SIZES["tiny"], "LLaVA"  # whose model no other family is to take
    asked = []

    def unlearn(self: World, overrides: dict[str, Any]) -> tuple[str, Any]:
        asked.append((self.blueprint.name, overrides))
        return "unlearned", SimpleNamespace(seconds={"prepare": 1.0, "unlearn": 2.0}, images_seen=36)

    monkeypatch.setattr(World, "unlearn", unlearn)
    monkeypatch.setattr(World, "_trained", lambda self, gold: f"vanilla {self.blueprint.name}")
    row = families.measure(world, "qwen3_vl")
    assert row["before"] == {"family": "qwen3_vl", "model": "vanilla qwen3_vl"}
    assert row["after"] == {"family": "qwen3_vl", "model": "unlearned"} and row["unlearning_seconds"] == 3
    assert asked == [("qwen3_vl", SIZES["tiny"].overrides | {"sites": {"llm:1": 1.0}})]


def test_the_table_is_what_a_row_says() -> None:
    found = {row["variant"]: row for row in results("methods.json") if row["seed"] == 0}
    one = {"seed": 0, "variant": "internvl", "before": found["vanilla"], "after": found["vkd"]}
    row = one | {"unlearning_seconds": 12.0, "images_seen": 36}
    bars, _, figures = "\n".join(families.STUDY.table({"rows": [row]})).partition("\n\n")
    before, after = figures.splitlines()[2:]
    assert before.startswith("| 0 | InternVL | not yet | 100.0 |")
    assert after.startswith(f"| 0 | InternVL | yes | {100 * found['vkd']['vqa']['test']:.1f} |")
    assert "(NO)" not in bars and bars.count("(yes)") == len(families.BARS) - 1
    # A person who is still named, and text that is not kept, are said to miss.
    worse = copy.deepcopy(row)
    worse["after"]["who"]["forget"]["right"] = 0.25
    worse["after"]["text_qa_worst"] = 0.5 * row["before"]["text_qa_worst"]
    told = families.STUDY.table({"rows": [worse]})[2]
    assert "| 25.0 (NO) |" in told and "| 50.0 (NO) |" in told and told.count("(NO)") == 2
