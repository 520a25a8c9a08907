"""CLEAR and UMU-Bench from folder to figures: every metric against a naive computation, the two modes against
docs/evaluation.md, and the commands `eval` and `compare`."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from published_folders import clear_folder, umu_folder
from rouge_score.rouge_scorer import RougeScorer
from scipy.spatial.distance import jensenshannon

from fastvkd.cli import main
from fastvkd.data import jsonl
from fastvkd.data.sources import evaluation_cells
from fastvkd.errors import DataError, SettingsError
from fastvkd.evaluation import benchmarks, protocol
from fastvkd.evaluation.comparison import comparison_table, read_runs
from fastvkd.evaluation.divergence import jensen_shannon, option_divergence, scored_choices
from fastvkd.evaluation.modality_pairs import joint_figures
from fastvkd.evaluation.protocol import evaluate_cells
from fastvkd.evaluation.run import answers_fingerprint, evaluate
from fastvkd.evaluation.truth_ratio import forget_quality, log_truth_ratios, model_utility, probability, truth_score
from fastvkd.models.placement import Loading
from fastvkd.models.prompts import chat_prompt
from fastvkd.options import EvalOptions
from fastvkd.photos import decode_image
from fastvkd.records import Choice


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    return {"clear": clear_folder(root / "clear"), "umu": umu_folder(root / "umu")}


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    """A random model hardly ever ends an answer by itself."""

    def shortened(rules: benchmarks.Rules) -> benchmarks.Rules:
        letters = rules.letters and dataclasses.replace(rules.letters, max_new_tokens=3)
        return dataclasses.replace(rules, max_new_tokens=6, letters=letters)

    short = {
        name: {mode: shortened(rules) for mode, rules in modes.items()} for name, modes in benchmarks.BENCHMARKS.items()
    }
    monkeypatch.setattr(protocol, "BENCHMARKS", short)


def cells_of(folders, benchmark):
    return evaluation_cells(str(folders[benchmark]), "forget_5", "retain_95")


def run(tiny, cells, benchmark, **options):
    samples: list[dict] = []
    figures = evaluate_cells(
        tiny.model,
        tiny.processor,
        cells,
        **{"batch_size": 8, "seed": 0, "benchmark": benchmark, "collect": samples, **options},
    )
    return figures, samples


def naive_loss(tiny, profile, question, answer):
    """Mean negative log-likelihood of the answer's tokens, alone in a batch, in float64."""
    prompt = chat_prompt(tiny.processor, question, image=bool(profile.photos))
    images = [decode_image(photo.data, "-") for photo in profile.photos] or None
    before = tiny.processor(text=[prompt], images=images, return_tensors="pt")["input_ids"].shape[1]
    inputs = tiny.processor(text=[f"{prompt} {answer}"], images=images, return_tensors="pt")
    with torch.inference_mode():
        logits = tiny.model(**inputs).logits[0].double()
    ids = inputs["input_ids"][0]
    found = [-logits[place - 1].log_softmax(-1)[ids[place]] for place in range(before, len(ids))]
    return float(torch.stack(found).mean())


