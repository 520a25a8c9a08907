"""The saliency Triton kernels under the interpreter, which test_interpreter.py switches on, against the twins."""

import pytest
import torch
from fastvkd_kernels import apply_mask_, backend, fisher_accumulate_, saliency_mask
from hypothesis import given, settings
from hypothesis import strategies as st

assert backend.INTERPRETED, "run this file with TRITON_INTERPRET=1 (test_interpreter.py does)"


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    granularity=st.sampled_from(["weight", "neuron"]),
    threshold=st.floats(0, 3),
    seed=st.integers(0, 2**31),
)
def test_kernels_equal_the_twins(shape, granularity, threshold, seed):
    generator = torch.Generator().manual_seed(seed)
    forget, retain = (torch.randn(shape, generator=generator).square() for _ in range(2))
    forget[forget < 0.3] = 0
    retain[retain < 0.3] = 0
    ours, twin = (
        saliency_mask(forget, retain, threshold=threshold, granularity=granularity, backend=b)
        for b in ("triton", "torch")
    )
    assert torch.equal(ours.bits, twin.bits)
    grad = torch.randn(shape, generator=generator)
    masked, expected = (apply_mask_(grad.clone(), twin, backend=b) for b in ("triton", "torch"))
    assert torch.equal(masked, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fisher_and_masking_of_every_dtype(dtype):
    grad = torch.randn(37, 53).to(dtype)
    grad[0, 0], grad[0, 1] = float("nan"), float("inf")
    fisher = torch.rand(37, 53)
    ours, twin = (fisher_accumulate_(fisher.clone(), grad, scale=0.25, backend=b) for b in ("triton", "torch"))
    torch.testing.assert_close(ours, twin, equal_nan=True, rtol=1e-6, atol=0)
    mask = saliency_mask(fisher, fisher.roll(1), threshold=1.0, backend="triton")
    masked = apply_mask_(grad.clone(), mask, backend="triton")
    keep = mask.to_bool()
    assert torch.equal(masked[keep].nan_to_num(), grad[keep].nan_to_num()) and not masked[~keep].any()
