"""Fixtures for the model tests: a tiny model of every family, with weights large enough that a mistake shows."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import tiny


@pytest.fixture(params=list(tiny.BUILDERS), scope="module")
def case(request, tmp_path_factory):
    """One family: the untouched full model, its config, processor, folder on disk and the places of its parts."""
    config, processor = tiny.BUILDERS[request.param]()
    model = tiny.randomised(config)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return SimpleNamespace(
        name=request.param,
        config=config,
        processor=processor,
        model=model,
        folder=folder,
        places=tiny.PLACES[request.param],
    )


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A LLaVA-1.5 alone, on disk as many small shards."""
    config, processor = tiny.llava()
    model = tiny.randomised(config)
    folder = tmp_path_factory.mktemp("llava-sharded")
    model.save_pretrained(folder, max_shard_size="12KB")
    processor.save_pretrained(folder)
    return SimpleNamespace(config=config, processor=processor, model=model, folder=folder)
