"""The comparison of methods: what a row holds for each kind of method, how it is chosen, kept and printed."""

import json
import sys
from pathlib import Path
from typing import Any

import methods
import pytest
from random_world import world_over
from world import World


@pytest.fixture
def random_world(world, tmp_path: Path, monkeypatch) -> World:
    """A `World` whose vanilla and gold model is the shared random one, so that nothing has to be trained."""
    spec: dict[str, Any] = {"overrides": {"max_steps": 21, "auxiliary_images": 4}, "max_samples": 12}
    small = world_over(world, tmp_path, **spec)
    monkeypatch.setattr(small, "gold", lambda: world.model)
    monkeypatch.setattr(methods, "world_of", lambda *_: small)
    for name, value in {
        "STEPS": 4,
        "EVERY": 2,
        "BATCH": 4,
        "GRID_SAMPLES": 8,
        "ATTACK_SAMPLES": 8,
        "STRENGTHS": (2.0, 4.0),
    }.items():
        monkeypatch.setattr(methods, name, value)
    grid = {
        **methods.GRID,
        "gd-lora": methods.GRID["gd-lora"][:1],
        "manu": ({"manu_fraction": 0.1, "manu_batches": 1},),
        "steering": ({"layers": (1,), "questions": 8},),
    }
    monkeypatch.setattr(methods, "GRID", grid)
    return small


def test_a_row_of_every_kind_of_method(random_world: World, tmp_path: Path) -> None:
    rows = [methods.measure("tiny", tmp_path, 0, name) for name in ("gold", "gd", "gd-lora", "manu", "steering", "vkd")]
    by_method = {row["method"]: row for row in rows}
    for row in rows:
        assert set(row["vqa"]) == {"forget", "test", "retain", "realworld"}
        assert set(row["relearning_auc"]) == {"visual", "all"}
        assert row["language_model_unchanged"] == (row["method"] != "gd-lora")
    assert [p["step"] for p in by_method["gd"]["points"]] == [2, 4] * len(methods.GRID["gd"])
    assert by_method["gd"]["images_seen"] == 4 * by_method["gd"]["setting"]["step"]
    assert by_method["vkd"]["images_seen"] > 0
    assert json.loads(json.dumps(rows)) is not None
    lines = methods.table(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert len({line.count("|") for line in lines}) == 1
    gap = by_method["vkd"]["relearning_auc"]["all"] - by_method["gold"]["relearning_auc"]["all"]
    assert f"{100 * gap:+.1f}" in next(line for line in lines if "VKD" in line)


def test_the_point_of_equal_forgetting_is_chosen() -> None:
    points = [{"forget": f, "retain": r} for f, r in ((0.9, 1.0), (0.3, 0.7), (0.2, 0.9), (0.0, 0.95))]
    assert methods.best(points)["retain"] == 0.9  # the best retained within 0.10 of chance, 0.25
    assert methods.best([points[0], points[3]])["forget"] == 0.0  # or the nearest


def test_finished_rows_are_kept_and_another_grid_is_another_row(tmp_path: Path, monkeypatch, capsys) -> None:
    row = {
        "key": methods.key("tiny", 3, "ga"),
        "size": "tiny",
        "seed": 3,
        "method": "ga",
        "setting": {"learning_rate": 1e-5, "step": 20},
        "vqa": dict.fromkeys(("forget", "test", "retain", "realworld"), 0.25),
        "text_qa_worst": 1.0,
        "language_model_unchanged": True,
        "relearning_auc": {"visual": 0.5, "all": 0.6},
        "unlearning_seconds": 3.0,
        "images_seen": 320,
    }
    file = tmp_path / "methods.json"
    file.write_text(json.dumps({"rows": [row]}))
    arguments = ["methods.py", "--size", "tiny", "--seeds", "3", "--methods", "ga", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--out", str(tmp_path / "out")])
    methods.main()  # would train a model if the row were not taken for finished
    assert "GA (learning_rate 1e-05, step 20) | 25.0" in file.with_suffix(".md").read_text()
    monkeypatch.setattr(sys, "argv", [*arguments, "--markdown"])
    methods.main()
    assert capsys.readouterr().out == file.with_suffix(".md").read_text()
    monkeypatch.setattr(methods, "STEPS", 40)
    assert methods.key("tiny", 3, "ga") != row["key"]
