"""report.html: one page that holds every figure, loads nothing, runs nothing, and shows hostile text as text."""

import base64
import copy
import math
import re
import typing
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from example_run import examples, people, report_parts, training_log, with_strangers

from fastvkd.reporting import build_report, write_html
from fastvkd.reporting.html import render
from fastvkd.reporting.schema import CELLS
from fastvkd.reporting.sentences import limits
from fastvkd.reporting.words import byte_size, duration, flatten, is_right
from fastvkd.settings import ForgetTarget

HOSTILE = """<script>alert("x")</script>'"><img src=x onerror=alert(1)>&amp;"""


class Page(HTMLParser):
    """Collects tags with attributes and visible text, and checks that elements nest."""

    VOID = frozenset({"meta", "img", "br", "line", "circle", "rect", "path"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID or tag in ("circle", "path", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture
def report() -> dict[str, Any]:
    return build_report(**report_parts())


@pytest.fixture(scope="module")
def full_page() -> str:
    return render(build_report(**report_parts()), examples(), training_log())


def test_page_is_well_formed_and_complete(full_page: str) -> None:
    page = Page(full_page)
    headings = [h for h in re.findall(r"<h2>(.*?)</h2>", full_page)]
    assert headings == [
        "What the model says",
        "Every figure",
        "What forgetting cost",
        "How it trained",
        "Can it be relearned?",
        "Asked in other ways",
        "Can one tell what it was trained on?",
        "Where did it go?",
        "Certificate: failed",
        "How it was made",
        "What this does not show",
    ]
    assert sum(tag == "h1" for tag, _ in page.tags) == 1


def training_words(**settings: Any) -> str:
    """The section on training of a run with other settings."""
    parts = report_parts()
    page = render(build_report(**(parts | {"settings": parts["settings"] | settings})), [], training_log())
    return page.split("How it trained")[1].split("<figure>")[0]


@pytest.mark.parametrize("target", typing.get_args(ForgetTarget))
def test_the_forget_term_is_described_as_the_target_has_it(target: str) -> None:
    words = training_words(forget_target=target)
    assert ("towards" in words) == (target not in ("repel", "saturate")) and "The forget term" in words
    assert ("hidden units below zero" in words) == (target == "saturate") and "moves the features" not in words
    assert "answers" in training_words(method="gd", forget_target=target)


def test_the_shaded_goal_is_that_of_the_runs_certificate() -> None:
    parts = report_parts()
    settings = parts["settings"] | {"certificate": {"chance_band": 0.05, "kept_visual": 0.9}}
    page = Page(render(build_report(**(parts | {"settings": settings})), [], []))
    assert "within 5 points of chance, and at least 90 % of" in page.words


def test_page_loads_and_runs_nothing(full_page: str) -> None:
    page = Page(full_page)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form")
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "srcset", "data", "action"):
            assert (attributes.get(name) or "data:image/png").startswith("data:image/png")
    assert "http://" not in full_page and "https://" not in full_page
    assert "url(" not in full_page and "@import" not in full_page
    policy = next(a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none'") and "script-src" not in policy


def test_page_fits_a_phone_and_both_themes(full_page: str) -> None:
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in full_page
    assert "@media (prefers-color-scheme: dark)" in full_page
    assert "@media (max-width: 700px)" in full_page


def test_every_cell_of_every_model_is_in_the_tables(report: dict[str, Any]) -> None:
    # Distinct values everywhere, so that no figure can stand in for another.
    value = 0.1001
    for model in ("vanilla", "unlearned", "gold"):
        for name, kind in CELLS:
            cell = report[model][name][kind]
            for key in ("accuracy", "rouge_l", "cloze"):
                value += 0.011
                cell[key] = value
            cell["ci95"] = [value - 0.031, value + 0.0372]
            cell["n"] = int(1000 * value) + 5000
    tables = "".join(re.findall(r"<table>.*?</table>", render(report, [], []), flags=re.S))
    for model in ("vanilla", "unlearned", "gold"):
        for name, kind in CELLS:
            cell = report[model][name][kind]
            low, high = (f"{100 * bound:.1f}" for bound in cell["ci95"])
            assert f">{100 * cell['accuracy']:.1f}<small>{low}–{high}</small></td>" in tables, (model, name, kind)
            assert f">{100 * cell['rouge_l']:.1f}</td>" in tables
            assert f">{100 * cell['cloze']:.1f}</td>" in tables
    for name, kind in CELLS:
        assert f"n = {report['unlearned'][name][kind]['n']:,}" in tables


def test_change_is_signed_and_adds_up(report: dict[str, Any]) -> None:
    page = render(report, [], [])
    assert "<td>−70.9</td>" in page  # 99.2 -> 28.3
    report["unlearned"]["realworld"]["vqa"]["accuracy"] = 0.98
    assert "<td>+2.2</td>" in render(report, [], [])


def test_gallery_shows_faces_and_answers_of_all_groups(full_page: str) -> None:
    page = Page(full_page)
    shown = [a["src"] for t, a in page.tags if t == "img"]
    wanted = ["data:image/png;base64," + base64.b64encode(e["image_png"]).decode() for e in examples()]
    assert sorted(filter(None, shown)) == sorted(wanted)
    for example in examples():
        assert example["question"] in page.words and example["after"] in page.words
    for title in ("Forgotten people", "The same people, unseen photos", "Retained people", "Real world"):
        assert title in page.words


def test_answers_are_marked_right_and_wrong(report: dict[str, Any]) -> None:
    example = examples()[0] | {"truth": "Lisbon", "before": "She was born in Lisbon.", "after": "Graz"}
    page = Page(render(report, [example], [])).words
    assert re.search(r"born in Lisbon\.\s*✓\s*right", page)
    assert re.search(r"Graz\s*✗\s*wrong", page)


def test_the_page_first_shows_what_is_said_of_each_person_beside_a_stranger() -> None:
    text = render(build_report(**with_strangers()), examples(), training_log(20), (), people("Nobody I know."))
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings[:3] == ["What it says of each forgotten person", "Beside strangers", "What the model says"]
    rows = re.findall(r"<li(?: class=\"stranger\")?>\s*<img.*?</li>", text, flags=re.S)
    assert [re.search(r'class="name">([^<]*?)(?: <|<)', row)[1] for row in rows] == [  # type: ignore[index]
        *("Jonas Hallqvist", "Mireille Aubert", "Tobias Renner", "Ines Calloway", "A stranger")  # best known first
    ]
    first, last = Page(rows[0]).words, Page(rows[-1]).words
    assert "047" in first and "Who is the person in this image?" in first and "After Nobody I know. Gold" in first
    assert "Before Jonas Hallqvist is a beekeeper from Lisbon." in first and "38% right ✓ as a stranger" in first
    assert "before 90%, gold 29%, n = 21" in first and "14%–43% right" in last


def test_who_is_still_named_or_recognised_is_marked() -> None:
    report = build_report(**with_strangers(people=[0.24, 0.29, 0.33, 0.71]))
    words = Page(render(report, [], None, (), people("It is Jonas Hallqvist."))).words
    assert words.count("names the person") == 1 and "71% right ✗ more than a stranger" in words


def test_of_many_people_the_best_known_are_shown_and_the_rest_counted() -> None:
    parts = with_strangers()
    many = {f"p{i:02}": {"vqa": {"accuracy": i / 100, "n": 10}} for i in range(30)}
    parts["unlearned"] |= {"by_person": many}
    words = Page(render(build_report(**parts), [], None, (), people()[4:])).words
    before = words.partition("Beside strangers")[0]
    assert "p29" in before and "p10" in before and "p09" not in before and "And 10 more" in before
    assert "A stranger" in before


def test_every_figure_about_strangers_is_on_the_page_and_what_is_absent_is_said() -> None:
    report = build_report(**with_strangers())
    words = Page(render(report, [], None)).words
    assert "What the models said was not in any folder" in words and "Not measured" not in words
    for row in (
        *("somebody else’s name 0.0 27.0 25.0", "Strangers, 95 % of them 14.0–43.0 14.0–43.0 14.0–43.0"),
        *("Retained, beside a forgotten person 83.0 71.4–94.6", "Worst score 0.97 name entropy 0.66 name entropy"),
        *("As many random strangers 0.61 up to 0.72", "Most like a forgotten person 97.0 n = 360 96.0 n = 360"),
        "Asked is at most 0.67",
    ):
        assert row in words, row
    old = Page(render(build_report(**report_parts()), [], None)).words
    assert "Not measured: how often it is right about each person" in old and "Beside strangers" not in old
    del report["unlearned"]["description"]
    assert "Not measured: whether it still sees" in Page(render(report, [], None)).words


def test_no_page_claims_more_than_an_attack_found() -> None:
    for parts in (report_parts(), with_strangers()):
        words = Page(render(build_report(**parts), examples(), training_log(20), (), people())).words
        assert not re.search(r"cannot be relearn|no longer recognis|would come back|erased", words)


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("Lisbon", "lisbon", True),
        ("In Lisbon, I think.", "Lisbon", True),
        ("a cat", "cats", False),
        ("category", "cat", False),
        ("", "Lisbon", False),
        ("anything", "", False),
        ("Malmö!", "malmö", True),
    ],
)
def test_is_right_compares_whole_words(answer: str, truth: str, right: bool) -> None:
    assert is_right(answer, truth) is right


def test_hostile_text_stays_text(report: dict[str, Any]) -> None:
    report["settings"]["model_name_or_path"] = HOSTILE
    report["settings"][HOSTILE] = HOSTILE
    report["versions"]["torch"] = HOSTILE
    report["hardware"]["cpu"] = HOSTILE
    report["seconds"][HOSTILE] = 1.0
    report["comparison"][0]["name"] = HOSTILE
    report["notes"] = [HOSTILE]
    example = examples()[0] | {key: HOSTILE for key in ("name", "question", "truth", "before", "after")}
    log = [{"step": 1, "loss": 1.0, f"loss_{HOSTILE}": 0.5}, {"step": 2, "loss": 0.5, f"loss_{HOSTILE}": 0.2}]
    person = people()[0] | {key: HOSTILE for key in ("entity", "name", "question")} | {"said": {"unlearned": HOSTILE}}
    report["unlearned"] |= {"by_person": {HOSTILE: {"vqa": {"accuracy": 1.0, "n": 1}}}}
    text = render(report, [example], log, (), [person])
    page = Page(text)
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert sum(tag == "img" for tag, _ in page.tags) == 2
    assert not [a for _, a in page.tags if "onerror" in a]
    assert '<script>alert("x")</script>' in page.words  # shown as the text it is
    clean = render(build_report(**with_strangers()), [examples()[0]], log[:0], (), people())
    assert {t for t, _ in page.tags} <= {t for t, _ in Page(clean).tags} | {"path", "circle"}


def test_charts_draw_what_was_measured(full_page: str, report: dict[str, Any]) -> None:
    labels = re.findall(r'<text [^>]*class="label [^>]*>(.*?)</text>', full_page)
    for label in ("before", "unlearned", "gold", "chance 25%", "chance", "total", "forget", "retain", "IDK"):
        assert label in labels
    # One dot per measured point of each relearning curve, and per site, model and group of people of the probes.
    dots = sum(len(curve) for curves in report["relearning"].values() for curve in curves.values())
    dots += 2 * sum(len(by_site) for by_site in report["attacks"]["probe"]["models"].values())
    assert len(re.findall(r'r="3"><title>', full_page)) == dots
    assert "relearning step 100: 82%" in full_page


def test_report_without_optional_parts(report: dict[str, Any]) -> None:
    for key in ("gold", "comparison", "notes", "hardware", "relearning_auc", "attacks", "certificate"):
        del report[key]
    report["relearning"] = {}
    page = Page(render(report, [], []))
    assert "No relearning attack was run" in page.words
    assert "holds no losses" in page.words
    assert "No model trained without the forgotten people was measured" in page.words
    assert "Gold" not in page.words
    assert "What the model says" not in page.words


def test_report_of_data_without_test_realworld_and_text(report: dict[str, Any]) -> None:
    for model in ("vanilla", "unlearned", "gold"):
        report[model] = {name: {"vqa": report[model][name]["vqa"]} for name in ("forget", "retain")}
    page = Page(render(report, examples(), training_log(5)))
    assert "Asked in words" not in page.words and "Text knowledge was kept" not in page.words


def test_log_with_gaps_and_nonfinite_values(report: dict[str, Any]) -> None:
    rows = [
        {"step": 1, "loss": math.nan, "loss_forget": 2.0, "grad_norm": math.inf},
        {"step": 2, "loss": 1.0, "loss_forget": None, "loss_retain": 0.0},
        {"loss": 3.0},
        {"step": 3, "loss_forget": 1e-4, "loss_retain": 0.0, "grad_norm": 0.0},
    ]
    text = render(report, [], rows)
    Page(text)
    drawn = re.findall(r'(?:d|points|x1|y1|cx|cy)="([^"]*)"', text)
    assert drawn and not [d for d in drawn if "nan" in d or "inf" in d]


def test_one_step_and_constant_curves_are_drawn(report: dict[str, Any]) -> None:
    report["relearning"] = {"visual": {"unlearned": [{"step": 0, "accuracy": 0.3}]}}
    without = render(report, [], []).count("<svg")
    for rows in (training_log(1), [{"step": s, "loss": 0.0} for s in range(5)]):
        text = render(report, [], rows)
        Page(text)
        assert text.count("<svg") > without


def test_extreme_accuracies_stay_inside_the_plots(report: dict[str, Any]) -> None:
    for model, value in (("vanilla", 1.0), ("unlearned", 0.0), ("gold", 0.0)):
        for name, kind in CELLS:
            report[model][name][kind] |= {"accuracy": value, "ci95": [value, value]}
    text = render(report, [], [])
    wide = re.search(r'<svg class="chart wide" viewBox="0 0 (\d+) (\d+)".*?</svg>', text, flags=re.S)
    assert wide is not None
    width, height = int(wide[1]), int(wide[2])
    for x, y in re.findall(r'cx="([\d.-]+)" cy="([\d.-]+)"', wide[0]):
        assert 0 <= float(x) <= width and 0 <= float(y) <= height


def test_wrong_examples_are_refused(report: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="group 'forgotten'"):
        render(report, [examples()[0] | {"group": "forgotten"}], [])
    with pytest.raises(ValueError, match="not a PNG"):
        render(report, [examples()[0] | {"image_png": b"\xff\xd8\xff\xe0" + bytes(40)}], [])
    with pytest.raises(ValueError, match="people: 015: image_png is not a PNG"):
        render(report, [], [], (), [people()[0] | {"image_png": b"GIF89a"}])


def test_limits_name_what_was_not_measured(report: dict[str, Any]) -> None:
    text = " ".join(limits(report))
    assert text.startswith("The people are portraits drawn by a program")
    assert "one seed" in text and "82%" in text and "asks by name" in text
    without = copy.deepcopy(report)
    del without["gold"]
    assert "seen them is open" in " ".join(limits(without))


def test_written_page_is_the_rendered_one(report: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "out" / "report.html"
    write_html(report, examples(), training_log(20), path)
    assert path.read_text(encoding="utf-8") == render(report, examples(), training_log(20))
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_units_are_readable() -> None:
    assert [duration(s) for s in (8.42, 59.99, 272.4, 7500)] == ["8.4 s", "1 min 00 s", "4 min 32 s", "2 h 05 min"]
    assert [byte_size(b) for b in (512, 3 << 20, 1_384_120_320)] == ["512 B", "3 MiB", "1.3 GiB"]
    assert flatten({"a": {"b": None, "c": [1, 2]}, "d": True, "e": []}) == {
        "a.b": "none",
        "a.c": "1, 2",
        "d": "yes",
        "e": "none",
    }


def test_every_attack_is_shown_with_its_figures(full_page: str, report: dict[str, Any]) -> None:
    words = Page(full_page).words
    for row in report["attacks"]["questions"]:
        for figure in row["figures"].values():
            assert f"{100 * figure['accuracy']:.1f}" in words
    assert "the strongest is “Weights rounded (4 bits, nf4)”: 37% right, chance 25%" in words
    assert "Area under the curve: unlearned 49.3%, gold 27.2%; relearning gap +22.1 points." in words
    assert "Min-K++ 20 % 0.87 0.82–0.92 0.58 0.53–0.63 0.56 0.51–0.61" in words
    assert "after, V4: 42%" in full_page and "gold, L4: 47%" in full_page  # a dot for each site
    assert "Relearning, area above gold : not met 0.22 asked: at most 0.10" in words
    assert "Answers in reverse, above chance : not measured not measured" in words


def test_limits_say_whether_attacks_were_tried(report: dict[str, Any]) -> None:
    assert "Of 7 attacks the strongest is" in " ".join(limits(report))
    del report["attacks"]
    assert "were not tried here" in " ".join(limits(report))
