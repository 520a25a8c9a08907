"""A tiny LLaVA that was taught four people by heart, and one that was not: what every attack must tell apart."""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))

from tiny_llava import person, tiny_model, tiny_processor

from fastvkd.attacks.relearning import Attacker
from fastvkd.records import Questions
from fastvkd.unlearning.answers import answer_log_probabilities


@pytest.fixture(scope="session")
def known():
    """`processor`; `knows` and `blank`, the model that overfitted to the questions about everybody and the one from
    which it began; `forget` and `retain` profiles, one photo and two questions each."""
    processor = tiny_processor()
    people = [
        dataclasses.replace(profile, visual=Questions(choice=profile.visual.choice))
        for profile in map(person, range(8))
    ]
    forget, retain = people[:4], people[4:]
    blank, knows = tiny_model(processor, seed=0), tiny_model(processor, seed=0)
    attacker = Attacker(processor, forget + retain, batch_size=16)
    optimizer = torch.optim.AdamW(knows.parameters(), lr=3e-3)
    for _ in range(50):
        log_p, tokens = answer_log_probabilities(knows, attacker.batch(1))
        (-log_p.sum() / tokens.sum()).backward()
        torch.nn.utils.clip_grad_norm_(knows.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return SimpleNamespace(processor=processor, knows=knows.eval(), blank=blank.eval(), forget=forget, retain=retain)
