"""Output-level methods: each loss against plain float64 arithmetic, what each may change, and how that is exported."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from fastvkd.data import mllmu
from fastvkd.data.wording import question_answer_pairs
from fastvkd.engines.checkpoints import load_weights
from fastvkd.engines.exporting import export, load_trained, match_keys
from fastvkd.errors import SettingsError, TrainingError
from fastvkd.models import lora, sine
from fastvkd.models.answers import AnswerBatch, collate_answers
from fastvkd.models.families import all_parameters, family_of, visual_parameters
from fastvkd.models.loading import load_model, load_processor
from fastvkd.models.prompts import chat_prompt
from fastvkd.photos import decode_image
from fastvkd.settings import Saliency
from fastvkd.unlearning import saliency
from fastvkd.unlearning.answers import Answers, read_answers
from fastvkd.unlearning.loop import unlearn
from fastvkd.unlearning.methods import kvw, manu, pava
from fastvkd.unlearning.methods.finetune import finetune
from fastvkd.unlearning.methods.ga import gradient_ascent
from fastvkd.unlearning.methods.gd import gradient_difference
from fastvkd.unlearning.methods.idk import REFUSALS, refusal
from fastvkd.unlearning.methods.kl import KlMinimisation
from fastvkd.unlearning.methods.npo import NegativePreference
from fastvkd.unlearning.methods.rmu import RepresentationMisdirection
from fastvkd.unlearning.methods.smfa import sculpted
from fastvkd.unlearning.methods.undial import AdjustedSelfDistillation

TRAINED = ("ga", "gd", "kl", "npo", "undial", "pava", "idk", "rmu", "mmunlearner", "finetune")
AT_ONCE = ("manu", "smfa")  # no step of the loop is theirs
LENGTHS = (3, 1, 2, 4)  # tokens of four answers
IS_FORGET = (True, False, True, False)


def some_answers(seed: int, vocabulary: int = 11, width: int = 5) -> Answers:
    """Four answers of different lengths, two of each side, with random logits and hidden states."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(LENGTHS)
    return Answers(
        torch.randn(n, width, generator=generator, requires_grad=True),
        (3 * torch.randn(n, vocabulary, generator=generator)).requires_grad_(),
        torch.randint(vocabulary, (n,), generator=generator),
        torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS)),
        torch.tensor(IS_FORGET),
        torch.tensor([7, 30, 2, 41]),
    )


def log_softmax64(logits: torch.Tensor) -> list[list[float]]:
    rows = logits.detach().double().tolist()
    totals = [math.log(math.fsum(math.exp(v) for v in row)) for row in rows]
    return [[v - total for v in row] for row, total in zip(rows, totals, strict=True)]


def mean_nll64(answers: Answers, forget: bool) -> float:
    log_p = log_softmax64(answers.logits)
    wanted = [i for i, row in enumerate(answers.row.tolist()) if IS_FORGET[row] == forget]
    return -math.fsum(log_p[i][int(answers.tokens[i])] for i in wanted) / len(wanted)


def answer_log_p64(answers: Answers) -> list[float]:
    log_p = log_softmax64(answers.logits)
    return [
        math.fsum(log_p[i][int(answers.tokens[i])] for i, r in enumerate(answers.row.tolist()) if r == row)
        for row in range(4)
    ]


def test_cross_entropy_losses_are_their_formulas() -> None:
    answers = some_answers(0)
    l_f, l_r = mean_nll64(answers, True), mean_nll64(answers, False)
    for found, expected in (
        (gradient_ascent(answers), {"forget": -l_f}),
        (gradient_difference(answers), {"forget": -l_f, "retain": l_r}),
        (refusal(answers), {"forget": l_f, "retain": l_r}),
        (finetune(dataclasses.replace(answers, is_forget=torch.zeros(4, dtype=torch.bool))), None),
    ):
        if expected is None:
            total = -math.fsum(answer_log_p64(answers)) / sum(LENGTHS)
            expected = {"retain": total}
        assert {k: float(v.detach()) for k, v in found.items()} == pytest.approx(expected, rel=1e-6)


