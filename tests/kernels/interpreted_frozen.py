"""The frozen-LLM Triton kernels under the interpreter, which test_interpreter.py switches on."""

import kernel_gate
import pytest
import torch
from fastvkd_kernels import backend, frozen_rms_norm, frozen_swiglu
from kernel_gate import HIDDEN_SIZES, SLACK, eager_rms_norm, eager_swiglu, worst_error

assert backend.INTERPRETED, "run this file with TRITON_INTERPRET=1 (test_interpreter.py does)"
kernel_gate.round_bfloat16_as_hardware_does()

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("H", [*HIDDEN_SIZES, 8193])
def test_rms_norm_is_as_accurate_as_eager(H, dtype):
    torch.manual_seed(H)
    x, grad_y = (torch.randn(2, 3, H).to(dtype) for _ in range(2))
    weight = torch.randn(H).to(dtype)
    ours, eager = (
        worst_error(lambda x, f=f: f(x, weight, 1e-6), lambda x: eager_rms_norm(x, weight.double(), 1e-6), [x], grad_y)
        for f in (lambda *a: frozen_rms_norm(*a, backend="triton"), eager_rms_norm)
    )
    for value, allowed in zip(ours, eager, strict=True):
        assert value <= allowed + SLACK


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("H", [1, 63, 1000, 11008])
def test_swiglu_is_as_accurate_as_eager(H, dtype):
    torch.manual_seed(H)
    gate, up, grad_y = (3 * torch.randn(2, 3, H).to(dtype) for _ in range(3))
    ours, eager = (
        worst_error(f, eager_swiglu, [gate, up], grad_y)
        for f in (lambda *a: frozen_swiglu(*a, backend="triton"), eager_swiglu)
    )
    for value, allowed in zip(ours, eager, strict=True):
        assert value <= allowed + SLACK


def test_swiglu_far_from_zero_and_strided():
    gate = torch.tensor([[-200.0, 0.0, 200.0], [-90.0, 1.0, 90.0]]).T.requires_grad_()
    up = torch.ones(3, 2, requires_grad=True)
    frozen_swiglu(gate, up, backend="triton").sum().backward()
    assert gate.grad.isfinite().all() and up.grad.isfinite().all()
    torch.testing.assert_close(up.grad, torch.nn.functional.silu(gate.detach()))


def test_strided_and_empty_rms_norm():
    x = torch.randn(4, 6, 10).transpose(0, 1)[:, ::2]
    weight = torch.randn(10)
    torch.testing.assert_close(frozen_rms_norm(x, weight, backend="triton"), eager_rms_norm(x, weight, 1e-6))
    assert frozen_rms_norm(x[:0], weight, backend="triton").shape == (0, *x.shape[1:])
