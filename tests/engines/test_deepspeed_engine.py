"""Two CPU ranks through the real launcher under every preset: the same weights as one process, exact resume, masks."""

import os
import time
from pathlib import Path

import engine_scenarios as scenarios
import pytest
import torch
from launching import kind_of_cpu, launch
from safetensors.torch import load_file

from fastvkd.engines.checkpoints import load_checkpoint
from fastvkd.engines.ds_config import PRESETS, complete_ds_config, read_ds_config
from fastvkd.engines.local import LocalEngine
from fastvkd.errors import SettingsError
from fastvkd.models.shards import read_safetensors_header

CASES = scenarios.CASES


def local_engine(kind):
    dtype, optim = scenarios.KINDS[kind]
    module = scenarios.Tiny(dtype)
    return LocalEngine(
        module.trained(),
        module=module,
        optim=optim,
        max_grad_norm=0.5,
        gradient_accumulation_steps=scenarios.ACCUMULATION,
        device=torch.device("cpu"),
        **scenarios.SETTINGS,
    )


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The local engine's checkpoints, norms and final masters for each kind."""
    out = tmp_path_factory.mktemp("engines")
    results = {}
    for kind in scenarios.KINDS:
        engine = local_engine(kind)
        norms = scenarios.train_to(engine, scenarios.SAVED_AT)
        scenarios.save(engine, out / "local" / kind)
        norms += scenarios.train_to(engine, scenarios.UPDATES)
        results[kind] = norms, engine.state_dict()["masters"], engine.weights()
    return out, results


@pytest.fixture(scope="module")
def ranks(local):
    """The folder in which two launched ranks left their results."""
    out, results = local
    launch(Path(scenarios.__file__), str(out), log=out / "log")
    return out, results


def relative_difference(a, b):
    return max(float((a[n].float() - b[n].float()).norm() / b[n].float().norm()) for n in b)


def test_what_one_kind_of_cpu_compiled_is_kept_apart_from_anothers():
    one = "processor\t: 0\nmodel name\t: A\ncpu MHz\t\t: 2400.0\nflags\t\t: fpu avx2\n\nprocessor\t: 1\nflags\t\t: x\n"
    assert kind_of_cpu(one) == kind_of_cpu(one.replace("2400.0", "3100.5").replace(": x", ": y"))
    assert (
        len({kind_of_cpu(text) for text in (one, one.replace("avx2", "avx2 avx512f"), one.replace(": A", ": B"))}) == 3
    )


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "kind"), CASES)
def test_two_ranks_end_where_one_process_does(ranks, preset, kind):
    out, results = ranks
    norms, masters, _ = results[kind]
    folder = out / preset / kind
    # In bf16 each rank rounds its own sums; ZeRO-0 also accumulates in bf16, the others in float32.
    tolerance = 1e-5 if kind == "float32-adamw_torch" else (0.01 if preset == "zero0" else 0.002)
    if (
        "lion" in kind
    ):  # it steps by the sign: a momentum that rounds to the other side of zero moves a weight two steps
        tolerance = 0.005
    assert relative_difference(load_file(folder / "masters.safetensors"), masters) < tolerance
    assert torch.load(folder / "report.pt", weights_only=True)["norms"] == pytest.approx(
        norms, rel=max(tolerance, 1e-4)
    )


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "kind"), CASES)
def test_resume_at_the_same_world_size_is_bit_exact(ranks, preset, kind):
    folder = ranks[0] / preset / kind
    final, resumed = load_file(folder / "final.safetensors"), load_file(folder / "resumed.safetensors")
    assert all(torch.equal(final[n], resumed[n]) for n in final)
    assert torch.load(folder / "report.pt", weights_only=True)["notice"] == ""


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "kind"), CASES)
def test_masked_weights_stay_bit_identical_after_flattening(ranks, preset, kind):
    start = scenarios.Tiny(scenarios.KINDS[kind][0])
    final = load_file(ranks[0] / preset / kind / "final.safetensors")
    moved = 0
    for name, parameter in start.trained():
        held = ~start.masks[name]
        assert torch.equal(final[name][held], parameter[held]), name
        moved += int((final[name] != parameter).sum())
    assert moved > 5000


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "kind"), CASES)
def test_checkpoints_go_between_world_sizes(ranks, preset, kind):
    out, _ = ranks
    report = torch.load(out / preset / kind / "report.pt", weights_only=True)
    assert report["updates"] == scenarios.SAVED_AT and "moments start from zero" in report["local"]
    source = local_engine(kind)
    assert load_checkpoint(out / "local" / kind / "checkpoint-4", source, base_model=scenarios.BASE).notice == ""
    expected = source.state_dict()["masters"]
    taken_over = load_file(out / preset / kind / "taken_over.safetensors")
    assert all(torch.equal(taken_over[n], expected[n]) for n in expected)

    engine = local_engine(kind)
    resumed = load_checkpoint(out / preset / kind / "checkpoint-4", engine, base_model=scenarios.BASE)
    assert "2 rank(s)" in resumed.notice and engine.updates == scenarios.SAVED_AT
    scenarios.train_to(engine, scenarios.SAVED_AT + 1)


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "kind"), CASES)
def test_nothing_frozen_is_in_a_checkpoint(ranks, preset, kind):
    checkpoint = ranks[0] / preset / kind / "checkpoint-4"
    trained = {n for n, _ in scenarios.Tiny(torch.float32).trained()}
    header, _ = read_safetensors_header(checkpoint / "visual.safetensors")
    assert set(header) - {"__metadata__"} == trained
    weights = sum(p.numel() for _, p in scenarios.Tiny(torch.float32).trained())
    moments = 0
    for rank in (0, 1):
        state = torch.load(checkpoint / f"rank-{rank}.pt", weights_only=True)["engine"]["moments"]
        moments += sum(
            t.numel()
            for values in state.values()
            for key, t in flat(values)
            if key in ("exp_avg", "state1") and t.ndim  # one first moment for each weight, over both ranks
        )
    copies = 2 if preset == "zero0" else 1
    if "ademamix" in kind:  # its fast and its slow average are one tensor
        copies *= 2
    assert weights * copies <= moments <= weights * copies + 64


