"""Steering acts on what looks like the forget set, holds the rest, keeps every weight, and survives a file."""

import json

import pytest
import torch

from fastvkd.cli import main
from fastvkd.data import mllmu
from fastvkd.data.wording import question_answer_pairs
from fastvkd.errors import ModelError, SettingsError
from fastvkd.models import steering as hooks
from fastvkd.models.answers import collate_answers
from fastvkd.models.loading import load_model, load_processor
from fastvkd.photos import decode_image
from fastvkd.unlearning import steering
from fastvkd.unlearning.answers import image_questions, read_answers


def test_the_gate_is_one_on_forget_and_zero_on_retained_states() -> None:
    generator = torch.Generator().manual_seed(0)
    forget = torch.randn(40, 6, generator=generator) + torch.tensor([4.0, 0, 0, 0, 0, 0])
    retain = torch.randn(300, 6, generator=generator)
    weight, bias = steering._gate(forget, [retain], 1e-6)
    # Weighted least squares with an intercept, solved another way.
    states = torch.cat([forget, retain]).double()
    scale = torch.cat([torch.full((40,), 1 / 40), torch.full((300,), 1 / 300)]).double().sqrt()[:, None]
    design = torch.cat([states, torch.ones(340, 1, dtype=torch.float64)], 1) * scale
    aim = torch.cat([torch.ones(40), torch.zeros(300)]).double()[:, None] * scale
    expected = torch.linalg.lstsq(design, aim).solution[:, 0]
    torch.testing.assert_close(torch.cat([weight, bias[None]]).double(), expected, rtol=1e-3, atol=1e-4)
    assert (forget @ weight + bias).mean() > 0.7
    assert (retain @ weight + bias).mean().abs() < 0.2


def test_steering_moves_answers_only_while_attached(world, tmp_path) -> None:
    model, processor = load_model(world.model), load_processor(world.model)
    forget, retain = (mllmu.read_split(world.data, split) for split in (world.forget_split, world.retain_split))
    vector = steering.fit(model, processor, forget, retain, layers=[1, 2], strength=8.0, questions=16)
    assert all(value.shape == (32,) for value in (*vector.directions.values(), *vector.weights.values()))
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def logits(profiles):
        photo = profiles[0].photos[0]
        image = decode_image(photo.data, photo.source)
        pairs = [(image, q, a) for q, a in question_answer_pairs(profiles[0].visual)[:6]]
        return read_answers(model, collate_answers(processor, pairs, range(6), [True] * 6)).logits.detach()

    plain = {"forget": logits(forget), "retain": logits(retain)}
    attached = hooks.attach(model, vector)
    assert all((logits(side) - plain[name]).norm() > 0 for name, side in (("forget", forget), ("retain", retain)))
    steered = logits(forget)
    for hook in attached:
        hook.remove()
    assert torch.equal(logits(forget), plain["forget"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    vector.save(tmp_path / "steering.safetensors")
    hooks.attach(model, hooks.load_steering(tmp_path / "steering.safetensors"))
    assert torch.equal(logits(forget), steered)


def test_the_gate_opens_for_forget_answers_and_closes_elsewhere(world) -> None:
    model, processor = load_model(world.model), load_processor(world.model)
    forget, retain = (mllmu.read_split(world.data, split) for split in (world.forget_split, world.retain_split))
    vector = steering.fit(model, processor, forget, retain, layers=[2], questions=128, ridge=1e-6)

    def gate(profiles, *, everywhere: bool) -> float:
        asked = steering._drawn(image_questions(profiles), 100, (1,))
        states = steering._hidden_states(model, processor, asked, [2], 16, everywhere=everywhere)[2]
        return float((states @ vector.weights[2] + vector.biases[2]).mean())

    opened, closed = gate(forget, everywhere=False), gate(retain, everywhere=False)
    assert opened > closed + 0.05  # a random model hardly tells people apart
    assert gate(retain, everywhere=True) < opened - 0.2


def test_wrong_layers_and_files_are_refused(world, tmp_path) -> None:
    model, processor = load_model(world.model), load_processor(world.model)
    forget, retain = (mllmu.read_split(world.data, split) for split in (world.forget_split, world.retain_split))
    with pytest.raises(SettingsError, match="0 to 2"):
        steering.fit(model, processor, forget, retain, layers=[3])
    (tmp_path / "x").write_text("nothing")
    with pytest.raises(ModelError, match="not a steering file"):
        hooks.load_steering(tmp_path / "x")
    one = {7: torch.zeros(32)}
    with pytest.raises(ModelError, match="layer 7"):
        hooks.attach(model, hooks.Steering(one, one, {7: torch.zeros(())}))


def test_a_direction_is_found_and_switched_on_from_the_command_line(world, tmp_path, capsys) -> None:
    sets = ["--data", str(world.data), "--forget-split", world.forget_split, "--retain-split", world.retain_split]
    sets += ["--model", str(world.model), "--device", "cpu"]
    file = tmp_path / "found" / "steering.safetensors"
    steer = ["steer", *sets, "--layers", "1", "2", "--strength", "50", "--questions", "16", "--out", str(file)]
    assert main(steer) == 0 and file.is_file()
    results = {}
    for name, options in (("plain", []), ("steered", ["--steering", str(file)]), ("again", [])):
        # one folder for all: finished cells of the plain model are not taken for those of the steered one
        assert main(["eval", *sets, "--max-samples", "24", *options, "--out", str(tmp_path / "eval")]) == 0
        results[name] = json.loads((tmp_path / "eval" / "results.json").read_text())
        results[f"{name} log"] = (tmp_path / "eval" / "samples.jsonl").read_text()
    assert results["plain"]["cells"] == results["again"]["cells"] and results["plain"]["steering"] is None
    assert results["steered"]["steering"] == str(file) and results["steered log"] != results["plain log"]
    attack = ["attack", *sets, "--kind", "reverse", "--max-samples", "8", "--out", str(tmp_path / "attack")]
    assert main([*attack, "--steering", str(file)]) in (0, 1)
    assert json.loads((tmp_path / "attack" / "certificate.json").read_text())["settings"] is None
    assert main([*steer, "--layers", "9"]) == 2 and "0 to 2" in capsys.readouterr().err
    assert main([*steer, "--questions", "0"]) == 2
