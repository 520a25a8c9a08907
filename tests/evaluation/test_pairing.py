"""Two evaluations question by question: differences, p-values and intervals by hand, and who is no basis for claims."""

import itertools
import json
import math

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from fastvkd.cli import main
from fastvkd.evaluation.divergence import answer_distance, scored_choices
from fastvkd.evaluation.pairing import never_learnt, paired_table, paired_tests, sign_flip_p
from fastvkd.evaluation.protocol import cell_figures
from fastvkd.reporting.verdict import meets
from fastvkd.settings import Certificate


def choice(entity: str, photo: str, correct: bool, log_p: float = -1.0, cell: str = "forget", tokens: int = 2) -> dict:
    """A logged sample whose right answer, B, has `log_p` a token."""
    scores = {"A": -9.0, "B": log_p * tokens}
    about = {"cell": cell, "kind": "vqa", "task": "choice", "entity": entity, "photo": photo, "question": "Where?"}
    return {
        **about,
        "options": {"A": "Rome", "B": "Oslo"},
        "answer": "B",
        "log_likelihood": scores,
        "tokens": dict.fromkeys(scores, tokens),
        "correct": correct,
    }


def test_differences_are_of_the_same_questions_and_people_are_the_units() -> None:
    base = [
        choice("ann", "1", True, -0.5),
        choice("ann", "2", True),
        choice("bob", "3", False),
        choice("bob", "4", True),
    ]
    # Another order; one question more, which is left out.
    other = [
        choice("bob", "4", False),
        choice("ann", "2", False),
        choice("ann", "1", False, -2.5),
        choice("bob", "3", True),
    ]
    found = {test.figure: test for test in paired_tests(("a", base), ("b", [*other, choice("cy", "5", True)]))}
    accuracy = found["forget VQA acc"]
    assert (accuracy.difference, accuracy.n, accuracy.people) == (-0.5, 4, 2)
    # Ann's sum is -2, Bob's 0: of the four signs all have a sum as large.
    assert accuracy.p == 1.0
    assert accuracy.ci95 == (-1.0, 0.0)  # twice Ann, twice Bob
    probability = found["forget VQA p(answer)"]
    assert probability.difference == pytest.approx((math.exp(-2.5) - math.exp(-0.5)) / 4)
    assert [test.difference for test in paired_tests(("a", base), ("a", base))] == [0.0, 0.0]
    assert [test.p for test in paired_tests(("a", base), ("a", base))] == [1.0, 1.0]


def test_p_is_the_share_of_signs_with_a_mean_as_large() -> None:
    rng = np.random.default_rng(0)
    values, people = rng.normal(0.4, 1, size=30), [f"p{i % 6}" for i in range(30)]
    sums = [sum(v for v, p in zip(values, people, strict=True) if p == f"p{i}") for i in range(6)]
    flips = [
        abs(sum(s * f for s, f in zip(sums, signs, strict=True))) for signs in itertools.product((1, -1), repeat=6)
    ]
    expected = np.mean([flip >= abs(sum(sums)) - 1e-9 for flip in flips])
    assert sign_flip_p(values, people, seed=0) == pytest.approx(expected)
    assert sign_flip_p(values, people, seed=0, resamples=63) == pytest.approx(expected, abs=0.2)  # drawn, not all
    # Five people who all lose: no smaller p is possible. As independent questions they would seem far surer.
    assert sign_flip_p([-1.0] * 50, [f"p{i % 5}" for i in range(50)], seed=0) == 2 / 32


def test_p_values_are_uniform_where_nothing_differs() -> None:
    rng = np.random.default_rng(1)
    found = []
    for _ in range(300):
        effects = rng.normal(size=12)  # what the questions about one person share
        values = np.repeat(effects, 5) + 0.1 * rng.normal(size=60)
        found.append(sign_flip_p(values, np.repeat(np.arange(12), 5).astype(str), seed=0))
    assert 0.02 < np.mean(np.array(found) <= 0.05) < 0.09


def test_a_question_that_was_asked_twice_is_paired_with_its_own(tmp_path) -> None:
    twice = [choice("ann", "1", True), choice("ann", "1", False)]
    assert [test.difference for test in paired_tests(("a", twice), ("b", twice))] == [0.0, 0.0]


def test_who_never_learnt_the_forget_set_is_no_basis_for_claims() -> None:
    knows = [choice("ann", str(i), i < 7) for i in range(10)]  # 0.7 of chance 0.5
    assert never_learnt("vanilla", knows) is None
    note = never_learnt("blank", [choice("ann", str(i), i < 6) for i in range(10)])
    assert note is not None and "\n" not in note
    assert note.startswith("incomplete: blank never learnt the forget set (0.600 right, chance 0.500)")
    assert never_learnt("texts", [{**knows[0], "kind": "qa"}]) is None


