"""The local engine: masters move where bf16 would not, masked weights never move, a resume is bit-exact."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from fastvkd.engines.local import LocalEngine
from fastvkd.engines.optimizers import MOMENT_BYTES, MOMENT_BYTES_32BIT, _step_without_waiting
from fastvkd.engines.schedule import Schedule
from fastvkd.errors import SettingsError, TrainingError

OPTIMS = list(MOMENT_BYTES)


def tiny(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.Linear(128, 64)).to(dtype)


def engine_for(module, **overrides):
    settings = {
        "module": module,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "gradient_accumulation_steps": 1,
        "warmup_steps": 2,
        "max_steps": 20,
        "lr_scheduler_type": "cosine",
        "device": torch.device("cpu"),
    }
    return LocalEngine(list(module.named_parameters()), **(settings | overrides))


def train(engine, steps, first=0, micro_batches=1):
    norms = []
    for step in range(first, first + steps):
        for micro in range(micro_batches):
            x = torch.randn(8, 64, generator=torch.Generator().manual_seed(100 * step + micro))
            dtype = next(engine.forward_module.parameters()).dtype
            engine.backward((engine.forward_module(x.to(dtype)).float() - x).square().mean())
            norm = engine.step()
        norms.append(norm)
    return norms


@pytest.mark.parametrize("optim", OPTIMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_optimiser_lowers_the_loss(optim, dtype):
    module = tiny(dtype)
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(7)).to(dtype)
    engine = engine_for(module, optim=optim, learning_rate=1e-3 if "lion" not in optim else 3e-4)
    loss_before = (module(x).float() - x.float()).square().mean()
    train(engine, 20)
    assert (module(x).float() - x.float()).square().mean() < 0.95 * loss_before


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_small_updates_move_bf16_weights_through_their_masters(optim):
    module = tiny(torch.bfloat16)
    before = copy.deepcopy(module.state_dict())
    engine = engine_for(module, optim=optim, learning_rate=1e-5, warmup_steps=0, lr_scheduler_type="constant")
    train(engine, 20)
    masters = engine.state_dict()["masters"]
    moved = torch.cat([(masters[n] != before[n].float()).flatten() for n in masters if masters[n].ndim == 2])
    assert moved.float().mean() > 0.99
    assert all(torch.equal(p, masters[n].to(torch.bfloat16)) for n, p in module.named_parameters())


@pytest.mark.parametrize("optim", OPTIMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_whose_gradient_is_masked_stay_bit_identical(optim, dtype):
    module = tiny(dtype)
    before = copy.deepcopy(module.state_dict())
    masks = {n: torch.rand(p.shape) < 0.3 for n, p in module.named_parameters()}
    for name, parameter in module.named_parameters():
        parameter.register_hook(lambda grad, mask=masks[name]: grad * mask)
    train(engine_for(module, optim=optim), 10)
    for name, parameter in module.named_parameters():
        kept = ~masks[name]
        assert torch.equal(parameter[kept].view(torch.uint8), before[name][kept].view(torch.uint8))
        assert (parameter[~kept] != before[name][~kept]).float().mean() > 0.5


@pytest.mark.parametrize("optim", OPTIMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_exact(optim, dtype):
    straight = tiny(dtype)
    train(engine_for(straight, optim=optim), 10)

    first = tiny(dtype)
    engine = engine_for(first, optim=optim)
    train(engine, 6)
    saved = copy.deepcopy(engine.state_dict())
    resumed = tiny(dtype)
    engine = engine_for(resumed, optim=optim)
    assert engine.load_state_dict(saved)
    assert engine.updates == 6
    train(engine, 4, first=6)
    for (name, a), b in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_norms_and_biases_keep_32_bit_moments():
    module = tiny()
    engine = engine_for(module, optim="adamw_8bit")
    train(engine, 1)
    dtypes = {p.ndim: engine._optimizer.state[p]["state1"].dtype for p in module.parameters()}
    assert dtypes == {1: torch.float32, 2: torch.uint8}


@pytest.mark.parametrize("optim", OPTIMS)
def test_the_table_of_moment_bytes_is_what_the_optimisers_allocate(optim):
    module = nn.Linear(512, 512)
    engine = engine_for(module, optim=optim)
    engine.backward(module(torch.randn(4, 512)).square().mean())
    engine.step()

    def allocated(parameter):
        state = engine._optimizer.state[parameter]
        return sum(t.nbytes for k, t in state.items() if torch.is_tensor(t) and not k.startswith("qmap") and t.ndim)

    assert allocated(module.weight) == pytest.approx(MOMENT_BYTES[optim] * module.weight.numel())
    assert allocated(module.bias) == MOMENT_BYTES_32BIT[optim] * module.bias.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulated_micro_batches_equal_one_large_batch(dtype):
    x = torch.randn(16, 64).to(dtype)
    whole, parts = tiny(dtype), tiny(dtype)
    engine = engine_for(whole)
    engine.backward((whole(x).float() - 1).square().mean())
    norm = engine.step()
    engine = engine_for(parts, gradient_accumulation_steps=4)
    for chunk in x.chunk(4):
        engine.backward((parts(chunk).float() - 1).square().mean())
        accumulated = engine.step()
    assert accumulated is not None and engine.updates == 1
    torch.testing.assert_close(accumulated, norm, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=0)


def test_clipping_scales_the_update_and_reports_the_norm_before_it():
    clipped, free = tiny(), tiny()
    x = torch.randn(4, 64)
    norms = []
    for module, limit in ((clipped, 0.01), (free, 0.0)):
        engine = engine_for(module, max_grad_norm=limit)
        grads = []
        engine._optimizer.register_step_pre_hook(
            lambda *_, m=module, g=grads: g.extend(p.grad.clone() for p in m.parameters())
        )
        engine.backward((100 * module(x)).square().mean())
        norms.append(engine.step())
        total = torch.linalg.vector_norm(torch.stack([g.norm() for g in grads]))
        torch.testing.assert_close(total, torch.tensor(limit) if limit else norms[-1], rtol=1e-3, atol=0)
    assert torch.equal(norms[0], norms[1])


def test_an_engine_forgets_the_overrides_of_an_earlier_one():
    # bitsandbytes' own manager is keyed by id(), so a new matrix could inherit a dead bias's 32-bit override.
    from bitsandbytes.optim import GlobalOptimManager

    engine_for(tiny(), optim="adamw_8bit")
    shared = GlobalOptimManager.get_instance()
    assert not shared.pid2config and not shared.index2config


@pytest.mark.parametrize("optim", [name for name in OPTIMS if name.endswith("8bit")])
def test_an_8_bit_step_waits_for_no_parameter(optim, monkeypatch):
    """`sync_gpu` is where bitsandbytes waits for the GPU, once a parameter; only paged moments (on a GPU) need that."""
    from bitsandbytes.optim import optimizer as implementation

    waits = []
    monkeypatch.setattr(implementation, "sync_gpu", waits.append)
    engine = engine_for(tiny(), optim=optim)
    train(engine, 2)
    assert engine.updates == 2 and not waits
    implementation.sync_gpu("as before")
    assert waits == ["as before"]


def test_a_step_that_needs_to_wait_still_does(monkeypatch):
    import bitsandbytes
    from bitsandbytes.optim import optimizer as implementation

    waits = []
    monkeypatch.setattr(implementation, "sync_gpu", waits.append)
    parameter = nn.Parameter(torch.ones(64, 64))
    optimizers = [kind([parameter]) for kind in (bitsandbytes.optim.PagedAdamW8bit, bitsandbytes.optim.AdamW8bit)]
    for optimizer in optimizers:
        _step_without_waiting(optimizer)
        parameter.grad = torch.ones_like(parameter)
    optimizers[0].step()
    assert len(waits) == 2  # once for the parameter, once at the end
    side, default = object(), object()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: default)
    for stream, expected in ((side, 3), (default, 3)):  # the kernels go to the default stream whatever the current one
        monkeypatch.setattr(torch.cuda, "current_stream", lambda stream=stream: stream)
        optimizers[1].step()
        assert len(waits) == expected


def test_schedule_warms_up_then_decays():
    cosine = Schedule("cosine", warmup_steps=4, max_steps=12)
    factors = [cosine.factor(update) for update in range(13)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[8] == pytest.approx(0.5) and factors[11] > 0 and factors[12] == 0.0
    assert all(a >= b for a, b in pairwise(factors[4:]))
    assert Schedule("constant", warmup_steps=0, max_steps=12).factor(11) == 1.0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"optim": "adamw_8bits"}, "did you mean 'adamw_8bit'"),
        ({"lr_scheduler_type": "cos"}, "cosine"),
        ({"warmup_steps": 20}, "below max_steps=20"),
        ({"gradient_accumulation_steps": 0}, "at least 1"),
    ],
)
def test_impossible_settings_are_refused(setting, message):
    with pytest.raises(SettingsError, match=message):
        engine_for(tiny(), **setting)


def test_a_state_of_other_parameters_or_another_optimiser_is_refused():
    state = engine_for(tiny()).state_dict()
    with pytest.raises(TrainingError, match="is in only one of them"):
        engine_for(nn.Linear(3, 3)).load_state_dict(state)
    with pytest.raises(TrainingError, match="optim='adamw_torch'"):
        engine_for(tiny(), optim="adamw_8bit").load_state_dict(state)


def test_a_loss_that_reaches_no_parameter_is_refused():
    module = tiny()
    engine = engine_for(module)
    engine.backward(torch.ones((), requires_grad=True) * 2)
    with pytest.raises(TrainingError, match="no trainable parameter received a gradient"):
        engine.step()


def test_paged_moments_stay_paged_when_a_checkpoint_brings_them(monkeypatch):
    """Pages come from CUDA; here a buffer that says it is paged takes their place."""
    saved_by = engine_for(tiny(torch.float32), optim="paged_adamw_8bit")
    train(saved_by, 2)
    saved = copy.deepcopy(saved_by.state_dict())
    engine = engine_for(tiny(torch.float32), optim="paged_adamw_8bit")
    optimizer = engine._optimizer

    def buffer(parameter, dtype=torch.float32):
        made = torch.zeros_like(parameter, dtype=dtype)
        made.is_paged = parameter.ndim == 2  # bitsandbytes pages large ones only
        return made

    monkeypatch.setattr(optimizer, "is_paged", True)
    monkeypatch.setattr(optimizer, "get_state_buffer", buffer)
    engine.load_state_dict(saved)
    loaded = optimizer.state_dict()["state"]
    pages = [
        getattr(state[name], "is_paged", False) == (parameter.ndim == 2)
        for parameter, state in optimizer.state.items()
        for name in ("state1", "state2")
    ]
    assert len(pages) > 2 and all(pages)
    for before, after in zip(saved["moments"].values(), loaded.values(), strict=True):
        parts = [next(value for value in state.values() if isinstance(value, dict)) for state in (before, after)]
        assert all(torch.equal(parts[0][name], parts[1][name]) for name in ("state1", "state2"))


def test_a_released_engine_leaves_the_parameters_to_another():
    module = tiny(torch.bfloat16)
    first = engine_for(module)
    train(first, 1)
    first.release()
    assert all(parameter.grad is None for parameter in module.parameters())
    held = {name: master.clone() for name, master in first.state_dict()["masters"].items()}
    second = engine_for(module)
    norms = train(second, 2, first=1)
    assert all(norm > 0 for norm in norms)
    assert all(master.grad is None for master in first._masters.values())
    assert all(torch.equal(value, held[name]) for name, value in first.state_dict()["masters"].items())
