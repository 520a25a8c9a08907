"""Questions about one photo that share its tokens are answered as if each was asked alone, for every family."""

import pytest
import tiny
import torch
from test_stranger import WHAT, WHO, tiny_population

from fastvkd.models.loading import checkpoint_layers
from fastvkd.unlearning.vkd.asking import Asker
from fastvkd.unlearning.vkd.images import Views

ASKED = [(WHO, "A"), (WHAT, "B C"), (WHO, "C B A"), (WHAT, "A"), (WHO, "B"), (WHAT, "C C"), (WHAT, "B")]
SHOWN = [0, 0, 0, 0, 0, 3, 4]


def half(rows: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return 0.5 * rows + 0.1


@pytest.fixture(params=list(tiny.BUILDERS))
def askers(request: pytest.FixtureRequest) -> tuple[Asker, Asker]:
    """One that asks as it likes, and one that asks everything alone."""
    model, processor, images, _ = tiny_population(request.param)
    model.requires_grad_(False)
    alone = Asker(model, processor, images)
    alone.packs = False
    return Asker(model, processor, images), alone


def test_llava_packs() -> None:
    model, processor, images, _ = tiny_population("llava")
    asker = Asker(model, processor, images)
    rows = asker._rows(SHOWN, ASKED)
    assert asker.packs and len(rows) < len(ASKED)
    assert {SHOWN[row.start] for row in rows} == {0, 3, 4}
    model.config.text_config._attn_implementation = "flash_attention_2"  # takes no mask of its own
    assert not Asker(model, processor, images).packs


@pytest.mark.parametrize("site", ["projector", "llm:1"])
def test_scores_and_greedy_answers_are_those_of_questions_asked_alone(askers, site: str) -> None:
    packed, alone = (asker.scores(SHOWN, ASKED, site, half) for asker in askers)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    greedy = [asker.gives(SHOWN, ASKED, site, half) for asker in askers]
    assert torch.equal(*greedy)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_several_questions_of_a_step_have_the_logits_and_gradients_of_separate_ones(askers, checkpointing) -> None:
    if checkpointing:
        checkpoint_layers(askers[0].model)
    asked = (ASKED[:3], ASKED[1:4])
    found = []
    for asker in askers:
        scale = torch.ones((), requires_grad=True)
        views = Views((5,), range(3), 3)
        with asker.same_images():
            each = asker.read_each([0, 3, 4], asked, views, "projector", lambda rows, _, scale=scale: scale * rows)
        loss = sum((k + 1) * answers.loss() for k, answers in enumerate(each))
        (slope,) = torch.autograd.grad(loss, scale)
        found.append((each, slope))
    (packed, slope), (alone, expected) = found
    for one, other in zip(packed, alone, strict=True):
        torch.testing.assert_close(one.logits, other.logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(one.row, other.row) and torch.equal(one.tokens, other.tokens)
        torch.testing.assert_close(one.log_probabilities(), other.log_probabilities(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-5)