def test_who_learnt_the_forget_set_is_what_a_certificate_asks_of_the_model_before() -> None:
    for right in range(21):
        found = never_learnt("vanilla", [choice("ann", str(i), i < right) for i in range(20)])
        assert (found is None) == bool(meets("learnt", right / 20, Certificate(), chance=0.5))


def test_the_command_tests_runs_against_the_first_one(tmp_path, capsys) -> None:
    samples = {
        "before": [choice(f"p{i % 8}", str(i), True) for i in range(16)],
        "after": [choice(f"p{i % 8}", str(i), False, -3.0) for i in range(16)],
    }
    folders = []
    for name, lines in samples.items():
        (tmp_path / name).mkdir()
        closing = {"finished": "key", "cell": "forget", "kind": "vqa", "figures": {}}
        aside = {**lines[0], "cell": "telltale"}
        text = "".join(json.dumps(line) + "\n" for line in [*lines, aside, closing])
        (tmp_path / name / "samples.jsonl").write_text(text)
        folders.append(str(tmp_path / name))
    assert main(["compare", *folders, "--paired"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (row,) = [line for line in lines if line.startswith("  forget VQA acc")]
    assert row.split()[3:] == ["-1.000", "[-1.000,", "-1.000]", "0.0078", "16", "8"]  # 2 / 2**8
    assert not any("telltale" in line or "incomplete" in line for line in lines)
    assert main(["compare", *reversed(folders), "--paired", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["paired"][0]["difference"] == 1.0 and "never learnt" in found["notes"][0]
    assert main(["compare", *folders, "--paired", "--format", "latex"]) == 0
    assert r"\begin{tabular}{lrrrr}" in capsys.readouterr().out
    assert main(["compare", folders[0], "--paired"]) == 2
    assert "at least two" in capsys.readouterr().err
    assert main(["compare", folders[0], str(tmp_path), "--paired"]) == 2
    assert "samples.jsonl" in capsys.readouterr().err
    stranger = tmp_path / "other"
    stranger.mkdir()
    (stranger / "samples.jsonl").write_text(json.dumps(choice("zoe", "99", True)) + "\n")
    assert main(["compare", folders[0], str(stranger), "--paired"]) == 2
    assert "no question in common" in capsys.readouterr().err


def test_a_table_names_both_runs_once() -> None:
    base = [choice("ann", "1", True), choice("bob", "2", True)]
    text = paired_table(paired_tests(("x", base), ("y", base)), "text", ["a note"]).splitlines()
    assert [line for line in text if line.startswith("y - x")] == ["y - x"]
    assert text[-1] == "a note"


def test_answer_probability_is_the_mean_of_the_right_answers_own() -> None:
    samples = [choice("ann", "1", True, -0.5), choice("bob", "2", False, -2.0, tokens=5)]
    figures = cell_figures(samples, seed=0)
    assert figures["answer_prob"] == pytest.approx((math.exp(-0.5) + math.exp(-2.0)) / 2)
    low, high = figures["answer_prob_ci95"]
    assert low == pytest.approx(math.exp(-2.0)) and high == pytest.approx(math.exp(-0.5))
    letters = [{key: value for key, value in samples[0].items() if key not in ("log_likelihood", "tokens")}]
    assert "answer_prob" not in cell_figures(letters, seed=0)


def test_distances_of_answers_by_hand() -> None:
    mine = [choice("ann", str(i), True, log_p) for i, log_p in enumerate((-1.0, -2.0, -3.0, -4.0))]
    gold = [choice("ann", str(i), True, log_p) for i, log_p in enumerate((-2.5, -3.5, -5.0, -6.0))]
    found = answer_distance(scored_choices(mine), scored_choices(gold))["forget"]
    # At -3.5 to -3 half of gold's, and a quarter of mine, lie below; from -5 to -4 two of gold's four and none of mine.
    assert found["answer_ks_vqa"] == 0.5
    expected = jensenshannon(np.exp([-1, -2, -3, -4]), np.exp([-2.5, -3.5, -5, -6]), base=2)
    assert found["answer_js_vqa"] == pytest.approx(expected)
    same = answer_distance(scored_choices(mine), scored_choices(mine))["forget"]
    assert same == {"answer_ks_vqa": 0.0, "answer_js_vqa": 0.0}
    apart = [choice("ann", "0", True, 0.0), choice("ann", "1", True, -900.0)]
    swapped = [choice("ann", "0", True, -900.0), choice("ann", "1", True, 0.0)]
    far = answer_distance(scored_choices(apart), scored_choices(swapped))["forget"]
    assert far == {"answer_ks_vqa": 0.0, "answer_js_vqa": pytest.approx(1.0)}
    assert answer_distance(scored_choices(mine), {}) == {}
