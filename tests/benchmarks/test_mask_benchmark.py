"""The comparison of masks: which share each lets move, and where a run is compared with the others."""

from pathlib import Path

import pytest
from random_world import world_over
from study import mask
from world import World


@pytest.fixture
def random_world(world, tmp_path: Path, monkeypatch) -> World:
    """A `World` whose vanilla model is the shared random one, which is at chance from the start."""
    small = world_over(world, tmp_path)
    monkeypatch.setattr(mask, "STEPS", 4)
    monkeypatch.setattr(mask, "EVERY", 2)
    return small


def test_a_row_ends_at_the_bar_and_names_the_share_that_moved(random_world: World, monkeypatch) -> None:
    monkeypatch.setattr(mask, "BAND", 1.0)
    rows = [{"seed": 0, **mask.measure(random_world, f"lr 2e-4, lambda 1; {name}")} for name in mask.MASKS]
    for row in rows:
        assert [point["step"] for point in row["curve"]] == [2]
        assert set(row["reached"]) == {"step", "forget", "test", "retain", "realworld"}
    share = {row["mask"]: row["share"] for row in rows}
    assert share["none"] == 1.0
    assert 0 < share["ratio at least 1"] < 1
    assert share["highest ratio, half"] == pytest.approx(0.5, abs=0.01)
    assert share["highest ratio, a fifth"] == pytest.approx(0.2, abs=0.01)
    assert share["random, half"] == pytest.approx(0.5, abs=0.01)
    assert share["random, a fifth"] == pytest.approx(0.2, abs=0.01)
    assert len({line.count("|") for line in mask.STUDY.table({"rows": rows})}) == 1


def test_a_run_that_never_forgets_says_so(random_world: World, monkeypatch) -> None:
    monkeypatch.setattr(mask, "BAND", -1.0)
    row = {"seed": 0, **mask.measure(random_world, "lr 2e-4, lambda 1; none")}
    assert row["reached"] is None
    assert [point["step"] for point in row["curve"]] == [2, 4]
    assert "| lr 2e-4, lambda 1 | none | 0 | 100 | > 4 | - |" in "\n".join(mask.STUDY.table({"rows": [row]}))
