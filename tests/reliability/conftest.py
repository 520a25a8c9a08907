"""Whole folders that the tests of this folder share; no test may write into them."""

import sys
from pathlib import Path

import pytest
from wholes import Wholes, make_wholes

sys.path.append(str(Path(__file__).parents[1] / "reporting"))  # an example of a report


@pytest.fixture(scope="session")
def wholes(world, tmp_path_factory: pytest.TempPathFactory) -> Wholes:
    return make_wholes(world, tmp_path_factory.mktemp("wholes"))
