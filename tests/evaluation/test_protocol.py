"""Cells, intervals, log and resumption; cloze and text metrics; paper mode against corrected mode."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from tiny_llava import person

from fastvkd.data.wording import cloze_text
from fastvkd.errors import SettingsError
from fastvkd.evaluation import protocol
from fastvkd.evaluation.benchmarks import BENCHMARKS, letter_query, read_letter
from fastvkd.evaluation.generation import bleu, rouge
from fastvkd.evaluation.protocol import evaluate_cells
from fastvkd.evaluation.statistics import bootstrap_interval
from fastvkd.models.answers import with_answer
from fastvkd.records import Choice, Profile, Questions


def read_log(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def evaluate(tiny, cells, **options):
    return evaluate_cells(tiny.model, tiny.processor, cells, **{"batch_size": 8, "seed": 0, **options})


def test_every_cell_has_figures_and_every_sample_a_log_line(tiny, people, tmp_path):
    log = tmp_path / "log" / "samples.jsonl"
    ticks = []
    cells = {"forget": people[:2], "test": people[2:3], "retain": people[3:], "realworld": [person(9)]}
    results = evaluate(tiny, cells, log_path=log, progress=lambda *state: ticks.append(state))
    assert list(results) == list(cells) and all(list(kinds) == ["vqa", "qa"] for kinds in results.values())
    lines = read_log(log)
    for cell, kinds in results.items():
        for kind, figures in kinds.items():
            mine = [line for line in lines if line["cell"] == cell and line["kind"] == kind]
            choice = [line for line in mine if line.get("task") == "choice"]
            assert figures["n"] == len(choice) == 2 * len(cells[cell])
            assert figures["accuracy"] == np.mean([line["correct"] for line in choice])
            low, high = figures["ci95"]
            assert low <= figures["accuracy"] <= high
            assert figures["n_generation"] == figures["n_cloze"] == len(cells[cell])
            assert 0 <= figures["rouge_l"] <= 1 and 0 <= figures["cloze"] <= 1 and 0 <= figures["bleu"] <= 1
            for line in choice:
                normalised = {k: v / line["tokens"][k] for k, v in line["log_likelihood"].items()}
                assert line["prediction"] == max(normalised, key=normalised.get)
                assert line["correct"] == (line["prediction"] == line["answer"])
    assert ticks[-1][:2] == (8 * len(people) + 8, 8 * len(people) + 8)
    assert [tick[0] for tick in ticks] == sorted(tick[0] for tick in ticks)
    again = evaluate(tiny, cells)
    assert again == results


def test_accuracy_counts_what_the_model_prefers(tiny, people, tmp_path):
    """With the answers set to what the model prefers, accuracy is 1; with any other letter, 0."""
    log = tmp_path / "log.jsonl"
    evaluate(tiny, {"forget": people}, tasks=["choice"], kinds=["vqa"], log_path=log)
    preferred = {(line["source"], line["question"]): line["prediction"] for line in read_log(log) if "task" in line}

    def answered(profile: Profile, shift: int) -> Profile:
        questions = tuple(
            dataclasses.replace(
                question,
                answer="ABCD"[("ABCD".index(preferred[profile.photos[0].source, question.question]) + shift) % 4],
            )
            for question in profile.visual.choice
        )
        return dataclasses.replace(profile, visual=Questions(choice=questions))

    for shift, expected in ((0, 1.0), (1, 0.0)):
        cells = {"forget": [answered(profile, shift) for profile in people]}
        figures = evaluate(tiny, cells, tasks=["choice"], kinds=["vqa"])["forget"]["vqa"]
        assert figures["accuracy"] == expected and figures["ci95"] == [expected, expected]
        assert figures["rouge_l"] is None and figures["n_cloze"] == 0


def test_both_paths_give_the_same_figures(tiny, people):
    cells = {"forget": people[:3]}
    for mode in ("corrected", "paper"):
        fast, slow = (evaluate(tiny, cells, mode=mode, fast=path) for path in (True, False))
        for kinds in (kinds for figures in (fast, slow) for kinds in figures.values()):
            for kind in kinds.values():  # a likelihood, which has rounding errors where choices and texts have none
                for name in [name for name in kind if name.startswith("answer_prob")]:
                    kind[name] = np.round(kind[name], 4).tolist()
        assert fast == slow


def test_text_questions_repeated_by_rows_of_an_entity_are_asked_once(tiny):
    one = person(1)
    rows = [one, dataclasses.replace(person(1, photo=77), entity=one.entity), person(2)]
    results = evaluate(tiny, {"forget": rows}, tasks=["choice"])
    assert results["forget"]["vqa"]["n"] == 6 and results["forget"]["qa"]["n"] == 4


def test_subsampling_is_seeded_per_cell_and_independent_of_other_cells(tiny, people, tmp_path):
    def drawn(seed, cells, name):
        path = tmp_path / "log.jsonl"
        evaluate(tiny, cells, tasks=["choice"], kinds=["vqa"], max_samples=4, seed=seed, log_path=path)
        return [
            (line["source"], line["question"]) for line in read_log(path) if line["cell"] == name and "task" in line
        ]

    alone = drawn(0, {"retain": people}, "retain")
    assert len(alone) == 4
    assert drawn(0, {"forget": people[:2], "retain": people}, "retain") == alone
    assert any(drawn(seed, {"retain": people}, "retain") != alone for seed in (1, 2, 3))


def test_finished_cells_are_not_computed_again(tiny, people, tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    cells = {"forget": people[:2], "retain": people[2:4]}
    first = evaluate(tiny, cells, log_path=path, fingerprint="weights-a")
    whole = path.read_text()
    # Killed while the last cell was being written: torn line, no closing line.
    path.write_text(whole[: whole.rindex('{"finished"') - 30])
    ran = []
    run = protocol._Runner.run

    def counted(self, task, items, *rest):
        ran.append((items[0].entity, task))
        return run(self, task, items, *rest)

    monkeypatch.setattr(protocol._Runner, "run", counted)
    assert evaluate(tiny, cells, log_path=path, fingerprint="weights-a") == first
    assert ran == [(people[2].entity, task) for task in ("choice", "generation", "cloze")]
    assert path.read_text() == whole
    ran.clear()
    changed = {**cells, "retain": [*people[2:4], person(8)]}
    evaluate(tiny, changed, log_path=path, fingerprint="weights-a")
    assert len(ran) == 6  # vqa and qa of retain
    for options in ({"fingerprint": "weights-b"}, {"fingerprint": None}, {"fingerprint": "weights-a", "seed": 5}):
        evaluate(tiny, cells, log_path=path, fingerprint="weights-a")
        ran.clear()
        evaluate(tiny, cells, log_path=path, **options)
        assert len(ran) == 12
        assert sum("finished" in line for line in read_log(path)) == 4


def test_paper_mode_shows_one_seeded_solved_question_and_does_not_ask_it(tiny, people, tmp_path):
    path = tmp_path / "log.jsonl"
    cells = {"forget": people, "realworld": people}
    results = evaluate(tiny, cells, mode="paper", tasks=["choice"], log_path=path)
    assert results["forget"]["vqa"]["n"] == 2 * len(people) - 1
    assert results["realworld"]["vqa"]["n"] == 2 * len(people)
    for line in read_log(path):
        if "task" in line:
            assert line["prediction"] in (*"ABCD", None) and "output" in line
    assert evaluate(tiny, cells, mode="paper", tasks=["choice"]) == results


def test_prompts_of_both_modes(tiny, people):
    choice = Choice("Who?", {"A": "Ann", "B": "Bob"}, "B")
    photos = people[0].photos
    query = letter_query(tiny.processor, choice, photos)
    ask = "Just give ONE letter representing the answer directly."
    assert query.prompt == f"USER: <image>\nWho?\nA: Ann\nB: Bob\n{ask}\nASSISTANT:"
    shown = letter_query(tiny.processor, choice, photos, (choice, people[1].photos))
    start = "USER: <image>\nQuestion: Who?\nA: Ann\nB: Bob\nCorrect Answer: B\nUSER: <image>\nWho?"
    assert shown.prompt.startswith(start) and shown.photos == (*people[1].photos, *photos)
    assert letter_query(tiny.processor, choice, ()).prompt.startswith("USER: Who?")
    plain, published = (
        rules.turn(tiny.processor, rules.generation_text("Who?"), photos).prompt
        for rules in BENCHMARKS["mllmu"].values()
    )
    assert plain == "USER: <image>\nWho? ASSISTANT:"
    assert published.startswith("USER: <image>\nWho?\n") and "in one sentence" in published
    assert published.endswith(".\nASSISTANT:")
    assert cloze_text("She is a __.").startswith("She is a [Blank].\nPlease **ONLY**")
    assert (
        with_answer("ASSISTANT:", "Rome") == "ASSISTANT: Rome"
        and with_answer("assistant\n", "Rome") == "assistant\nRome"
    )


@pytest.mark.parametrize(
    ("answer", "letter"),
    [(" b. Bob", "B"), ("A", "A"), ("C", None), ("", None), ("Bob", "B"), ("The answer is B", None)],
)
def test_the_first_character_is_the_letter(answer, letter):
    assert read_letter(answer, Choice("Who?", {"A": "Ann", "B": "Bob"}, "B")) == letter


@pytest.mark.parametrize(
    ("truth", "answer", "paper", "corrected"),
    [
        ("Rome", "She was born in rome.", True, True),
        ("Iran", "Tirana", True, False),
        ("1", "in 19", True, False),
        ("marine  biologist", "a Marine biologist", True, True),
        ("C++", "c++", True, True),
        ("Rome", "Oslo", False, False),
        ("Rome", "", False, False),
    ],
)
def test_cloze_is_containment_and_whole_words_when_corrected(truth, answer, paper, corrected):
    found = {mode: rules.cloze_correct(truth, answer) for mode, rules in BENCHMARKS["mllmu"].items()}
    assert found == {"paper": paper, "corrected": corrected}


def test_rouge_and_bleu_on_known_values():
    scores = rouge("the cat sat on the mat", "the cats sat")
    assert scores["rouge_1"] == pytest.approx(2 * 1.0 * 0.5 / 1.5)  # the stemmer makes cats cat
    assert scores["rouge_2"] == pytest.approx(2 * 1.0 * 0.4 / 1.4)
    assert scores["rouge_l"] == pytest.approx(2 * 1.0 * 0.5 / 1.5)
    assert bleu("a b c d e", "a b c d e") == pytest.approx(1.0)
    assert bleu("a b c d e", "") == 0.0
    # 1-, 2-, 3-gram precisions 1/1 twice and smoothed 0.1/1 for what is absent; brevity penalty exp(1 - 5/4).
    assert bleu("a b c d e", "a b c x") == pytest.approx(np.exp(-0.25) * (3 / 4 * 2 / 3 * 1 / 2 * 0.1) ** 0.25)


def test_the_interval_covers_the_mean_about_95_times_in_100():
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        low, high = bootstrap_interval(generator.random(80) < 0.3, seed=trial, resamples=400)
        covered += low <= 0.3 <= high
    assert 180 <= covered <= 199
    assert bootstrap_interval([0.0, 1.0, 1.0], seed=4) == bootstrap_interval([0.0, 1.0, 1.0], seed=4)
    with pytest.raises(ValueError, match="no values"):
        bootstrap_interval([], seed=0)


def test_the_model_keeps_its_mode_and_gets_no_gradient(tiny, people):
    tiny.model.train()
    try:
        evaluate(tiny, {"forget": people[:1]}, tasks=["choice"])
        assert tiny.model.training and torch.is_grad_enabled()
        assert all(weight.grad is None and not weight.is_inference() for weight in tiny.model.parameters())
    finally:
        tiny.model.eval()


def test_unknown_settings_are_refused(tiny, people):
    for options in ({"mode": "papier"}, {"tasks": ["choices"]}, {"kinds": ["image"]}, {"batch_size": 0}):
        with pytest.raises(SettingsError):
            evaluate(tiny, {"forget": people}, **options)