def flat(values):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value)
        elif torch.is_tensor(value):
            yield key, value


@pytest.mark.slow
def test_norms_and_biases_keep_32_bit_moments_under_zero(ranks):
    # The flattened matrices are one group with 8-bit moments, the flattened norms and biases another in 32 bit.
    for preset in ("zero0", "zero2", "zero3"):
        part = torch.load(ranks[0] / preset / "bfloat16-adamw_8bit/checkpoint-4/rank-0.pt", weights_only=True)
        dtypes = {t.dtype for v in part["engine"]["moments"].values() for k, t in flat(v) if k == "state1"}
        assert dtypes == {torch.uint8, torch.float32}, preset


@pytest.mark.slow
def test_ranks_agree_and_average(ranks):
    report = torch.load(ranks[0] / "zero2" / "float32-adamw_torch" / "report.pt", weights_only=True)
    assert any(Path(os.environ["TORCH_EXTENSIONS_DIR"]).iterdir())  # the ranks found their operation there
    assert report["agreed"] is True and report["mean"].tolist() == [0.5]


def complete(config, **changes):
    settings = {"micro_batch": 4, "gradient_accumulation_steps": 2, "max_grad_norm": 1.0, "bf16": True}
    settings |= {"optim": "adamw_8bit", "quantize_llm": "none", "world_size": 2, "on_gpu": True}
    return complete_ds_config(config, **(settings | changes))


@pytest.mark.parametrize("preset", sorted(p.stem for p in PRESETS.glob("*.json")))
def test_every_preset_is_filled_in(preset, tmp_path):
    config = read_ds_config(preset)
    if "nvme" in preset:
        config["zero_optimization"]["offload_param"]["nvme_path"] = str(tmp_path)
    filled = complete(config, optim="adamw_torch")
    assert "auto" not in str(filled)
    assert filled["train_batch_size"] == 16 and filled["bf16"]["enabled"] and filled["gradient_clipping"] == 1.0
    assert read_ds_config(str(PRESETS / f"{preset}.json"))["zero_optimization"]["stage"] == int(preset[4])


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ({"zero_optimization": {"stage": 4}}, {}, "stage=4: allowed are 0, 1, 2, 3"),
        ({"optimizer": {"type": "Adam"}}, {}, "remove it, optim decides"),
        ({"fp16": {"enabled": True}}, {}, "use bf16=true"),
        ({"gradient_accumulation_steps": 8}, {}, "=8 in the DeepSpeed configuration, but .*=2: use 'auto'"),
        ({"bf16": {"enabled": False}}, {}, "bf16.enabled=False .* but bf16=True"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, {}, "use zero3_offload"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, {}, "set optim=adamw_torch"),
        ({"zero_optimization": {"stage": 3}}, {"quantize_llm": "nf4"}, "cannot be partitioned"),
        ({"zero_optimization": {"stage": 2, "x": "auto"}}, {}, "zero_optimization.x='auto'.*give a value"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/no/disk"}}},
            {},
            "'/no/disk' is no folder",
        ),
    ],
)
def test_contradictions_are_refused_before_anything_is_loaded(config, changes, message):
    with pytest.raises(SettingsError, match=message) as error:
        complete(config, **changes)
    assert "\n" not in str(error.value)


def test_an_unknown_preset_is_refused_with_the_nearest_one(tmp_path):
    with pytest.raises(SettingsError, match="did you mean 'zero3_offload'"):
        read_ds_config("zero3_ofload")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(SettingsError, match="not JSON"):
        read_ds_config(str(tmp_path / "x.json"))


def test_a_process_that_was_killed_while_it_compiled_holds_nobody_up(tmp_path, monkeypatch):
    from fastvkd.engines.deepspeed_engine import locks_end

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    old, new = (tmp_path / "cpython-311" / name / "lock" for name in ("deepspeed_shm_comm", "deepspeed_other"))
    for lock in (old, new):
        lock.parent.mkdir(parents=True)
        lock.touch()
    os.utime(old, (0, 0))
    with locks_end(300.0):
        while old.exists():
            time.sleep(0.01)
    assert new.exists()
