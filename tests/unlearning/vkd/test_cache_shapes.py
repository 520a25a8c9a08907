"""What a cache's index says of shapes is believed only where it is what was written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvkd.unlearning.vkd.teacher import FeatureCache


def cache(root: Path) -> FeatureCache:
    return FeatureCache(root, site="projector", dtype="float32", ingredients={})


def halved(index: dict[str, Any]) -> None:
    """The same bytes as twice as many rows of half the width."""
    index["width"] //= 2
    for place in index["places"].values():
        place[0], place[1] = 2 * place[0], 2 * place[1]


CHANGES = {
    "another width": lambda index: index.update(width=index["width"] * 2),
    "the same bytes in another shape": halved,
    "a width that is a text": lambda index: index.update(width=str(index["width"])),
    "a width below zero": lambda index: index.update(width=-8),
    "a row that is a text": lambda index: index["places"]["b"].__setitem__(0, "0"),
    "rows that are a fraction": lambda index: [place.__setitem__(1, 2.0) for place in index["places"].values()],
    "no rows": lambda index: [place.__setitem__(1, 0) for place in index["places"].values()],
}


@pytest.mark.parametrize("kind", CHANGES)
def test_features_of_another_shape_are_computed_again(tmp_path: Path, kind: str) -> None:
    written = cache(tmp_path)
    written.add({"a": torch.randn(2, 8), "b": torch.randn(4, 8)})
    assert cache(tmp_path).missing(["a", "b"]) == []
    (file,) = written.folder.glob("index-*.json")
    index = json.loads(file.read_text())
    CHANGES[kind](index)
    file.write_text(json.dumps(index))
    assert "b" in cache(tmp_path).missing(["a", "b"])
