"""The compiled kernels on a GPU: the same gate, no host synchronisation, memory, and rows beyond 2^31 elements."""

import pytest
import torch
from fastvkd_kernels import apply_mask_, fisher_accumulate_, frozen_rms_norm, frozen_swiglu, saliency_mask
from fastvkd_kernels import visual_distill_loss as distill_loss
from kernel_gate import (
    DISTANCES,
    HIDDEN_SIZES,
    SLACK,
    check_distill_loss,
    eager_rms_norm,
    eager_swiglu,
    make_case,
    moved_to,
)
from kernel_gate import worst_error as errors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_gpu(case: dict) -> dict:
    return moved_to(case, "cuda")


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("H", [*HIDDEN_SIZES, 8193, 16384])
def test_distill_loss_is_as_accurate_as_eager(H, dtype, distance):
    for options in (False, True):
        case = on_gpu(make_case(H, dtype, distance, options=options, layout="sliced"))
        assert not case["hidden"].is_contiguous()
        check_distill_loss(distill_loss, case)
    check_distill_loss(distill_loss, on_gpu(make_case(H, dtype, distance, target_dtype=torch.float8_e4m3fn)))


def test_no_host_synchronisation_and_bitwise_repeatable():
    case = on_gpu(make_case(5120, torch.bfloat16, "cosine"))
    hidden = case.pop("hidden").requires_grad_()
    torch.autograd.grad(distill_loss(hidden, **case), hidden)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients = [torch.autograd.grad(distill_loss(hidden, **case) * 2, hidden)[0] for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[1], gradients[2])


def test_extra_memory_is_the_gradient_and_a_few_bytes_a_row():
    T, H = 4096, 4096
    hidden = torch.randn(T, H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    target, rows = torch.randn_like(hidden).detach(), torch.arange(T, device="cuda")
    torch.autograd.grad(distill_loss(hidden, rows, target), hidden)
    torch.cuda.empty_cache()  # a block left by another test, and up to a megabyte too large, would count as a whole
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(distill_loss(hidden, rows, target), hidden)
    assert torch.cuda.max_memory_allocated() - before <= 2 * T * H + 8 * T + 8192


def test_rows_beyond_two_to_the_31_elements():
    H = 4096
    T = 2**31 // H + 8
    if torch.cuda.mem_get_info()[0] < 4 * T * H + 2**30:
        pytest.skip("needs 10 GB of free GPU memory")
    hidden = torch.ones(T, H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    rows = torch.tensor([T - 1, 0], device="cuda")
    loss = distill_loss(hidden, rows, torch.zeros(1, H, device="cuda"), target_rows=torch.zeros_like(rows))
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert loss == 1 and gradient[-1].any() and gradient[0].any() and not gradient[1:-1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_frozen_operations_are_as_accurate_as_eager(dtype):
    x, up, grad_y = (torch.randn(4, 100, 5120, device="cuda").to(dtype) for _ in range(3))
    weight = torch.randn(5120, device="cuda").to(dtype)
    ours = errors(lambda x: frozen_rms_norm(x, weight), lambda x: eager_rms_norm(x, weight.double(), 1e-6), [x], grad_y)
    eager = errors(
        lambda x: eager_rms_norm(x, weight, 1e-6), lambda x: eager_rms_norm(x, weight.double(), 1e-6), [x], grad_y
    )
    ours += errors(frozen_swiglu, eager_swiglu, [x, up], grad_y)
    eager += errors(eager_swiglu, eager_swiglu, [x, up], grad_y)
    assert all(value <= allowed + SLACK for value, allowed in zip(ours, eager, strict=True))


def test_saliency_equals_the_cpu():
    forget, retain = torch.rand(300, 77), torch.rand(300, 77)
    for granularity in ("weight", "neuron"):
        mask = saliency_mask(forget.cuda(), retain.cuda(), threshold=1.1, granularity=granularity)
        expected = saliency_mask(forget, retain, threshold=1.1, granularity=granularity)
        assert torch.equal(mask.to_bool().cpu(), expected.to_bool()) or granularity == "neuron"
        grad = torch.randn(300, 77)
        assert torch.equal(apply_mask_(grad.cuda(), mask).cpu(), apply_mask_(grad.clone(), mask.to("cpu")))
        torch.testing.assert_close(
            fisher_accumulate_(forget.cuda(), grad.cuda()).cpu(), fisher_accumulate_(forget.clone(), grad)
        )