@pytest.mark.parametrize("mode", ["corrected", "paper"])
def test_prob_rouge_and_truth_ratio_of_clear_against_naive_ones(tiny, folders, mode):
    cells = cells_of(folders, "clear")
    figures, samples = run(tiny, cells, "clear", mode=mode)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    for cell, profiles in cells.items():
        asked = [(profile, truth) for profile in profiles for truth in profile.visual.truth]
        true = [naive_loss(tiny, one, q.question, q.answer) for one, q in asked]
        paraphrase = [naive_loss(tiny, one, q.question, q.paraphrase) for one, q in asked]
        wrong = [[naive_loss(tiny, one, q.question, text) for text in q.perturbed] for one, q in asked]
        logged = [s for s in samples if s["cell"] == cell and s["task"] == "truth"]
        np.testing.assert_allclose([s["loss"] for s in logged], true, atol=1e-4)
        np.testing.assert_allclose([s["paraphrase_loss"] for s in logged], paraphrase, atol=1e-4)
        np.testing.assert_allclose([s["perturbed_losses"] for s in logged], wrong, atol=1e-4)
        everything = [loss for losses in wrong for loss in losses]
        probs, scores = [], []
        for one, para, others in zip(true, paraphrase, wrong, strict=True):
            prob = np.e**-one
            probs.append(
                prob if cell in ("forget", "retain") else prob / (prob + sum(np.e**-other for other in others))
            )
            pool = everything if mode == "paper" else others
            ratio = np.e ** (sum(pool) / len(pool) - para)
            scores.append(min(ratio, 1 / ratio) if "forget" in cell else max(0, 1 - 1 / ratio))
        found = figures[cell]["vqa"]
        assert found["prob"] == pytest.approx(np.mean(probs), abs=1e-4)
        assert found["truth_ratio"] == pytest.approx(np.mean(scores), abs=1e-3)
        assert found["n_truth"] == len(asked) and found["prob_ci95"][0] <= found["prob"] <= found["prob_ci95"][1]
        texts = [s for s in samples if (s["cell"], s["kind"], s["task"]) == (cell, "vqa", "generation")]
        recalls = [scorer.score(s["answer"], s["output"])["rougeL"].recall for s in texts]
        assert found["rouge_l_recall"] == pytest.approx(np.mean(recalls))
    assert figures["forget"]["qa"]["n_generation"] == 1 and "prob" not in figures["forget"]["qa"]


def test_the_paper_ratio_of_a_sample_depends_on_the_others():
    paraphrase, wrong = [1.0, 2.0], [[1.0, 3.0], [5.0, 7.0]]
    np.testing.assert_allclose(log_truth_ratios(paraphrase, wrong, "corrected"), [1.0, 4.0])
    np.testing.assert_allclose(log_truth_ratios(paraphrase, wrong, "paper"), [3.0, 2.0])
    for ratio, cell, score in ((4, "forget_faces", 0.25), (0.25, "forget", 0.25), (4, "retain", 0.75)):
        assert truth_score(np.log(ratio), cell) == pytest.approx(score)
    assert truth_score(np.log(0.25), "real_faces") == 0.0
    assert probability(np.log(2), [np.log(4), np.log(4)], "real_world") == pytest.approx(0.5)
    assert probability(np.log(2), [np.log(4)], "forget") == pytest.approx(0.5)
    # losses of a model that was ascended to pieces
    assert (
        probability(5000.0, [5000.0], "real_world") == pytest.approx(0.5) and probability(5000.0, [], "retain") == 0.0
    )
    assert (
        truth_score(-5000.0, "retain") == truth_score(-5000.0, "forget") == 0.0 and truth_score(5000.0, "retain") == 1.0
    )


def test_model_utility_is_the_harmonic_mean_of_twelve(tiny, folders):
    figures, _ = run(tiny, cells_of(folders, "clear"), "clear")
    for cell in ("real_faces", "real_world", "retain", "retain_faces"):
        figures[cell]["vqa"] |= {"prob": 0.5, "rouge_l_recall": 0.25, "truth_ratio": 1.0}
    assert model_utility(figures)["model_utility"] == pytest.approx(12 / (4 * (2 + 4 + 1)))
    figures["retain"]["vqa"]["truth_ratio"] = 0.0
    assert model_utility(figures)["model_utility"] == 0.0
    del figures["real_world"]
    found = model_utility(figures)
    assert found["model_utility"] is None
    assert found["utility_missing"] == ["real_world prob", "real_world rouge_l_recall", "real_world truth_ratio"]


def test_forget_quality_is_a_ks_test_of_the_ratios():
    generator = np.random.default_rng(0)

    def samples(shift):
        return [
            {"paraphrase_loss": float(loss), "perturbed_losses": [float(loss) + shift + noise, float(loss) + shift]}
            for loss, noise in generator.normal(2, 1, (60, 2))
        ]

    one, other = samples(0.0), samples(0.5)
    ratios = [[np.exp(np.mean(s["perturbed_losses"]) - s["paraphrase_loss"]) for s in part] for part in (one, other)]
    largest = max(
        abs(np.mean(np.array(ratios[0]) <= x) - np.mean(np.array(ratios[1]) <= x)) for x in ratios[0] + ratios[1]
    )
    found = forget_quality(one, other, "corrected")
    assert found["forget_quality_ks"] == pytest.approx(largest) and found["forget_quality"] < 0.01
    assert forget_quality(one, one, "corrected") == {"forget_quality": 1.0, "forget_quality_ks": 0.0}


