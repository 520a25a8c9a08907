"""Masters in long buffers get the bits that they get one by one, also after a resume from either, in fewer calls."""

import copy

import pytest
import torch
from torch import nn

from fastvkd.engines import flat, local
from fastvkd.engines.local import LocalEngine
from fastvkd.engines.optimizers import EIGHT_BIT
from fastvkd.errors import TrainingError


class Odd(nn.Module):
    """Matrices of whole blocks and of broken ones, a small one, vectors, and a weight that no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.whole = nn.Linear(64, 128)
        self.broken = nn.Linear(128, 77)  # 9856 weights: 38.5 blocks
        self.small = nn.Linear(77, 10)
        self.patches = nn.Conv2d(3, 40, 7).to(memory_format=torch.channels_last)  # 5880 weights
        self.unused = nn.Linear(64, 80)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (
            self.small(self.broken(self.whole(x).tanh()).tanh()).square().mean()
            + self.patches(x.new_ones(1, 3, 7, 7) * x.mean()).square().mean()
        )


def engine_for(optim: str, *, buffers: bool, monkeypatch: pytest.MonkeyPatch, device: str = "cpu") -> LocalEngine:
    """An engine over an `Odd` in bf16, with masters in buffers or one by one."""
    module = Odd().bfloat16().to(device)
    if device == "cuda":  # where bitsandbytes alone takes weights in the order they have in memory
        module.to(memory_format=torch.contiguous_format)
    with monkeypatch.context() as only:
        if not buffers:
            only.setattr(local, "EIGHT_BIT", ())
        engine = LocalEngine(
            list(module.named_parameters()), module=module, optim=optim, learning_rate=1e-3, weight_decay=0.1,
            max_grad_norm=1.0, gradient_accumulation_steps=1, warmup_steps=0, max_steps=20,
            lr_scheduler_type="constant", device=torch.device(device),
        )  # fmt: skip
    assert isinstance(engine._optimizer, flat.FlatOptimizer) == buffers
    return engine


def train(engine: LocalEngine, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step)).bfloat16().to(engine.device)
        engine.backward(engine.forward_module(x))
        engine.step()


def reached(engine: LocalEngine) -> dict[str, torch.Tensor]:
    masters = engine.state_dict()["masters"]
    return {name: master.clone() for name, master in masters.items() if "unused" not in name}


def assert_same_bits(found: LocalEngine, expected: LocalEngine) -> None:
    for name, master in reached(expected).items():
        assert torch.equal(reached(found)[name], master), name
    ours, theirs = (engine.state_dict()["moments"] for engine in (found, expected))
    for index, state in theirs.items():
        nested = [content.items() if isinstance(content, dict) else [(key, content)] for key, content in state.items()]
        for key, value in (item for items in nested for item in items):
            assert torch.equal(torch.as_tensor(ours[index][key]), torch.as_tensor(value)), (index, key)


@pytest.mark.parametrize("longest", [2**25, 9000])
@pytest.mark.parametrize("optim", EIGHT_BIT)
def test_updates_and_moments_are_those_of_one_tensor_at_a_time(optim, longest, monkeypatch) -> None:
    monkeypatch.setattr(flat, "LONGEST", longest)
    together, alone = (engine_for(optim, buffers=b, monkeypatch=monkeypatch) for b in (True, False))
    assert len(together._optimizer.buffers) == (3 if longest == 2**25 else 6)
    train(together, range(6))
    train(alone, range(6))
    assert_same_bits(together, alone)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optim", ["adamw_8bit", "lion_8bit"])
def test_a_gpu_gives_the_same_bits_too(optim, monkeypatch, tmp_path) -> None:
    """AdEMAMix is left out: alone, a tensor of broken blocks has two averages in one block there."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    together, alone = (engine_for(optim, buffers=b, monkeypatch=monkeypatch, device="cuda") for b in (True, False))
    train(together, range(6))
    train(alone, range(6))
    assert_same_bits(together, alone)
    torch.save(alone.state_dict(), tmp_path / "state.pt")
    resumed = engine_for(optim, buffers=True, monkeypatch=monkeypatch, device="cuda")
    assert resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(resumed, range(6, 8))
    train(alone, range(6, 8))
    assert_same_bits(resumed, alone)


@pytest.mark.parametrize("optim", EIGHT_BIT)
@pytest.mark.parametrize(("writes", "reads"), [(True, True), (True, False), (False, True)])
def test_either_goes_on_from_what_the_other_saved(optim, writes, reads, monkeypatch, tmp_path) -> None:
    straight = engine_for(optim, buffers=False, monkeypatch=monkeypatch)
    train(straight, range(8))
    first = engine_for(optim, buffers=writes, monkeypatch=monkeypatch)
    train(first, range(5))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    resumed = engine_for(optim, buffers=reads, monkeypatch=monkeypatch)
    assert resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(resumed, range(5, 8))
    assert all(torch.equal(m, reached(straight)[n]) for n, m in reached(resumed).items())


def test_a_weight_without_a_gradient_counts_as_one_with_a_gradient_of_zero(monkeypatch) -> None:
    engine = engine_for("adamw_8bit", buffers=True, monkeypatch=monkeypatch)
    before = copy.deepcopy(engine.state_dict()["masters"])
    train(engine, range(2))
    after = engine.state_dict()["masters"]
    # decay alone: twice by lr * 0.1; the bias lies in a buffer that is not decayed
    torch.testing.assert_close(after["unused.weight"], before["unused.weight"] * (1 - 1e-4) ** 2)
    assert torch.equal(after["unused.bias"], before["unused.bias"])


def test_a_step_calls_the_optimiser_once_a_buffer_and_leaves_no_gradient(monkeypatch) -> None:
    calls = []
    for buffers in (True, False):
        engine = engine_for("adamw_8bit", buffers=buffers, monkeypatch=monkeypatch)
        inner = engine._optimizer._optimizer if buffers else engine._optimizer
        update, count = inner.update_step, []
        monkeypatch.setattr(inner, "update_step", lambda *a, u=update, c=count: (c.append(1), u(*a)))
        train(engine, range(1))
        calls.append(len(count))
        held = [*engine._masters.values(), *(p for group in inner.param_groups for p in group["params"])]
        assert all(parameter.grad is None for parameter in held)
    assert calls == [3, 8]


def test_float32_weights_stay_where_they_are() -> None:
    module = nn.Linear(64, 128)
    where = module.weight.data_ptr()
    engine = LocalEngine(
        list(module.named_parameters()), module=module, optim="adamw_8bit", learning_rate=1e-3, weight_decay=0.0,
        max_grad_norm=1.0, gradient_accumulation_steps=1, warmup_steps=0, max_steps=2, lr_scheduler_type="constant",
        device=torch.device("cpu"),
    )  # fmt: skip
    engine.backward(module(torch.ones(1, 64)).sum())
    engine.step()
    assert module.weight.data_ptr() == where and engine._masters["weight"] is module.weight


def test_a_loss_that_reaches_nothing_is_refused_with_buffers_too(monkeypatch) -> None:
    engine = engine_for("adamw_8bit", buffers=True, monkeypatch=monkeypatch)
    engine.backward(torch.ones((), requires_grad=True) * 2)
    with pytest.raises(TrainingError, match="no trainable parameter"):
        engine.step()
