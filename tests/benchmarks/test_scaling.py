"""The scaling benchmark measures what it says, and the document's predictions are those of `plan`."""

from pathlib import Path

import pytest
import scaling
import tables

ROOT = Path(__file__).parents[2]


def test_the_documents_predictions_are_what_the_plan_says():
    text = (ROOT / "docs" / "scaling.md").read_text()
    assert scaling.with_predictions(text) == text, "run python benchmarks/scaling.py --predict docs/scaling.md"


@pytest.mark.slow
def test_every_axis_is_measured_beside_its_prediction(monkeypatch):
    monkeypatch.setattr(scaling, "AXES", {"LLM layers": (1, 2), "visual tokens": (16, 64), "images a step": (2, 8)})
    report = scaling.measure(repetitions=1, ranks=(1, 2))
    found = [(row["axis"], row["value"]) for row in report["rows"]]
    assert found == [
        *(("LLM layers", 1), ("LLM layers", 2), ("visual tokens", 16), ("visual tokens", 64)),
        *(("images a step", 2), ("images a step", 8), ("ranks", 1), ("ranks", 2)),
    ]
    flops = {key: row["flops_per_image"] for key, row in zip(found, report["rows"], strict=True)}
    assert flops["visual tokens", 64] > 3 * flops["visual tokens", 16]
    assert all(row["ms_per_image"] > 0 and row["predicted_over_measured"] > 0 for row in report["rows"])
    assert len(tables.scaling_table(report)) > len(found)
