"""The study of the figures themselves: its models, what is measured of each, and the areas by hand."""

import dataclasses
import json
from pathlib import Path

import pytest
from study import metrics
from world import World

from fastvkd.demo.run import SIZES
from fastvkd.evaluation import protocol
from fastvkd.evaluation.benchmarks import BENCHMARKS


def test_a_row_has_every_figure_of_every_model(tmp_path: Path, monkeypatch) -> None:
    tiny = SIZES["tiny"]
    spec = dataclasses.replace(
        tiny,
        people=12,
        photos=2,
        test_photos=1,
        flag_photos=1,
        halves=1,
        neighbours=2,
        strangers=6,
        unseen_strangers=4,
        sight=dataclasses.replace(tiny.sight, steps=1, photos=4, pairs=2),
        schedule=dataclasses.replace(tiny.schedule, steps=2, people=2, strangers=2, flags=1, pairs=1, texts_per_step=2),
        shape=dataclasses.replace(tiny.shape, vision_width=32, vision_layers=2, llm_width=32, llm_layers=2),
        max_samples=4,
        attacks=dataclasses.replace(tiny.attacks, max_samples=4, relearning_steps=(0, 1), relearning_samples=4),
    )
    monkeypatch.setitem(SIZES, "tiny", spec)
    for name, value in {"TAUGHT": 1, "EXPOSED": ("vanilla",), "NOT_EXPOSED": ("gold, taught others",)}.items():
        monkeypatch.setattr(metrics, name, value)
    seen: dict = {}
    pool = metrics.pool
    monkeypatch.setattr(metrics, "pool", lambda world: seen.update(pool(world)) or seen)
    short = dataclasses.replace(BENCHMARKS["mllmu"]["corrected"], max_new_tokens=2)
    monkeypatch.setitem(protocol.BENCHMARKS["mllmu"], "corrected", short)
    world = World(0, tmp_path, size="tiny")
    row = {"size": "tiny", "seed": 0, "variant": "pool", **metrics.measure(world, "pool")}
    assert set(row["models"]) == {"vanilla", "gold, taught others"}
    names = [set(figures) for figures in row["models"].values()]
    assert all(name == names[0] for name in names)
    for name in ("forget: accuracy", "test: KS of answers", "membership, pairs: grad_norm", "relearning: all"):
        assert name in names[0]
    # No two models are the same, nor is any the reference.
    heads = [model.lm_head.weight.detach().flatten().tolist() for model in seen.values()]
    assert len(seen) == 7 and len({tuple(head) for head in heads}) == 7
    assert all(figures["forget: JS of answers"] > 0 for figures in row["models"].values())
    assert json.loads(json.dumps(row)) == row
    lines = metrics.STUDY.table({"rows": [row]})
    assert len(lines) == 4 + len(names[0])


def test_the_area_of_a_figure_is_the_share_of_pairs_in_order() -> None:
    def row(exposed: tuple[float, ...], others: tuple[float, ...]) -> dict:
        values = dict(zip((*metrics.EXPOSED, *metrics.NOT_EXPOSED), (*exposed, *others), strict=True))
        models = {kind: {"sure": value, "constant": 0.5} for kind, value in values.items()}
        models["gold"].pop("constant")  # a figure that one model lacks
        return {"size": "tiny", "seed": 0, "models": models}

    rows = [row((3.0, 2.0, 1.0), (0.0, 0.5, 1.0)), row((5.0, 5.0, 0.0), (0.0, 0.0, 0.0))]
    found = {line["figure"]: line for line in metrics.separation(rows)}
    # 6 x 6 pairs: 3, 2, 5 and 5 win all; 1 wins five and ties one; 0 ties four and loses two.
    assert found["sure"]["auc"] == pytest.approx((4 * 6 + 5.5 + 2) / 36)
    assert found["constant"]["auc"] == 0.5 and found["constant"]["n_others"] == 4
    assert list(found) == ["sure", "constant"]
    assert found["sure"]["means"]["vanilla"] == 4.0
    text = "\n".join(metrics.STUDY.table({"rows": rows}))
    assert "| constant | 0.50 [0.50, 0.50] | no |" in text and "2 seed(s), 6 models" in text
