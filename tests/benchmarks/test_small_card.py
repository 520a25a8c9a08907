"""The script of the job on a small card takes what the plan says, and every phase has its row, on a tiny model."""

import json

import pytest
import small_card
from test_real_size import SHAPE, tiny_facts


@pytest.mark.proof
def test_every_phase_has_its_row(tmp_path) -> None:
    job = small_card.SmallCardJob(tmp_path / "work", "llava-1.5-13b", tiny_facts(), SHAPE, "cpu", 22.5)
    assert job.fitting == {"stranger.quantize": "nf4"}
    result = tmp_path / "rows.json"
    small_card.measure(job, result, list(small_card.PHASES), {"device": "x"})
    rows = {row[0]: row[1:] for row in json.loads(result.read_text())["tables"]["phases"]["rows"]}
    assert list(rows) == list(small_card.PHASES)
    assert "checkpoint-12" in rows["train"][-1] and "--quantize nf4" in rows["attack"][-1]
    for phase in ("train", "eval", "attack"):
        assert 0 < float(rows[phase][2]) < 22.5  # as planned