def test_npo_is_its_formula_and_starts_at_two_log_two_over_beta() -> None:
    beta, before, now = 0.4, some_answers(0), some_answers(1)
    method = NegativePreference(beta)
    method.remember(before)
    assert float(method(before)["forget"]) == pytest.approx(2 * math.log(2) / beta, rel=1e-6)
    ratios = [a - b for a, b in zip(answer_log_p64(now), answer_log_p64(before), strict=True)]
    expected = [2 / beta * math.log1p(math.exp(beta * ratio)) for ratio, f in zip(ratios, IS_FORGET, strict=True) if f]
    terms = method(now)
    assert float(terms["forget"]) == pytest.approx(sum(expected) / 2, rel=1e-6)
    assert float(terms["retain"]) == pytest.approx(mean_nll64(now, False), rel=1e-6)


@pytest.mark.parametrize("top_k", [3, 11, 64])
def test_kl_is_its_formula_over_the_kept_tokens_and_the_rest(top_k: int) -> None:
    before, now = some_answers(0), some_answers(1)
    method = KlMinimisation(top_k)
    method.remember(before)
    log_p0, log_p = log_softmax64(before.logits), log_softmax64(now.logits)
    retained = [i for i, row in enumerate(now.row.tolist()) if not IS_FORGET[row]]
    divergence = 0.0
    for i in retained:
        kept = sorted(range(11), key=lambda v: -log_p0[i][v])[:top_k]
        rest = [v for v in range(11) if v not in kept]
        divergence += sum(math.exp(log_p0[i][v]) * (log_p0[i][v] - log_p[i][v]) for v in kept)
        if rest:
            p0, p = (math.fsum(math.exp(row[v]) for v in rest) for row in (log_p0[i], log_p[i]))
            divergence += p0 * math.log(p0 / p)
    terms = method(now)
    assert float(terms["forget"]) == pytest.approx(-mean_nll64(now, True), rel=1e-6)
    assert float(terms["retain"]) == pytest.approx(mean_nll64(now, False) + divergence / len(retained), rel=1e-5)
    assert float(method(before)["retain"]) == pytest.approx(mean_nll64(before, False), rel=1e-5)  # no divergence yet
    terms["retain"].backward()
    assert torch.isfinite(now.logits.grad).all()


@pytest.mark.parametrize("top_k", [1, 3, 11, 64])
def test_undial_is_the_divergence_from_the_original_with_a_lowered_right_token(top_k: int) -> None:
    before, now, strength = some_answers(0), some_answers(1), 2.5
    now.tokens = before.tokens
    method = AdjustedSelfDistillation(strength, top_k)
    method.remember(before)
    lowered = before.logits.detach().double()
    for i, token in enumerate(before.tokens.tolist()):
        lowered[i, token] -= strength
    log_q, log_p = log_softmax64(lowered), log_softmax64(now.logits)
    forget = [i for i, row in enumerate(now.row.tolist()) if IS_FORGET[row]]
    expected = 0.0
    for i in forget:
        right = int(before.tokens[i])
        others = sorted((v for v in range(11) if v != right), key=lambda v: -log_q[i][v])[: top_k - 1]
        kept = [right, *others]
        expected += sum(math.exp(log_q[i][v]) * (log_q[i][v] - log_p[i][v]) for v in kept)
        rest = [v for v in range(11) if v not in kept]
        if rest:
            q, p = (math.fsum(math.exp(row[v]) for v in rest) for row in (log_q[i], log_p[i]))
            expected += q * math.log(q / p)
    terms = method(now)
    assert float(terms["forget"]) == pytest.approx(expected / len(forget), rel=1e-5)
    assert float(terms["retain"]) == pytest.approx(mean_nll64(now, False), rel=1e-6)
    terms["forget"].backward()
    # Where the right token is likelier than it should be, its logit is to fall.
    for i in forget:
        right = int(before.tokens[i])
        if log_p[i][right] > log_q[i][right]:
            assert float(now.logits.grad[i, right]) > 0


def test_undial_without_strength_begins_at_zero_and_bears_great_strength() -> None:
    before = some_answers(0)
    for strength, expected in ((0.0, 0.0), (80.0, None)):
        method = AdjustedSelfDistillation(strength, 11)
        method.remember(before)
        found = float(method(before)["forget"])
        assert math.isfinite(found)
        if expected is not None:
            assert found == pytest.approx(expected, abs=1e-6)


