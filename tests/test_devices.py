"""Devices by name, and a GPU that is there but cannot be used: what torch says is faked, so no GPU is needed."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from fastvkd import devices
from fastvkd.cli import main
from fastvkd.devices import at_once, pick_device, usable_bytes, warn_of_slow_bfloat16
from fastvkd.errors import SettingsError
from fastvkd.unlearning.prefetch import prefetched


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """torch sees two GPUs; the list has what was made the current device."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


def test_a_numbered_gpu_becomes_the_current_one(two_gpus: list[torch.device]) -> None:
    assert pick_device("cuda:1") == torch.device("cuda:1") and two_gpus == [torch.device("cuda:1")]
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda") and len(two_gpus) == 1
    with pytest.raises(SettingsError, match="device=cuda:2: there is no such GPU; allowed are cuda:0 to cuda:1"):
        pick_device("cuda:2")


def test_the_thread_that_builds_batches_works_beside_the_current_gpu(
    two_gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    with prefetched(lambda step: step, range(2), 1) as batches:
        assert list(batches) == [0, 1]
    assert two_gpus == [1]


def too_old() -> bool:
    warnings.warn("The NVIDIA driver on your system is too old (found version 11040). Please update", stacklevel=1)
    return False


@pytest.mark.parametrize(
    ("available", "driver", "cuda", "said"),
    [
        (too_old, True, "12.8", "driver on your system is too old); update its driver to one for CUDA 12.8"),
        (too_old, False, "12.8", "driver on your system is too old"),
        (lambda: False, True, "12.8", "update its driver to one for CUDA 12.8"),
        (lambda: False, True, None, "is built without CUDA"),
        (lambda: False, False, "12.8", ""),
    ],
)
def test_a_gpu_that_cannot_be_used_is_not_passed_over_in_silence(
    available, driver, cuda, said, tmp_path, monkeypatch, caplog, recwarn
) -> None:
    (tmp_path / "version").touch()
    monkeypatch.setattr(devices, "_NVIDIA_DRIVER", tmp_path / ("version" if driver else "none"))
    monkeypatch.setattr(torch.cuda, "is_available", available)
    monkeypatch.setattr(torch, "version", SimpleNamespace(cuda=cuda))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert pick_device("auto") == torch.device("cpu") and not recwarn.list
    assert len(caplog.messages) == bool(said) and said in "".join(caplog.messages)
    with pytest.raises(SettingsError, match=f"device=cuda: .*{said[:20] or 'sees no GPU'}.*set device=cpu"):
        pick_device("cuda")
    caplog.clear()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # who hides the GPU wants the CPU
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu") and not caplog.messages


def test_what_of_a_card_can_be_used_and_what_goes_at_once() -> None:
    assert usable_bytes(22.5 * devices.GIB) == pytest.approx(22.5 * 0.96 * devices.GIB - 800 * 2**20, rel=1e-6)
    assert at_once(1) == 64 and at_once(1, 8) == 8 and at_once(devices.GIB) == 2 and at_once(9 * devices.GIB) == 1


@pytest.mark.parametrize(
    ("command", "module", "name", "mends"),
    [
        (["train", "model_name_or_path=m", "data=d"], "fastvkd.unlearning.loop", "unlearn", "fastvkd plan"),
        (["eval", "--model", "m", "--data", "d"], "fastvkd.evaluation.run", "evaluate", "--quantize nf4"),
        (["attack", "--model", "m", "--data", "d"], "fastvkd.attacks.run", "attack_run", "relearn --weights visual"),
        (
            ["steer", "--model", "m", "--data", "d", "--layers", "1"],
            "fastvkd.unlearning.steering",
            "fit_to_folder",
            "--device-map auto",
        ),
    ],
)
@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.20 GiB. GPU 0 has a total capacity ..."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_full_gpu_is_one_line_with_the_mend(command, module, name, mends, error, monkeypatch, capsys) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(f"{module}.{name}", full)
    assert main(command) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.endswith("ing ...")]
    assert len(lines) == 1 and lines[0].startswith("fastvkd: error: the GPU's memory is full") and mends in lines[0]
    assert ("tried to allocate 3.20 GiB" in lines[0]) == ("3.20" in str(error))
    error = RuntimeError("a mistake of ours")
    with pytest.raises(RuntimeError, match="of ours"):
        main(command)


@pytest.mark.parametrize(
    ("device", "dtype", "has", "lines"),
    [
        ("cpu", torch.bfloat16, False, 1),
        ("cpu", torch.bfloat16, True, 0),
        ("cpu", torch.float32, False, 0),
        ("cuda", torch.bfloat16, False, 0),
    ],
)
def test_bfloat16_on_a_cpu_without_it_is_said_to_be_slow(device, dtype, has, lines, monkeypatch, caplog) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has)
    warn_of_slow_bfloat16(torch.device(device), dtype)
    assert len(caplog.messages) == lines and all("50 times" in message for message in caplog.messages)
