"""`fastvkd attack` on folders: every attack in one file, a certificate beside it, refusals in one line."""

import dataclasses
import json
import re
import weakref
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from fastvkd.attacks import run
from fastvkd.attacks.journal import Journal
from fastvkd.attacks.relearning import hold_out
from fastvkd.attacks.suite import KINDS, Attack, parse_kinds
from fastvkd.cli import main
from fastvkd.data import mllmu
from fastvkd.data.sources import evaluation_cells
from fastvkd.errors import DataError, SettingsError
from fastvkd.evaluation.inputs import PreparedPhotos
from fastvkd.models.loading import load_model, load_processor
from fastvkd.options import Budget
from fastvkd.reporting import relearning_parts, validate
from fastvkd.reporting.html import section
from fastvkd.reporting.report import certificate_summary
from fastvkd.reporting.sections import Page


def test_every_attack_and_the_certificate_of_a_run(world, tmp_path: Path, capsys, monkeypatch) -> None:
    thresholds = tmp_path / "run.yaml"
    thresholds.write_text("certificate: {probe_gap: 0.01, kept_text: null}\n")
    model = str(world.model)
    command = ["attack", "--model", model, "--before", model, "--gold", model, "--data", str(world.data)]
    command += ["--forget-split", world.forget_split, "--retain-split", world.retain_split, "--max-samples", "12"]
    command += ["--shares", "0.5", "--seeds", "3", "--steps", "0", "2", "--config", str(thresholds)]
    command += ["--variants", "noise", "public_tower", "--public", model, "--learning-rates", "1e-4"]
    command += ["--perturbations", "16", "--perturbation-steps", "2", "--micro-batch", "8"]
    code = main([*command, "--device", "cpu", "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "attacks.json").read_text())
    kinds = {row["kind"] for row in found["questions"]}
    assert kinds == {"plain", "paraphrase", "fewshot", "reverse", "images", "quantize"}
    for row in found["questions"]:
        cells = row["figures"]
        assert set(cells) == {"vanilla", "unlearned", "gold"} and cells["unlearned"]["n"] <= 12
        if row["kind"] != "quantize":  # bitsandbytes' sums may depend on memory alignment
            assert cells["vanilla"] == cells["unlearned"] == cells["gold"]  # one and the same model
        assert row.get("left_alone") == (["lm_head"] if row["kind"] == "quantize" else None)
    assert [(row["variant"], row["weights"], row["learning_rate"]) for row in found["relearning"]] == [
        (variant, weights, 1e-4) for variant in ("plain", "noise", "public_tower") for weights in ("visual", "all")
    ]
    assert all(set(row["curves"]) == {"vanilla", "unlearned", "gold"} for row in found["relearning"])
    assert [(row["on"], row["size"]) for row in found["perturbation"]] == [
        ("unseen", 0), ("unseen", 16), ("strangers", 0), ("strangers", 16)
    ]  # fmt: skip
    for row in found["perturbation"]:
        assert row["figures"]["vanilla"] == row["figures"]["gold"] and row["figures"]["unlearned"]["n"] <= 12
    assert all(row["auc"]["relearning_gap"] == pytest.approx(0, abs=1e-6) for row in found["relearning"])
    assert set(found["membership"]["unlearned"]) == {"pairs", "photos"}
    assert found["probe"]["sites"][0] == "vision:1" and found["probe"]["sites"][-1] == "llm:3"
    judged = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert judged == found["certificate"] and code == {"passed": 0, "failed": 1}[judged["verdict"]]
    assert judged["settings"] is None and judged["requests"] == []  # nobody knows how this model was made
    tried = {(one["variant"], one["learning_rate"]) for one in judged["relearning"]}
    assert tried == {("plain", 1e-4), ("noise", 1e-4), ("public_tower", 1e-4)}
    checks = {check["key"]: check for check in judged["checks"]}
    assert checks["perturbation_excess"]["figure"] is not None
    assert "kept_text" not in checks and checks["probe_gap"]["asked"] == "at most 0.01"
    assert checks["probe_gap"]["met"] and checks["language_model_unchanged"]["met"] and checks["kept_visual"]["met"]
    printed = capsys.readouterr().out
    assert (
        printed.count("not rounded: lm_head") == 2
        and "all 50% #3 0.0001 noise" in printed
        and "16/255, strangers" in printed
        and f"Certificate: {judged['verdict']}" in printed
    )
    for row in found["questions"]:
        assert row["variant"] in printed
    monkeypatch.setattr(run, "load_model", lambda *_, **__: pytest.fail("all figures are in attacks.jsonl"))
    assert main([*command, "--device", "cpu", "--out", str(tmp_path / "out")]) == code
    assert json.loads((tmp_path / "out" / "attacks.json").read_text()) == found

    kinds = ("questions", "membership", "probe", "perturbation")
    report = {"attacks": {key: found[key] for key in kinds}, "certificate": judged}
    report |= relearning_parts(found["relearning"])
    assert not [problem for problem in validate(report) if problem.startswith(("attacks", "certificate", "relearning"))]
    shown = ("questions", "membership", "probe", "perturbation", "relearning", "certificate")
    page = "".join(section(f"{name}.html", Page(report)) for name in shown)
    for row in found["questions"]:
        assert f"<td>{100 * row['figures']['gold']['accuracy']:.1f}<small>" in page
    assert page.count("<h2>") == 6 and "Public tower<small>all weights, learning rate 0.0001" in page
    assert "at most 16 of 255" in page and f"Certificate: {judged['verdict']}" in page


def test_a_certificate_says_of_which_requests_it_speaks(world, tmp_path: Path, capsys) -> None:
    """Of the new one; of an earlier one where its people are in the forget set that is named."""
    everybody = mllmu.read_split(world.data, "Full_Set")
    people = sorted({profile.entity for profile in everybody})
    now, earlier, both = people[:2], people[2:3], people[:3]
    for split, chosen in (("forget_1", earlier), ("forget_2", now), ("forget_both", both), ("retain_2", people[3:])):
        mllmu.write_split(tmp_path / "data", split, [one for one in everybody if one.entity in chosen])
    base = str(world.model)
    for number in (1, 2):
        told = [f"model_name_or_path={base}", f"data={tmp_path / 'data'}", f"output_dir={tmp_path / f'run-{number}'}"]
        told += [f"forget_split=forget_{number}", "retain_split=retain_2", "max_steps=1", "learning_rate=1e-4"]
        assert main(["train", *told, "per_device_train_batch_size=4", "device=cpu"]) == 0
        base = str(tmp_path / f"model-{number}")
        assert main(["export", "--run", str(tmp_path / f"run-{number}"), "--to", base]) == 0
    asked = ["--model", base, "--data", str(tmp_path / "data"), "--device", "cpu", "--max-samples", "4"]
    attack_it = ["attack", *asked, "--kind", "reverse", "--out", str(tmp_path / "out")]
    for more, first in (([], "not judged here"), (["--forget-split", "forget_both"], "judged")):
        capsys.readouterr()
        assert main([*attack_it, *more]) in (0, 1)
        judged = json.loads((tmp_path / "out" / "certificate.json").read_text())
        assert [one["request"] for one in judged["requests"]] == [1, 2]
        assert [one["judged"] for one in judged["requests"]] == [first == "judged", True]
        said = re.compile(rf"request 1 \(20..-..-.., 1 entity\) {first}; request 2 \(20..-..-.., 2 entities\) judged\.")
        assert said.search(capsys.readouterr().out)
        assert said.search((tmp_path / "model-2" / "README.md").read_text())
        assert main(["eval", *asked, *more, "--out", str(tmp_path / "eval")]) == 0
        assert said.search(capsys.readouterr().out)
        assert json.loads((tmp_path / "eval" / "results.json").read_text())["requests"] == judged["requests"]
        page = section("certificate.html", Page({"certificate": certificate_summary(judged)}))
        assert said.search(page) and not validate({"certificate": certificate_summary(judged)}, partial=True, cells=())
        if not more:  # a page takes its forget set from the run
            told = ["report", str(tmp_path / "out"), str(tmp_path / "eval"), "--out", str(tmp_path / "page.html")]
            assert main(told) == 0 and said.search((tmp_path / "page.html").read_text())


def test_a_certificate_states_the_settings_of_the_run_that_was_exported(world, tmp_path: Path) -> None:
    train = ["train", f"model_name_or_path={world.model}", f"data={world.data}", f"output_dir={tmp_path / 'run'}"]
    train += [f"forget_split={world.forget_split}", f"retain_split={world.retain_split}", "max_steps=1"]
    train += ["learning_rate=1.25e-4", "certificate.probe_gap=0.07", "certificate.chance_band=null"]
    assert main([*train, "per_device_train_batch_size=4", "device=cpu"]) == 0
    assert main(["export", "--run", str(tmp_path / "run"), "--to", str(tmp_path / "merged")]) == 0
    attack_it = ["attack", "--model", str(tmp_path / "merged"), "--data", str(world.data), "--device", "cpu"]
    attack_it += ["--kind", "reverse", "--max-samples", "8", "--out", str(tmp_path / "out")]
    assert main(attack_it) in (0, 1)
    judged = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert judged["settings"]["learning_rate"] == 1.25e-4 and judged["settings"]["forget_split"] == world.forget_split
    assert judged["settings"]["model_name_or_path"] == str(world.model)
    assert judged["thresholds"]["probe_gap"] == 0.07 and "forget" not in {check["key"] for check in judged["checks"]}
    assert json.loads((tmp_path / "merged" / "certificate.json").read_text()) == judged
    assert main(attack_it) in (0, 1)  # a second one takes the first one's place
    card = (tmp_path / "merged" / "README.md").read_text()
    assert card.count(f"\n## Certificate: {judged['verdict']}\n") == 1 and card.count("\n## Settings\n") == 1
    assert "Nobody has evaluated" not in card and "| Answers in reverse, above chance | at most 0.15 |" in card
    asked = ["eval", "--model", str(tmp_path / "merged"), "--data", str(world.data), "--device", "cpu"]
    assert main([*asked, "--max-samples", "4", "--out", str(tmp_path / "eval")]) == 0
    assert json.loads((tmp_path / "eval" / "results.json").read_text())["forget_split"] == world.forget_split
    (tmp_path / "merged" / "unlearning.json").write_text("[]")
    assert main(attack_it) == 2


def test_what_cannot_be_attacked_is_refused_in_one_line(world, tmp_path: Path, capsys) -> None:
    command = ["attack", "--model", str(world.model), "--data", str(world.data), "--out", str(tmp_path)]
    command += ["--forget-split", world.forget_split, "--retain-split", world.retain_split]
    assert main([*command, "--kind", "relearning"]) == 2
    assert "allowed are relearn, paraphrase" in capsys.readouterr().err
    assert main([*command, "--shares", "1.5", "--kind", "relearn"]) == 2
    assert "shares" in capsys.readouterr().err
    cells = evaluation_cells(str(world.data), world.forget_split, world.retain_split)
    models, processor = {"unlearned": lambda: load_model(world.model)}, load_processor(world.model)
    photos = PreparedPhotos(processor)
    single = [dataclasses.replace(profile, photos=profile.photos[:1]) for profile in cells["forget"]]
    single = list({profile.entity: profile for profile in single}.values())
    with pytest.raises(DataError, match="unseen photos"):
        Attack(models, processor, {**cells, "forget": single, "test": []}, photos).run(["relearn"])
    alone = [profile for profile in cells["forget"] if profile.entity == cells["forget"][0].entity]
    with pytest.raises(DataError, match="two forgotten entities"):
        Attack(models, processor, {**cells, "forget": alone, "test": []}, photos).run(["probe"])


def test_without_unseen_photos_the_other_attacks_still_run(world) -> None:
    cells = evaluation_cells(str(world.data), world.forget_split, world.retain_split)
    models, processor = {"unlearned": lambda: load_model(world.model)}, load_processor(world.model)
    attack = Attack(models, processor, {**cells, "test": []}, PreparedPhotos(processor), Budget(max_samples=8))
    found = attack.run(["reverse", "membership", "probe"])
    assert [row["kind"] for row in found["questions"]] == ["plain", "reverse"]
    assert set(found["membership"]["unlearned"]) == {"pairs"}
    budget = Budget(
        max_samples=8,
        relearning_shares=(1.0,),
        relearning_steps=(0, 1),
        relearning_seeds=(0,),
        relearning_variants=(),
        learning_rates=(1e-3,),
        perturbations=(8,),
        perturbation_steps=1,
    )
    found = dataclasses.replace(attack, budget=budget).run(["relearn", "perturb"])
    assert {row["on"] for row in found["perturbation"]} == {"unseen", "strangers"}
    photos = sum(len(profile.photos) for profile in cells["forget"])
    assert found["relearning"][0]["judged_on"] == "held out" and found["relearning"][0]["photos"] < photos
    one_each = list({p.entity: dataclasses.replace(p, photos=p.photos[:1]) for p in cells["forget"]}.values())
    single = {**cells, "forget": one_each, "test": []}
    found = dataclasses.replace(attack, cells=single, budget=Budget(max_samples=4)).run()
    assert not {"relearning", "probe", "perturbation"} & set(found)
    assert found["questions"] and found["membership"]


class Loaders:
    """Loaders of models, which note who was loaded, and refuse where another one is still there."""

    def __init__(self, world) -> None:
        self.world, self.names, self._alive = world, [], []

    def of(self, *names: str) -> dict:
        return {name: partial(self._load, name) for name in names}

    def _load(self, name: str):
        assert not [model for model in self._alive if model() is not None], "another model is still loaded"
        model = load_model(self.world.model)
        self._alive.append(weakref.ref(model))
        self.names.append(name)
        return model


SMALL = Budget(
    max_samples=4,
    relearning_shares=(0.5,),
    relearning_seeds=(0,),
    relearning_steps=(0, 1),
    relearning_variants=("noise",),
    relearning_weights=("visual",),
    relearning_samples=4,
    relearning_retained=4,
    learning_rates=(1e-3,),
)


@pytest.fixture(scope="module")
def asking(world) -> tuple:
    cells = evaluation_cells(str(world.data), world.forget_split, world.retain_split)
    processor = load_processor(world.model)
    return processor, cells, PreparedPhotos(processor), SMALL


def test_one_model_is_loaded_at_a_time_and_none_where_all_is_found(world, asking, tmp_path: Path) -> None:
    loaders, file = Loaders(world), tmp_path / "attacks.jsonl"
    models = loaders.of("vanilla", "unlearned", "gold")
    kinds = ["relearn", "reverse", "quantize"]
    found = Attack(models, *asking, journal=Journal(file)).run(kinds)
    assert loaders.names == ["vanilla", "unlearned", "gold"]
    assert all(set(row["figures"]) == set(models) for row in found["questions"])
    assert Attack(models, *asking, journal=Journal(file)).run(kinds) == found
    assert len(loaders.names) == 3


def test_an_interrupted_attack_goes_on_where_it_stopped(world, asking, tmp_path: Path) -> None:
    def stop(done: int, total: int, what: str) -> None:
        if what.startswith("unlearned relearn 0.5 noise"):
            raise KeyboardInterrupt

    def attack(**how) -> dict:
        return Attack(models, *asking[:3], **{"budget": SMALL, "journal": Journal(file)} | how).run(kinds)

    loaders, file, kinds = Loaders(world), tmp_path / "attacks.jsonl", ["relearn", "reverse"]
    models = loaders.of("unlearned")
    with pytest.raises(KeyboardInterrupt):
        attack(progress=stop)
    kept = file.read_text()
    assert [json.loads(line)["kind"] for line in kept.splitlines()] == [
        *("plain", "reverse", "condition", "retained", "relearn"),
    ]
    file.write_text(kept + kept[:100])  # the machine went down in the middle of a line
    found = attack()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["kind"], line.get("variant")) for line in lines[5:]] == [("relearn", "noise")]
    assert file.read_text().startswith(kept)
    assert found == attack(journal=Journal())
    # Less memory is the same attack; another seed, model or rate is not.
    loaders.names.clear()
    attack(budget=dataclasses.replace(SMALL, micro_batch=4, gradient_checkpointing=True))
    assert not loaders.names
    for how, measured in (
        ({"seed": 1}, 2),  # the questions; relearning has seeds of its own
        ({"identities": {"unlearned": "another"}}, 6),
        ({"budget": dataclasses.replace(SMALL, learning_rates=(1e-3, 1e-4))}, 2),
    ):
        before = len(file.read_text().splitlines())
        attack(**how)
        assert len(file.read_text().splitlines()) == before + measured