def test_sculpting_takes_out_what_conflicts_and_outweighs_the_anchor() -> None:
    forget = torch.tensor([[3.0, -4.0], [0.0, 12.0]])  # norm 13
    anchor = torch.tensor([[-1.0, 2.0], [2.0, 4.0]])  # norm 5, so rho is 2.6
    # In conflict are 3 against -1, with 2.6 k to outweigh, and -4 against 2, with 5.2 k.
    assert torch.equal(sculpted(forget, anchor, 0.0), torch.tensor([[0.0, 0.0], [0.0, 12.0]]))
    assert torch.equal(sculpted(forget, anchor, 1.0), torch.tensor([[0.0, -4.0], [0.0, 12.0]]))
    assert torch.equal(sculpted(forget, anchor, 2.0), forget)
    assert torch.equal(sculpted(forget, torch.zeros(2, 2), 0.0), forget)


def test_smfa_without_a_mask_is_refusing_and_with_one_keeps_entries_of_it(world, tmp_path: Path) -> None:
    common = {"trainable": "projector", "max_steps": 3, "learning_rate": 1e-2, "optim": "adamw_8bit"}
    common |= {"weight_decay": 0.1, "gradient_accumulation_steps": 2}
    before = load_model(world.model).state_dict()
    refusing = load_weights(unlearn(world.settings(tmp_path / "idk", method="idk", **common)).checkpoint)
    whole = load_weights(unlearn(world.settings(tmp_path / "1", method="smfa", smfa_k=1e9, **common)).checkpoint)
    cut = load_weights(unlearn(world.settings(tmp_path / "2", method="smfa", smfa_k=0.0, **common)).checkpoint)
    taken = 0
    for name, value in refusing.items():
        torch.testing.assert_close(whole[name], value, rtol=1e-5, atol=1e-7)
        back = cut[name] == before[name]
        assert torch.equal(cut[name][~back], whole[name][~back])
        taken += int((back & (value != before[name])).sum())
    assert taken > 0


def test_weakening_gates_columns_by_the_excess_of_their_coefficients() -> None:
    layer = nn.Linear(3, 2, bias=False)
    before = layer.weight.detach().clone()
    kvw.weaken([("w", layer)], [torch.tensor([4.0, 1.0, 2.0])], [torch.tensor([1.0, 4.0, 2.0])], gamma=0.5)
    gates = torch.tensor([0.5, 1.0, 1.0])  # (1/4) ** 0.5; no more than retained answers use it; equally
    torch.testing.assert_close(layer.weight, before * gates, rtol=1e-6, atol=0)


def test_knowledge_coefficients_are_mean_absolute_activations_where_answers_are_predicted(world) -> None:
    model = load_model(world.model)
    processor, asked = load_processor(world.model), questions(world)
    batch = collate_answers(processor, asked, range(4), [False] * 4)
    trained = SimpleNamespace(model=model, parameters=list(model.named_parameters()))
    readers = kvw.find_readers(trained)
    assert len(readers) == 3 and all("language_model.layers" in name for name, _ in readers)
    seen: list[torch.Tensor] = []
    handle = readers[1][1].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().double()))
    read_answers(model, batch)
    handle.remove()
    (activations,) = seen
    expected = torch.stack([activations[row, at] for row, at in (batch.predicts != -100).nonzero().tolist()])
    found = kvw.coefficients(model, readers, [batch, batch])[1]
    torch.testing.assert_close(found.double(), expected.abs().mean(0), rtol=1e-4, atol=1e-7)
    with pytest.raises(TrainingError, match="trainable=all"):
        kvw.find_readers(SimpleNamespace(model=model, parameters=[]))