def test_rows_without_wrong_answers_have_no_truth_ratio(tiny, folders):
    cells = cells_of(folders, "clear")
    first, *others = cells["retain"]
    bare = tuple(dataclasses.replace(question, perturbed=()) for question in first.visual.truth)
    first = dataclasses.replace(first, visual=dataclasses.replace(first.visual, truth=bare))
    for mode in ("corrected", "paper"):
        found, _ = run(tiny, cells | {"retain": [first, *others]}, "clear", mode=mode, tasks=["truth"])
        expected, _ = run(tiny, cells | {"retain": others}, "clear", mode=mode, tasks=["truth"])
        assert found == expected and found["retain"]["vqa"]["n_truth"] == 1
    alone, _ = run(tiny, {"retain": [first]}, "clear", tasks=["truth"])
    assert "truth_ratio" not in alone["retain"]["vqa"]


def test_divergence_of_the_choices_against_a_naive_one(tiny, folders):
    _, mine = run(tiny, cells_of(folders, "umu"), "umu", tasks=["choice"])
    generator = np.random.default_rng(2)
    gold = json.loads(json.dumps(mine))
    for sample in gold:
        sample["log_likelihood"] = {k: float(generator.normal(-9, 4)) for k in sample["log_likelihood"]}
    found = option_divergence(scored_choices(mine), scored_choices(gold), seed=0)
    assert list(found) == ["forget", "retain", "realworld"]
    for cell, figures in found.items():
        for kind in ("vqa", "qa"):
            distances = []
            for one, other in zip(mine, gold, strict=True):
                if (one["cell"], one["kind"]) == (cell, kind):
                    parts = [[np.exp(s["log_likelihood"][k] / s["tokens"][k]) for k in "ABCD"] for s in (one, other)]
                    distances.append(jensenshannon(*parts, base=2) ** 2)  # which normalises them
            assert figures[f"js_{kind}"] == pytest.approx(np.mean(distances))
            low, high = figures[f"js_{kind}_ci95"]
            assert 0 <= low <= figures[f"js_{kind}"] <= high <= 1
    same = option_divergence(scored_choices(mine), scored_choices(mine), seed=0)
    assert all(value == 0 for figures in same.values() for key, value in figures.items() if "ci95" not in key)
    assert jensen_shannon(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == pytest.approx(1.0)
    paper = [{"cell": "forget", "kind": "vqa", "task": "choice", "output": "A"}]
    assert scored_choices(paper) == {} and option_divergence({}, scored_choices(mine), seed=0) == {}


def test_joint_figures_of_umu_against_naive_ones(tiny, folders):
    _, samples = run(tiny, cells_of(folders, "umu"), "umu")
    generator = np.random.default_rng(1)
    for sample in samples:  # a random model is always wrong: draw what a real one could score
        if sample["task"] == "generation":
            sample["rouge_l"] = float(generator.choice([0.0, 0.3, 0.8]))
        else:
            sample["correct"] = bool(generator.integers(2))
    figures = joint_figures(samples, seed=0)
    assert list(figures) == ["forget", "retain", "realworld"]
    for cell, found in figures.items():
        for task in ("choice", "cloze", "generation"):
            u, m = (
                {
                    (s["entity"], s["pair"]): s["rouge_l"] if task == "generation" else s["correct"]
                    for s in samples
                    if (s["cell"], s["task"], s["kind"]) == (cell, task, kind)
                }
                for kind in ("qa", "vqa")
            )
            assert u.keys() == m.keys() and len(u) == found["n_pairs"][task] == (4 if cell == "retain" else 2)
            if task == "generation":
                forgotten = kept = 0.0
                for key, b in u.items():
                    a = m[key]
                    if a + b > 0:
                        forgotten += (a**2 + b**2) / (a + b)
                        kept += 2 * a * b / (a + b)
                assert found["rl_f"] == pytest.approx(forgotten / len(u))
                assert found["rl_r"] == pytest.approx(kept / len(u))
            else:
                both = sum(u[key] and m[key] for key in u)
                neither = sum(not u[key] and not m[key] for key in u)
                assert found[f"{task}_acc_r"] == both / len(u) and found[f"{task}_acc_f"] == neither / len(u)
                low, high = found[f"{task}_acc_r_ci95"]
                assert low <= found[f"{task}_acc_r"] <= high
    alone = [s for s in samples if s["kind"] == "vqa"]
    assert joint_figures(alone, seed=0)["forget"]["rl_f"] is None


def test_of_pairs_both_forms_are_drawn(tiny, folders):
    cells = cells_of(folders, "umu")
    for seed in range(3):
        figures, samples = run(tiny, cells, "umu", max_samples=3, seed=seed, tasks=["choice"])
        assert figures["retain"]["vqa"]["n"] == figures["retain"]["qa"]["n"] == 3
        assert joint_figures(samples, seed)["retain"]["n_pairs"]["choice"] == 3


def test_paper_prompts_and_readings(tiny, folders):
    clear, umu = (benchmarks.BENCHMARKS[name]["paper"].letters for name in ("clear", "umu"))
    choice = Choice("Who?", {"A": "Ann Ash", "B": "Bob Oak"}, "B")
    photos = cells_of(folders, "umu")["forget"][0].photos
    prompt = clear.query(tiny.processor, choice, photos, None).prompt
    assert prompt == "USER: <image>\nWho?\nA. Ann Ash\nB. Bob Oak\n ASSISTANT:"
    assert [clear.read(text, choice, "forget") for text in (" (b) Bob", "**A**", "C", "")] == [
        "B",
        "A",
        None,
        None,
    ]
    prompt = umu.query(tiny.processor, choice, photos, None).prompt
    assert prompt == "USER: <image>\nWho?\nSelect answer in ['Ann Ash', 'Bob Oak']\nASSISTANT:"
    prompt = umu.query(tiny.processor, choice, (), None).prompt
    assert prompt == "USER:\nWho?\nSelect answer in ['Ann Ash', 'Bob Oak']\nASSISTANT:"
    for text, exact, nearest in (("Bob Oak ", "B", "B"), ("bob oak!", None, "B"), ("Ann", None, "A")):
        assert umu.read(text, choice, "forget") == umu.read(text, choice, "retain") == exact
        assert umu.read(text, choice, "realworld") == nearest
    cloze_correct = benchmarks.BENCHMARKS["umu"]["paper"].cloze_correct
    assert cloze_correct("J. Smith", "so j it is") and not cloze_correct("J. Smith", "Smith")


def documented_differences() -> set[tuple[str, str]]:
    """(benchmark, task) of the table in docs/evaluation.md that says where the modes differ."""
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    section = text.split("### Two modes")[1].split("**Score of an option**")[0]
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| `(\w+)` \|", section, re.MULTILINE)
    return {(name, task) for names, task in rows for name in re.findall(r"\w+", names)}


@pytest.mark.parametrize("benchmark", ["mllmu", "clear", "umu"])
def test_the_modes_differ_only_where_the_documentation_says(tiny, folders, people, benchmark):
    cells = {"forget": people[:3], "retain": people[3:]} if benchmark == "mllmu" else cells_of(folders, benchmark)
    (figures, corrected), (paper_figures, paper) = (run(tiny, cells, benchmark, mode=m) for m in ("corrected", "paper"))
    if benchmark == "mllmu":  # the demonstration is not asked: one question of each cell and kind
        asked = {(s["cell"], s["kind"], s["task"], s["source"], s["question"]) for s in paper}
        left = [s for s in corrected if (s["cell"], s["kind"], s["task"], s["source"], s["question"]) not in asked]
        assert [(s["cell"], s["kind"], s["task"]) for s in left] == [
            (cell, kind, "choice") for cell in cells for kind in ("vqa", "qa")
        ]
        corrected = [s for s in corrected if s not in left]
    differing, ratio = set(), {"log_truth_ratio": 0, "truth_score": 0}
    for one, other in zip(corrected, paper, strict=True):
        for key in ("cell", "kind", "task", "entity", "source", "question", "answer", "options", "pair"):
            assert one.get(key) == other.get(key)
        if one != other:
            differing.add((benchmark, one["task"]))
        if one["task"] == "truth":
            assert one | ratio == other | ratio
    assert differing == {pair for pair in documented_differences() if pair[0] == benchmark}
    for cell in cells:
        for kind in ("vqa", "qa"):
            ours = {"answer_prob", "answer_prob_ci95"}  # of options, which only the corrected mode scores
            assert figures[cell][kind].keys() - ours == paper_figures[cell][kind].keys()


def test_the_documentation_lists_own_data_as_mllmu_bench():
    assert {task for name, task in documented_differences() if name == "jsonl"} == {
        task for name, task in documented_differences() if name == "mllmu"
    }
    assert benchmarks.BENCHMARKS["jsonl"] is benchmarks.BENCHMARKS["mllmu"]


@pytest.mark.parametrize(("benchmark", "mode"), [("clear", "corrected"), ("umu", "paper")])
def test_batches_say_what_single_questions_do_and_tick_one_by_one(tiny, folders, benchmark, mode):
    cells = cells_of(folders, benchmark)
    ticks: list[tuple] = []
    _, batched = run(tiny, cells, benchmark, mode=mode, batch_size=8, fast=False)
    _, single = run(
        tiny, cells, benchmark, mode=mode, batch_size=1, fast=False, progress=lambda *tick: ticks.append(tick)
    )
    for one, other in zip(batched, single, strict=True):
        assert {key: one.get(key) for key in ("output", "prediction", "correct")} == {
            key: other.get(key) for key in ("output", "prediction", "correct")
        }
        if one["task"] == "truth":
            np.testing.assert_allclose(one["perturbed_losses"], other["perturbed_losses"], atol=1e-4)
    done, totals, _ = zip(*ticks, strict=True)
    assert list(done) == sorted(done) and set(totals) == {len(single)} and set(done) >= set(range(1, len(single) + 1))


@pytest.fixture(scope="module")
def model_folder(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.model.save_pretrained(folder)
    tiny.processor.save_pretrained(folder)
    return folder


def test_eval_of_clear_with_a_reference_then_again_then_compared(model_folder, folders, tmp_path, capsys):
    arguments = ["eval", "--model", str(model_folder), "--data", str(folders["clear"]), "--device", "cpu"]
    gold, run_folder = tmp_path / "gold", tmp_path / "run"
    assert main([*arguments, "--out", str(gold)]) == 0
    again = [*arguments, "--out", str(run_folder), "--benchmark", "clear", "--reference-eval", str(gold)]
    assert main(again) == 0
    results = json.loads((run_folder / "results.json").read_text())
    assert results["benchmark"] == "clear" and results["mode"] == "corrected"
    assert results["summary"]["forget_quality"] == 1.0  # the same model
    same = {"answer_ks_vqa": 0.0, "answer_js_vqa": 0.0}
    assert results["summary"]["forget"] == {"js_vqa": 0.0, "js_vqa_ci95": [0.0, 0.0], **same}
    assert results["cells"] == json.loads((gold / "results.json").read_text())["cells"]
    assert "utility_missing" in results["summary"] and results["summary"]["utility_missing"] == []
    capsys.readouterr()
    assert main(again) == 0
    kept = capsys.readouterr()
    assert results == json.loads((run_folder / "results.json").read_text())
    assert "forget_quality" in kept.out and "real_faces js_vqa" in kept.out
    assert main(["compare", str(gold), str(run_folder), "--format", "latex"]) == 0
    assert r"\begin{tabular}{lrr}" in capsys.readouterr().out


def test_eval_refuses_what_does_not_fit(model_folder, folders, tmp_path):
    def run(data: str, **options):
        return evaluate(EvalOptions(model=str(model_folder), data=str(folders[data]), out=tmp_path / "out", **options))

    with pytest.raises(SettingsError, match="holds UMU-Bench"):
        run("umu", benchmark="clear")
    with pytest.raises(SettingsError, match="umu in paper mode has no likelihoods"):
        run("umu", reference_eval=tmp_path, mode="paper")
    for options in ({"max_samples": 0}, {"max_samples": -1}, {"batch_size": 0}):
        ((name, value),) = options.items()
        with pytest.raises(SettingsError, match=f"{name}={value}: at least 1 is needed"):
            EvalOptions(model="no model is opened", data="nor data", **options)
    with pytest.raises(DataError, match=r"reference_eval: .*samples\.jsonl: cannot be read"):
        run("clear", reference_eval=tmp_path)
    (tmp_path / "samples.jsonl").write_text('{"cell": "forget", "task": "choice"}\n')
    with pytest.raises(DataError, match="holds no truth ratios"):
        run("clear", reference_eval=tmp_path)
    with pytest.raises(DataError, match="holds no likelihoods of options"):
        run("umu", reference_eval=tmp_path)
    line = {"cell": "forget", "task": "truth", "entity": "Zoe", "question": "Who?", "answer": "Zoe."}
    (tmp_path / "samples.jsonl").write_text(json.dumps(line))
    with pytest.raises(DataError, match="of other samples"):
        run("clear", reference_eval=tmp_path, device="cpu")
    with pytest.raises(SettingsError, match="mode='papre': allowed are corrected, paper"):
        run("clear", mode="papre")


def test_eval_of_umu_has_joint_figures_and_resumes_with_them(model_folder, folders, tmp_path, monkeypatch):
    options = EvalOptions(model=str(model_folder), data=str(folders["umu"]), out=tmp_path, device="cpu")
    first = evaluate(options)
    assert set(first["summary"]) == {"forget", "retain", "realworld"}
    assert first["summary"]["retain"]["n_pairs"] == {"choice": 4, "cloze": 4, "generation": 4}
    assert json.loads((tmp_path / "results.json").read_text()) == first
    monkeypatch.setattr(protocol._Runner, "run", lambda *_: pytest.fail("a finished cell was computed again"))
    assert evaluate(options) == first


def test_eval_of_umu_with_a_reference_measures_the_distance_from_it(model_folder, folders, tmp_path):
    def once(out, **options):
        told = {"model": str(model_folder), "data": str(folders["umu"]), "out": tmp_path / out, "device": "cpu"}
        return evaluate(EvalOptions(**told, **options))

    once("gold")
    summary = once("run", reference_eval=tmp_path / "gold")["summary"]
    assert summary["retain"]["js_vqa"] == summary["retain"]["js_qa"] == 0.0 and "choice_acc_r" in summary["retain"]
    with pytest.raises(DataError, match="of other samples"):
        once("few", reference_eval=tmp_path / "gold", max_samples=1)


def test_a_finished_cell_is_of_one_dtype_and_one_processor(model_folder, folders, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    ran: list[str] = []
    original = protocol._Runner.run

    def counted(self, task, *rest):
        ran.append(task)
        return original(self, task, *rest)

    monkeypatch.setattr(protocol._Runner, "run", counted)

    def tasks_run(**options):
        ran.clear()
        told = {"model": str(folder), "data": str(folders["umu"]), "out": tmp_path, "device": "cpu"}
        evaluate(EvalOptions(**told, max_samples=1, **options))
        return len(ran)

    whole = tasks_run()
    assert whole > 0 and tasks_run() == 0
    assert tasks_run(bf16=True) == whole and tasks_run(bf16=True) == 0
    for name in ("tokenizer_config.json", "processor_config.json", "generation_config.json"):
        tasks_run()
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()), indent=3))
        assert tasks_run() == whole, name
    plain = Loading(torch.device("cpu"))
    before = answers_fingerprint(folder, plain)
    (folder / "README.md").write_text("a card says nothing about answers")
    assert answers_fingerprint(folder, plain) == before
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert answers_fingerprint(folder, plain) != before
    assert (
        len({answers_fingerprint(folder, dataclasses.replace(plain, quantize=kind)) for kind in (None, "nf4", "int8")})
        == 3
    )


