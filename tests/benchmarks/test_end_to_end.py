"""The end-to-end benchmark: its clock, its bar and its rows, on a small random model."""

import pytest
from random_world import world_over
from study import end_to_end


@pytest.fixture(scope="module")
def small(world, tmp_path_factory):
    """A benchmark world over the tests' random model instead of a trained one."""
    return world_over(world, tmp_path_factory.mktemp("end-to-end"))


def measured(world, monkeypatch, method, repeats, kept, **constants):
    """The row of a run of four steps, asked every second, whose bar of keeping is `kept` times the accuracy before."""
    for name, value in {"REPEATS": repeats, "KEPT": kept, **constants}.items():
        monkeypatch.setattr(end_to_end, name, value)
    overrides = {"method": method, "per_device_train_batch_size": 6, "device": "cpu"}
    plan = end_to_end.Plan(method, "a try", overrides, {"tiny": (4, 2)})
    monkeypatch.setitem(end_to_end.VARIANTS, "tried", plan)
    return {"seed": 0, "size": "tiny", **end_to_end.measure(world, "tried")}


@pytest.mark.parametrize("method", ["vkd", "ga"])
def test_a_row_holds_the_way_to_the_bar(small, monkeypatch, method):
    # a random model is near chance before the first step
    row = measured(small, monkeypatch, method, repeats=2, kept=0.0, BAND=1.0)
    assert row["curve"] == [row["reached"]] == [row["kept"]]  # nobody asks on once it is there
    assert (row["reached"]["step"], row["reached"]["images"]) == (2, 12)
    assert row["seconds_prepare"] < row["reached"]["seconds"] < row["seconds"]
    assert set(row["final"]) == {"forget", "test", "retain", "realworld"}
    assert row["repeats"] == 2
    report = {"rows": [row], **end_to_end.STUDY.protocol()}
    assert f"| {method} | a try |" in "\n".join(end_to_end.STUDY.table(report))
    assert "Times are medians of 2 runs" in end_to_end.STUDY.table(report)[0]


def test_a_model_that_never_forgets_has_not_reached_the_bar(small, monkeypatch):
    row = measured(small, monkeypatch, "vkd", repeats=1, kept=0.0, BAND=-1.0)
    assert row["reached"] is None and row["kept"] is None
    assert [(point["step"], point["images"]) for point in row["curve"]] == [(2, 12), (4, 24)]
    assert row["seconds_prepare"] < row["curve"][0]["seconds"] < row["curve"][1]["seconds"]


def test_forgotten_at_the_price_of_the_rest_is_not_kept(small, monkeypatch):
    row = measured(small, monkeypatch, "vkd", repeats=3, kept=100.0, BAND=1.0, LONG=0.0)  # every run is a long one
    assert row["reached"]["step"] == 2 and row["kept"] is None and row["repeats"] == 1
    assert [point["step"] for point in row["curve"]] == [2, 4]


def test_every_method_is_tried_in_three_ways() -> None:
    assert len(end_to_end.VARIANTS) == len(end_to_end.PLANS) == 3 * 8
    assert all(set(plan.lengths) == {"default", "tiny"} for plan in end_to_end.PLANS)