def test_pava_keeps_the_originals_own_answers_about_forget_photos_and_no_retained_person(
    world, tmp_path: Path, monkeypatch
) -> None:
    forget = mllmu.read_split(world.data, world.forget_split)
    model, processor = load_model(world.model), load_processor(world.model)
    anchors = pava.own_answers(model, processor, forget)
    keys = {photo.key for profile in forget for photo in profile.photos}
    assert {photo.key for one in anchors for photo in one.photos} == keys and len(anchors) == len(keys)
    question = anchors[0].visual.generation[0]
    image = decode_image(anchors[0].photos[0].data, anchors[0].photos[0].source)
    inputs = processor(text=chat_prompt(processor, question.question, image=True), images=[image], return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=16)[0, inputs["input_ids"].shape[1] :]
    assert processor.tokenizer.decode(output, skip_special_tokens=True).strip() == question.answer
    described = {c.question for profile in forget for c in profile.visual.description}
    assert described and {o.question for one in anchors for o in one.visual.generation} <= described

    seen: list = []
    whole = pava.own_answers
    monkeypatch.setattr(pava, "own_answers", lambda *args: seen.append(args[2]) or whole(*args))
    result = unlearn(world.settings(tmp_path, method="pava", learning_rate=1e-2, max_steps=12))
    assert [[p.entity for p in profiles] for profiles in seen] == [[p.entity for p in forget]]
    lines = [json.loads(line) for line in result.metrics.read_text().splitlines()]
    assert lines[-1]["loss_answer_forget"] < lines[0]["loss_answer_forget"]