def test_a_journal_is_of_its_models_and_data_alone(tmp_path: Path) -> None:
    asked = []

    def measure(value: float) -> float:
        asked.append(value)
        return value

    file = tmp_path / "new" / "figures.jsonl"
    first = Journal(file, {"data": 1})
    assert [first.kept({"model": "a"}, lambda: measure(1.0)) for _ in range(2)] == [1.0, 1.0]
    assert Journal(file, {"data": 1}).kept({"model": "a"}, lambda: measure(2.0)) == 1.0
    assert Journal(file, {"data": 2}).kept({"model": "a"}, lambda: measure(3.0)) == 3.0
    assert Journal(file, {"data": 1}).kept({"model": "b"}, lambda: measure(4.0)) == 4.0
    assert Journal(None, {"data": 1}).kept({"model": "a"}, lambda: measure(5.0)) == 5.0
    assert asked == [1.0, 3.0, 4.0, 5.0] and len(file.read_text().splitlines()) == 3
    assert Journal(file, {"data": 1}).kept({"model": "a"}, lambda: measure(6.0)) == 1.0  # nothing was overwritten


def test_held_out_photos_are_a_third_of_every_entity(world) -> None:
    profiles = evaluation_cells(str(world.data), world.forget_split, world.retain_split)["forget"]
    photo = profiles[0].photos[0]
    two = [dataclasses.replace(profiles[0], entity=name, photos=(photo,) * n) for name, n in [("a", 5), ("b", 1)]]
    known, judged = hold_out([*two, dataclasses.replace(two[0], photos=(photo,) * 2)])
    assert [(p.entity, len(p.photos)) for p in known] == [("a", 3), ("b", 1), ("a", 2)]
    assert [(p.entity, len(p.photos)) for p in judged] == [("a", 2)]


