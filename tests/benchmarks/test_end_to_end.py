"""The end-to-end benchmark: its clock, its bar and its rows, on a small random model."""

import end_to_end
import pytest
import tables
from random_world import world_over


@pytest.fixture(scope="module")
def small(world, tmp_path_factory):
    """A benchmark world over the tests' random model instead of a trained one."""
    return world_over(world, tmp_path_factory.mktemp("end-to-end"))


@pytest.mark.parametrize("method", ["vkd", "ga"])
def test_a_row_holds_the_way_to_the_bar(small, monkeypatch, method):
    monkeypatch.setattr(end_to_end, "BAND", 1.0)  # a random model is near chance before the first step
    overrides = {"method": method, "per_device_train_batch_size": 6, "device": "cpu"}
    row = end_to_end.measure(small, end_to_end.recipe(method, "a try", 4, 2, overrides, None), repeats=2, vanilla=0.0)
    assert row["curve"] == [row["reached"]] == [row["kept"]]  # nobody asks on once it is there
    assert (row["reached"]["step"], row["reached"]["images"]) == (2, 12)
    assert row["seconds_prepare"] < row["reached"]["seconds"] < row["seconds"]
    assert set(row["final"]) == {"forget", "test", "retain", "realworld"}
    assert row["repeats"] == 2
    report = {
        "device": "a test", "versions": {}, "date": "2000-01-01", "seed": 0, "size": "tiny", "repeats": 2,
        "bar": {"chance": 0.25, "band": 1.0, "kept": 0.95, "vanilla_retain": 0.9, "samples": 8}, "rows": [row],
    }  # fmt: skip
    assert f"| {method} | a try |" in "\n".join(tables.end_to_end_table(report))


def test_a_model_that_never_forgets_has_not_reached_the_bar(small, monkeypatch):
    monkeypatch.setattr(end_to_end, "BAND", -1.0)
    overrides = {"per_device_train_batch_size": 6, "device": "cpu"}
    row = end_to_end.measure(small, end_to_end.recipe("vkd", "another", 4, 2, overrides, None), repeats=1, vanilla=0.0)
    assert row["reached"] is None and row["kept"] is None
    assert [(point["step"], point["images"]) for point in row["curve"]] == [(2, 12), (4, 24)]
    assert row["seconds_prepare"] < row["curve"][0]["seconds"] < row["curve"][1]["seconds"]


def test_forgotten_at_the_price_of_the_rest_is_not_kept(small, monkeypatch):
    monkeypatch.setattr(end_to_end, "BAND", 1.0)
    monkeypatch.setattr(end_to_end, "LONG", 0.0)  # every run is a long one
    overrides = {"per_device_train_batch_size": 6, "device": "cpu"}
    row = end_to_end.measure(small, end_to_end.recipe("vkd", "a third", 4, 2, overrides, None), repeats=3, vanilla=2.0)
    assert row["reached"]["step"] == 2 and row["kept"] is None and row["repeats"] == 1
    assert [point["step"] for point in row["curve"]] == [2, 4]


def test_every_method_is_tried_in_three_ways() -> None:
    for size in ("default", "tiny"):
        plans = end_to_end.recipes(size)
        assert len({(plan["method"], plan["what"]) for plan in plans}) == len(plans) == 3 * 8