def test_a_sine_adds_the_sine_of_what_is_trained_and_no_entry_moves_by_more_than_one(world, tmp_path: Path) -> None:
    model = load_model(world.model)
    batch = collate_answers(load_processor(world.model), questions(world), range(4), [False] * 4)
    original = {name: value.clone() for name, value in model.state_dict().items()}
    before = read_answers(model, batch).logits
    projector = [(n, p) for n, p in model.named_parameters() if "multi_modal_projector" in n]
    added = sine.add_sines(model, projector)
    assert [name.rsplit(".", 1)[-1] for name, _ in added] == ["sine", "sine"]
    assert torch.equal(read_answers(model, batch).logits, before)
    with torch.no_grad():
        for _, parameter in added:
            parameter.copy_(2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    trained = {name: p.detach() for name, p in added}
    with_sines = read_answers(model, batch).logits
    plain = load_model(world.model)
    plain.load_state_dict(sine.merged(trained, original.__getitem__), strict=False)
    torch.testing.assert_close(read_answers(plain, batch).logits, with_sines, rtol=1e-4, atol=1e-4)
    layer = "model.multi_modal_projector.linear_1.weight"
    moved = plain.state_dict()[layer] - original[layer]
    assert 0.9 < moved.abs().max() <= 1 + 1e-6
    value = trained["model.multi_modal_projector.linear_1.sine"][0, 0]
    assert float(moved[0, 0]) == pytest.approx(math.sin(float(value)), abs=1e-6)

    run = unlearn(world.settings(tmp_path / "run", method="gd", trainable="sine", learning_rate=1e-2))
    exported = export(tmp_path / "run", tmp_path / "out", model_card="")
    found = load_model(exported.folder).state_dict()
    changed = {name for name, value in found.items() if not torch.equal(value, original[name])}
    assert changed == {f"model.multi_modal_projector.linear_{i}.weight" for i in (1, 2)}
    again = load_model(world.model)
    load_trained(again, run.checkpoint)
    for name in changed:
        torch.testing.assert_close(again.state_dict()[name], found[name], rtol=0, atol=0)


def test_rmu_is_its_formula() -> None:
    before, now = some_answers(0), some_answers(1)
    method = RepresentationMisdirection(scale=6.5, seed=3)
    method.remember(before)
    u = [6.5 * v for v in method.direction(5).double().tolist()]
    assert math.hypot(*u) == pytest.approx(6.5, rel=1e-6)
    hidden, original = now.hidden.detach().double().tolist(), before.hidden.detach().double().tolist()
    away, drift = [], []
    for i, row in enumerate(now.row.tolist()):
        aim = u if IS_FORGET[row] else original[i]
        (away if IS_FORGET[row] else drift).append(
            math.fsum((a - b) ** 2 for a, b in zip(hidden[i], aim, strict=True)) / 5
        )
    terms = method(dataclasses.replace(now, logits=None))
    assert float(terms["forget"]) == pytest.approx(sum(away) / len(away), rel=1e-6)
    assert float(terms["retain"]) == pytest.approx(sum(drift) / len(drift), rel=1e-6)


def test_wagle_scores_and_fisher_are_their_formulas() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    parameters = list(layer.named_parameters())
    forget, retain = torch.randn(4, 3), torch.randn(5, 3)

    def losses(inputs):
        return [lambda x=x: layer(x).square().sum() for x in inputs]

    def naive(inputs):
        each = []
        for x in inputs:
            weight, bias, x = layer.weight.detach().double(), layer.bias.detach().double(), x.double()
            error = 2 * (weight @ x + bias)
            each.append({"weight": torch.outer(error, x), "bias": error})
        return each

    g_f, g_r = naive(forget), naive(retain)
    mean = {k: sum(g[k] for g in g_f) / 4 for k in g_f[0]}, {k: sum(g[k] for g in g_r) / 5 for k in g_r[0]}
    fisher = {k: sum(g[k] ** 2 for g in g_r) / 5 for k in g_r[0]}
    found_fisher = saliency.fisher_information(parameters, losses(retain))
    gamma = sum(float(f.sum()) for f in fisher.values()) / 8
    scores = saliency.wagle_scores(
        parameters,
        saliency.mean_gradient(parameters, losses(forget)),
        saliency.mean_gradient(parameters, losses(retain)),
        found_fisher,
    )
    for name, parameter in parameters:
        torch.testing.assert_close(found_fisher[name].double(), fisher[name], rtol=1e-5, atol=1e-7)
        expected = parameter.detach().double() * mean[0][name] - mean[1][name] * mean[0][name] / gamma
        torch.testing.assert_close(scores[name].double(), expected.abs(), rtol=1e-4, atol=1e-6)


def test_masks_that_match_nothing_are_errors() -> None:
    rule = Saliency(granularity="weight", threshold=1.0)
    with pytest.raises(TrainingError, match="no parameter"):
        saliency.build_masks({}, {}, rule)
    with pytest.raises(TrainingError, match="no weight"):
        saliency.build_masks({"w": torch.zeros(2, 2)}, {"w": torch.ones(2, 2)}, rule)
    with pytest.raises(TrainingError, match="first b"):
        saliency.check_reached(
            {"a": torch.ones(2, 2), "b": torch.zeros(2, 2)}, {"a": torch.ones(2, 2), "b": torch.zeros(2, 2)}
        )


@pytest.mark.parametrize(
    ("trainable", "score"),
    [("vision+projector", "fisher"), ("all", "fisher"), ("all", "wagle"), ("vision+projector", "random")],
)
def test_the_mask_matches_every_parameter_that_is_trained(world, tmp_path: Path, monkeypatch, trainable, score) -> None:
    masks: dict = {}
    original = saliency.mask_gradients
    monkeypatch.setattr(saliency, "mask_gradients", lambda p, m: (masks.update(m), original(p, m)))
    extra = {"saliency.score": score, "saliency.fraction": 0.4} if score != "fisher" else {}
    result = unlearn(
        world.settings(
            tmp_path, method="mmunlearner", trainable=trainable, max_steps=2, **{"saliency.batches": 2}, **extra
        )
    )
    model = load_model(world.model)
    family = family_of(model)
    intended = (
        all_parameters(model, family) if trainable == "all" else visual_parameters(model, family, "vision+projector")
    )
    before, after = dict(model.named_parameters()), load_weights(result.checkpoint)
    assert set(masks) == set(after) == {name for name, _ in intended}
    for name, mask in masks.items():
        assert torch.equal(after[name][~mask.to_bool()], before[name][~mask.to_bool()]), name
    assert 0.2 < result.trained_share < 0.7
    assert any(not torch.equal(after[name], before[name]) for name in after)


def questions(world, count: int = 4, image: bool = True):
    profiles = mllmu.read_split(world.data, "Full_Set")[:count]
    pairs = []
    for profile in profiles:
        question, answer = question_answer_pairs(profile.visual if image else profile.textual)[0]
        photo = profile.photos[0]
        pairs.append((decode_image(photo.data, photo.source) if image else None, question, answer))
    return pairs


@pytest.mark.parametrize("image", [True, False])
def test_labels_are_the_answer_and_its_end_and_nothing_else(world, image: bool) -> None:
    processor = load_processor(world.model)
    pairs = questions(world, image=image)
    batch = collate_answers(processor, pairs, range(4), [False] * 4)
    assert ("pixel_values" in batch.inputs) == image
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    for row, (_, _, answer) in enumerate(pairs):
        labels = batch.predicts[row][batch.predicts[row] != -100]
        assert processor.tokenizer.decode(labels).strip() == f"{answer}{processor.tokenizer.eos_token}"
        assert image_token not in labels
        at = (batch.predicts[row] != -100).nonzero()[:, 0]
        assert torch.equal(batch.inputs["input_ids"][row, at + 1], labels)  # each position predicts the next token


def test_logits_exist_at_answer_positions_only(world) -> None:
    model = load_model(world.model)
    batch = collate_answers(load_processor(world.model), questions(world), range(4), [False] * 4)
    seen: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel() // args[0].shape[-1]))
    answers = read_answers(model, batch)
    assert seen == [int((batch.predicts != -100).sum())]
    whole = model(**batch.inputs).logits.float()
    torch.testing.assert_close(answers.logits, whole[batch.predicts != -100], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [*TRAINED, *AT_ONCE])
def test_every_method_changes_the_visual_part_and_no_more(world, tmp_path: Path, method: str) -> None:
    result = unlearn(
        world.settings(
            tmp_path / "run", method=method, **{"saliency.batches": 2, "manu_batches": 1, "manu_fraction": 0.1}
        )
    )
    before, after = load_model(world.model).state_dict(), load_weights(result.checkpoint)
    assert all("vision_tower" in name or "multi_modal_projector" in name for name in after)
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
    lines = [json.loads(line) for line in result.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == ([] if method in AT_ONCE else [1, 2, 3, 4])


@pytest.mark.parametrize(
    ("method", "trainable"), [("gd", "lora"), ("rmu", "lora"), ("npo", "all"), ("manu", "all"), ("kvw", "all")]
)
def test_a_trained_llm_is_exported(world, tmp_path: Path, method: str, trainable: str) -> None:
    result = unlearn(
        world.settings(
            tmp_path / "run", method=method, trainable=trainable, lora_rank=4, manu_batches=1, manu_fraction=0.1
        )
    )
    exported = export(tmp_path / "run", tmp_path / "out", model_card="")
    found, base = load_model(exported.folder), load_model(world.model)
    changed = {n for n, p in found.named_parameters() if not torch.equal(p, base.state_dict()[n])}
    assert any("language_model.layers" in name for name in changed)
    if trainable == "lora":
        assert all("language_model.layers" in name and name.endswith("proj.weight") for name in changed)
    load_trained(base, result.checkpoint)
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, base.state_dict()[name], rtol=0, atol=0)


def test_adapters_begin_as_nothing_and_merge_into_what_they_did(world) -> None:
    model = load_model(world.model)
    batch = collate_answers(load_processor(world.model), questions(world), range(4), [False] * 4)
    original = {name: value.clone() for name, value in model.state_dict().items()}
    before = read_answers(model, batch).logits
    names = {id(module): name for name, module in model.named_modules()}
    added = lora.add_adapters(model.model.language_model, names, rank=4, alpha=8, seed=0)
    assert len(added) == 2 * 7 * 3  # A and B, on seven linear layers of each of three decoder layers
    assert torch.equal(read_answers(model, batch).logits, before)
    with torch.no_grad():
        for _, parameter in added:
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    trained = {name: p.detach() for name, p in added}
    with_adapters = read_answers(model, batch).logits
    assert not torch.allclose(with_adapters, before, atol=1e-3)
    plain = load_model(world.model)
    plain.load_state_dict(lora.merged(trained, original.__getitem__, alpha=8), strict=False)
    torch.testing.assert_close(read_answers(plain, batch).logits, with_adapters, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.", "model.language_model."])
def test_llm_weights_are_found_under_every_spelling(prefix: str) -> None:
    live = "model.language_model.layers.3.mlp.up_proj.weight"
    disk = {f"{prefix}layers.3.mlp.up_proj.weight", f"{prefix}norm.weight", "visual.blocks.3.mlp.up_proj.weight"}
    assert match_keys([live], disk) == {live: f"{prefix}layers.3.mlp.up_proj.weight"}


def test_manu_zeroes_the_neurons_with_the_highest_ratio() -> None:
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc2 = nn.Linear(4, 2)

    model = Mlp()
    before = model.fc2.weight.detach().clone()
    readers = manu.find_readers(model, model.named_parameters())
    changed = manu.prune(readers, [torch.tensor([1.0, 4, 2, 9])], [torch.tensor([1.0, 1, 4, 3])], 0.5)
    assert [name for name, _ in changed] == ["fc2.weight"]
    assert torch.equal(model.fc2.weight[:, [1, 3]], torch.zeros(2, 2))
    assert torch.equal(model.fc2.weight[:, [0, 2]], before[:, [0, 2]])
    with pytest.raises(TrainingError, match="trainable"):
        manu.find_readers(nn.Sequential(nn.Linear(2, 2)), [])


def test_manu_importance_is_the_root_mean_square_over_tokens(world) -> None:
    model = load_model(world.model)
    processor, asked = load_processor(world.model), questions(world)
    asked[0] = (*asked[0][:2], asked[0][2] + " and so on, until the others need padding")
    batch = collate_answers(processor, asked, range(4), [False] * 4)
    assert not batch.inputs["attention_mask"].all()
    readers = manu.find_readers(model, model.named_parameters())
    assert {name.split(".")[1] for name, _ in readers} == {"vision_tower", "multi_modal_projector", "language_model"}
    seen: list[list[torch.Tensor]] = [[] for _ in readers]
    handles = [
        layer.register_forward_pre_hook(lambda _, args, to=to: to.append(args[0].detach().double()))
        for (_, layer), to in zip(readers, seen, strict=True)
    ]
    found = manu.importance(model, readers, [batch, batch])
    for to in seen:
        to.clear()
    for i, one in enumerate(asked):  # nothing is padded where an answer comes alone
        read_answers(model, collate_answers(processor, [one], [i], [False]))
    for handle in handles:
        handle.remove()
    for own, to in zip(found, seen, strict=True):
        values = torch.cat([s.reshape(-1, s.shape[-1]) for s in to])
        torch.testing.assert_close(own.double(), values.square().mean(0).sqrt(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", ["npo", "kl", "undial", "rmu"])
def test_a_short_run_remembers_what_its_saliency_mask_asks(world, tmp_path: Path, method: str) -> None:
    mask = {"saliency.granularity": "weight", "saliency.fraction": 0.5, "saliency.batches": 6}
    assert unlearn(world.settings(tmp_path, method=method, max_steps=1, **mask)).steps == 1


def test_finetuning_learns_images_and_texts(world, tmp_path: Path) -> None:
    result = unlearn(
        world.settings(
            tmp_path,
            method="finetune",
            trainable="all",
            max_steps=12,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
        )
    )
    lines = [json.loads(line) for line in result.metrics.read_text().splitlines()]
    for part in ("loss_answer_retain", "loss_text_retain"):
        assert lines[-1][part] < 0.9 * lines[0][part]


def test_finetuning_on_the_retain_set_does_not_see_the_forget_set(world, tmp_path: Path, monkeypatch) -> None:
    from fastvkd.unlearning import tasks

    read: list[str] = []
    original = tasks.read_split
    monkeypatch.setattr(tasks, "read_split", lambda folder, split: (read.append(split), original(folder, split))[1])
    unlearn(world.settings(tmp_path, method="finetune", finetune_split=world.retain_split, max_steps=1))
    assert read == [world.retain_split]


def test_finetuning_on_metadata_asks_about_photos_of_whoever_is_not_left_out(world, tmp_path: Path) -> None:
    shutil.copytree(world.data, tmp_path / "data")
    (file,) = (tmp_path / "data" / "Full_Set").glob("*.parquet")
    rows = pq.read_table(file)
    told = ['[{"Question": "Who is this?", "Answer": "Ann"}]'] * len(rows)
    (tmp_path / "data" / "ft_Data").mkdir()
    pq.write_table(
        rows.select(["ID", "image"]).append_column("metadata", pa.array(told)),
        tmp_path / "data" / "ft_Data" / file.name,
    )
    settings = world.settings(
        tmp_path / "run",
        data=str(tmp_path / "data"),
        method="finetune",
        finetune_split=f"ft_Data-{world.forget_split}",
        num_train_epochs=1,
        per_device_train_batch_size=4,
    )
    result = unlearn(settings)
    assert result.steps == math.ceil(len(mllmu.read_split(world.data, world.retain_split)) / 4)
    (line, *_) = [json.loads(line) for line in result.metrics.read_text().splitlines()]
    assert "loss_answer_retain" in line and "loss_text_retain" not in line


@pytest.mark.parametrize("method", ["gd", "ga", "finetune"])
def test_epochs_count_questions(world, tmp_path: Path, method: str) -> None:
    result = unlearn(
        world.settings(
            tmp_path, method=method, num_train_epochs=0.5, per_device_train_batch_size=64, trainable="projector"
        )
    )
    profiles = mllmu.read_split(world.data, "Full_Set" if method == "finetune" else world.forget_split)
    count = sum(len(question_answer_pairs(p.visual)) * len(p.photos) for p in profiles)
    if method == "finetune":
        count += len({pair for p in profiles for pair in question_answer_pairs(p.textual)})
    each = 32 if method == "gd" else 64
    assert result.steps == math.ceil(count / 2 / each)


@pytest.mark.parametrize("method", ["npo", "kl", "undial", "pava", "rmu"])
def test_the_original_is_remembered_across_a_resume(world, tmp_path: Path, method: str) -> None:
    whole = unlearn(world.settings(tmp_path / "whole", method=method))
    settings = world.settings(tmp_path / "cut", method=method, save_steps=2, save_total_limit=5)
    unlearn(settings)
    (tmp_path / "cut" / "checkpoint-4" / "checkpoint.json").unlink()
    resumed = unlearn(dataclasses.replace(settings, resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2")))
    expected, found = load_weights(whole.checkpoint), load_weights(resumed.checkpoint)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_refusals_take_the_place_of_forget_answers_only(world) -> None:
    from fastvkd.unlearning.answers import AnswerSampler

    processor = load_processor(world.model)
    settings = world.settings(Path("unused"), method="idk")
    sides = {
        "forget": mllmu.read_split(world.data, world.forget_split),
        "retain": mllmu.read_split(world.data, world.retain_split),
    }
    batch: AnswerBatch = AnswerSampler(processor, settings, refusals=REFUSALS, **sides).batch(0, 0, 1)
    for row, forget in enumerate(batch.is_forget.tolist()):
        text = processor.tokenizer.decode(batch.predicts[row][batch.predicts[row] != -100])
        assert (text.strip().removesuffix(processor.tokenizer.eos_token) in REFUSALS) == forget


@pytest.mark.parametrize(
    ("overrides", "mend"),
    [
        ({"trainable": "lora"}, "method=vkd"),
        ({"trainable": "all"}, "method=vkd"),
        ({"method": "mmunlearner", "trainable": "lora"}, "trainable=all"),
        ({"method": "manu", "trainable": "lora"}, "trainable=all"),
        ({"method": "smfa", "trainable": "lora"}, "trainable=all"),
        ({"method": "kvw"}, "trainable=all"),
        ({"method": "gd", "trainable": "all", "quantize_llm": "nf4"}, "trainable=lora"),
        ({"method": "gd", "trainable": "lora", "fused_frozen_ops": True}, "fused_frozen_ops"),
        ({"method": "ga", "saliency.granularity": "weight", "saliency.fraction": 0.5}, "gd"),
        ({"method": "mmunlearner", "weight_decay": 0.1}, "weight_decay=0"),
        ({"method": "mmunlearner", "saliency.score": "wagle"}, "saliency.fraction"),
        ({"method": "mmunlearner", "saliency.score": "random"}, "saliency.fraction"),
        ({"num_train_epochs": 1}, "max_steps"),
        ({"method": "dpo"}, "mmunlearner"),
    ],
)
def test_impossible_combinations_are_refused(world, overrides: dict, mend: str) -> None:
    with pytest.raises(SettingsError) as caught:
        world.settings(Path("unused"), **overrides)
    assert mend in str(caught.value)
    assert "\n" not in str(caught.value)