def test_kinds_are_named_once_and_run_in_order() -> None:
    assert parse_kinds(["all"]) == list(KINDS)
    assert parse_kinds(["probe", "relearn", "probe"]) == ["relearn", "probe"]
    with pytest.raises(SettingsError, match="allowed are"):
        parse_kinds(["reverse", "shots"])


def test_what_was_rounded_is_stated_and_not_mixed_with_what_was_not(world, tmp_path: Path, capsys) -> None:
    for side, colours in (("forget", ("red", "green")), ("retain", ("blue", "white")), ("test", ("darkred", "lime"))):
        rows = []
        for entity, colour in enumerate(colours):
            Image.new("RGB", (24, 24), colour).save(tmp_path / f"{colour}.png")
            row = {"image": f"{colour}.png", "entity": f"{'kept' if side == 'retain' else 'gone'} {entity}"}
            rows.append(row | {"question": "What is it?", "answer": "one", "options": ["one", "two"]})
        (tmp_path / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = ["--data", str(tmp_path), "--device", "cpu"]
    attack_it = ["attack", "--model", str(world.model), *shared, "--quantize", "nf4", "--out", str(tmp_path / "attack")]
    few = ["--shares", "1", "--seeds", "0", "--steps", "1", "--variants", "noise"]
    assert main([*attack_it, "--kind", "images", "relearn", *few]) in (0, 1)
    loading = {"dtype": "float32", "quantize": "nf4", "device_map": "none"}
    found = json.loads((tmp_path / "attack" / "attacks.json").read_text())
    judged = json.loads((tmp_path / "attack" / "certificate.json").read_text())
    assert found["loading"] == judged["loading"] == loading
    assert found["relearning"] and {row["kind"] for row in found["questions"]} == {"plain", "images"}
    assert main([*attack_it, "--kind", "quantize"]) == 2  # what is rounded already shows nothing of that attack
    assert "quantize: the LLM is loaded in nf4 already" in capsys.readouterr().err
    results = {}
    for kind in ("nf4", "none"):
        out = tmp_path / kind
        assert main(["eval", "--model", str(world.model), *shared, "--quantize", kind, "--out", str(out)]) == 0
        results[kind] = json.loads((out / "results.json").read_text())
    assert results["nf4"]["loading"] == loading and results["none"]["loading"] == loading | {"quantize": "none"}
    capsys.readouterr()
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "attack"), str(tmp_path / "nf4"), "--out", str(page)]) == 0
    text = page.read_text()
    assert "weights of their LLM rounded to nf4" in text and "judged with their LLM rounded to nf4" in text
    assert main(["report", str(tmp_path / "attack"), str(tmp_path / "none"), "--out", str(page)]) == 2
    assert "how the LLM was quantised is none, but nf4" in capsys.readouterr().err
