"""A tiny LLaVA that was taught four people by heart, and one that was not: what every attack must tell apart."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))

from tiny_llava import person, tiny_model, tiny_processor

from fastvkd.attacks.relearning import Attacker
from fastvkd.unlearning.answers import answer_log_probabilities


@pytest.fixture(scope="session")
def known():
    """`processor`; `knows` and `blank`, the model that overfitted to the questions about `forget` and the one from
    which it began; `forget`, `unseen` and `retain` profiles."""
    processor = tiny_processor()
    forget, retain = [person(n) for n in range(4)], [person(n) for n in range(4, 8)]
    blank, knows = tiny_model(processor, seed=0), tiny_model(processor, seed=0)
    attacker = Attacker(processor, forget + retain, batch_size=32)
    optimizer = torch.optim.AdamW(knows.parameters(), lr=3e-3)
    for step in range(1, 61):
        log_p, tokens = answer_log_probabilities(knows, attacker.batch(step % 8))
        (-log_p.sum() / tokens.sum()).backward()
        torch.nn.utils.clip_grad_norm_(knows.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return SimpleNamespace(processor=processor, knows=knows.eval(), blank=blank.eval(), forget=forget, retain=retain)