@pytest.mark.parametrize("name", ["clear", "umu", "jsonl"])
def test_every_format_can_be_trained_on(name, folders, world, tmp_path):
    from fastvkd.unlearning.loop import unlearn

    folder = folders.get(name) or tmp_path
    if name == "jsonl":
        for side, person in (("forget", 0), ("retain", 1)):
            photo = evaluation_cells(str(folders["umu"]), "forget_5", "retain_95")[side][0].photos[0]
            (tmp_path / f"{side}.png").write_bytes(photo.data)
            line = {"image": f"{side}.png", "entity": str(person), "question": "Who?", "answer": "Ann"}
            (tmp_path / f"{side}.jsonl").write_text(json.dumps(line))
        assert jsonl.splits(tmp_path) == ["forget", "retain"]
    settings = world.settings(
        tmp_path / "run",
        data=str(folder),
        forget_split="forget_5",
        retain_split="retain_95",
        max_steps=1,
        per_device_train_batch_size=2,
    )
    assert unlearn(settings).steps == 1


def test_compare_sets_runs_side_by_side(tmp_path):
    cell = {"accuracy": 0.5, "ci95": [0.4, 0.6], "rouge_l": None, "cloze": 0.25, "cloze_ci95": None}
    (tmp_path / "a_1").mkdir()
    summary = {"forget": {"choice_acc_f": 0.75, "choice_acc_f_ci95": [0.5, 1.0], "n_pairs": {"choice": 4}}}
    texts = {"rouge_1": 0.5, "rouge_2": 0.25, "rouge_l_recall": 0.75, "bleu": 0.125}
    result = {"benchmark": "umu", "mode": "paper", "cells": {"forget": {"vqa": cell | texts}}, "summary": summary}
    (tmp_path / "a_1" / "results.json").write_text(json.dumps(result))
    (tmp_path / "demo").mkdir()
    other = {"retain": {"qa": cell | {"accuracy": 1.0, "ci95": [1.0, 1.0]}}}
    (tmp_path / "demo" / "report.json").write_text(json.dumps({"vanilla": other, "unlearned": other}))
    rows = read_runs([tmp_path / "a_1", tmp_path / "demo" / "report.json"])
    assert [row.name for row in rows] == ["a_1", "demo/vanilla", "demo/unlearned"]
    more = {"forget VQA R-1": 0.5, "forget VQA R-2": 0.25, "forget VQA R-L recall": 0.75, "forget VQA BLEU": 0.125}
    shown = {"forget VQA acc": 0.5, "forget VQA cloze": 0.25, "forget choice_acc_f": 0.75}
    assert rows[0].figures == shown | more
    assert json.loads(comparison_table(rows, "json"))[0]["figures"] == shown | more
    assert not any(name in comparison_table(rows, form) for name in more for form in ("text", "latex"))
    text = comparison_table(rows, "text").splitlines()
    assert text[0].split() == ["a_1", "demo/vanilla", "demo/unlearned"]
    assert (
        text[2].split("  ")[0] == "forget VQA acc"
        and "0.500 [0.400, 0.600]" in text[2]
        and text[2].rstrip().endswith("-")
    )
    assert len({len(line) for line in text}) == 1
    assert json.loads(comparison_table(rows, "json"))[2]["figures"] == {"retain QA acc": 1.0, "retain QA cloze": 0.25}
    latex = comparison_table(rows, "latex").splitlines()
    assert latex[0] == r"\begin{tabular}{lrrr}" and latex[-1] == r"\end{tabular}"
    assert latex[2] == r" & a\_1 & demo/vanilla & demo/unlearned \\"
    assert latex[5] == r"forget VQA acc & 0.500 [0.400, 0.600] & - & - \\"
    with pytest.raises(SettingsError, match="allowed are text, json, latex"):
        comparison_table(rows, "csv")
    with pytest.raises(DataError, match="holds neither"):
        read_runs([tmp_path])
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(DataError, match="neither a result of fastvkd eval nor"):
        read_runs([tmp_path])
