"""Fixtures of the evaluation tests: one tiny LLaVA for all, and a few people to ask it about."""

from types import SimpleNamespace

import pytest
from tiny_llava import person, tiny_model, tiny_processor


@pytest.fixture(scope="session")
def tiny():
    processor = tiny_processor()
    return SimpleNamespace(processor=processor, model=tiny_model(processor))


@pytest.fixture
def people():
    return [person(number) for number in range(5)]
