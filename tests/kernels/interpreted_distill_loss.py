"""The distillation loss's Triton kernels under the interpreter, which test_interpreter.py switches on."""

import importlib.util
import itertools
import sys
from pathlib import Path

import kernel_gate
import pytest
import torch
from fastvkd_kernels import backend, visual_distill_loss
from fastvkd_kernels.visual_distill_loss import distill_rows_triton
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_gate import DISTANCES, HIDDEN_SIZES, check_distill_loss, make_case

assert backend.INTERPRETED, "run this file with TRITON_INTERPRET=1 (test_interpreter.py does)"
kernel_gate.round_bfloat16_as_hardware_does()

SOURCE = Path(sys.modules[distill_rows_triton.__module__].__file__ or "")


def triton_loss(**case):
    return visual_distill_loss(**case, backend="triton")


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("H", HIDDEN_SIZES)
def test_every_dtype_distance_and_width(H, dtype, distance):
    check_distill_loss(triton_loss, make_case(H, dtype, distance))
    check_distill_loss(triton_loss, make_case(H, dtype, distance, options=False, seed=1))


@pytest.mark.parametrize("distance", DISTANCES)
def test_rows_longer_than_a_block(distance):
    for H in (8193, 16384):
        check_distill_loss(triton_loss, make_case(H, torch.bfloat16, distance, n=3))


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(
    "target_dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float32, torch.float64], ids=str
)
def test_target_dtypes(target_dtype, distance):
    check_distill_loss(triton_loss, make_case(96, torch.bfloat16, distance, target_dtype=target_dtype))


@pytest.mark.parametrize("float8", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_every_float8_number_is_decoded(float8):
    every = torch.arange(256, dtype=torch.uint8).view(float8)
    finite = every[every.float().isfinite()]
    hidden = torch.zeros(finite.numel(), 1)
    kwargs = dict(hidden=hidden, rows=torch.arange(finite.numel()), target=finite.view(-1, 1), return_rows=True)
    distances = triton_loss(**kwargs)[1]
    assert torch.equal(distances, finite.float().square())
    nan = every[every.float().isnan()].view(-1, 1)
    rows = torch.arange(nan.numel())
    assert triton_loss(hidden=hidden, rows=rows, target=nan, return_rows=True)[1].isnan().all()


@pytest.mark.parametrize("layout", ["sliced", "transposed", "unfoldable"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_strided_hidden(layout, distance):
    check_distill_loss(triton_loss, make_case(63, torch.float32, distance, layout=layout))
    check_distill_loss(triton_loss, make_case(96, torch.bfloat16, distance, layout=layout, options=False))


@pytest.mark.parametrize("n", [0, 1, 10])
@pytest.mark.parametrize("options", [False, True])
def test_empty_and_full_row_sets(n, options):
    for distance in DISTANCES:
        check_distill_loss(triton_loss, make_case(96, torch.float32, distance, n=n, options=options))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_property_any_combination_is_as_accurate_as_eager(data):
    case = make_case(
        data.draw(st.integers(1, 130)),
        data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        data.draw(st.sampled_from(DISTANCES)),
        target_dtype=data.draw(st.sampled_from([None, torch.float8_e4m3fn])),
        layout=data.draw(st.sampled_from(["dense", "sliced", "transposed", "unfoldable"])),
        options=data.draw(st.booleans()),
        n=data.draw(st.integers(0, 10)),
        seed=data.draw(st.integers(0, 2**31)),
    )
    case["rows"] = case["rows"].to(data.draw(st.sampled_from([torch.int32, torch.int64])))
    check_distill_loss(triton_loss, case)


def test_results_are_bitwise_repeatable_and_the_upstream_factor_is_applied():
    case = make_case(1000, torch.float32, "cosine")
    hidden = case.pop("hidden").requires_grad_()
    first, second = (triton_loss(hidden=hidden, **case) for _ in range(2))
    assert torch.equal(first, second)
    gradients = [torch.autograd.grad(loss, hidden)[0] for loss in (first, second)]
    assert torch.equal(*gradients)
    doubled = triton_loss(hidden=hidden, **case) * 2
    kept = torch.autograd.grad(doubled, hidden, retain_graph=True)[0]
    last = torch.autograd.grad(doubled, hidden)[0]
    assert torch.equal(kept, gradients[0] * 2) and torch.equal(last, kept)


def test_gradient_is_that_of_the_gradchecked_twin():
    for distance, H in itertools.product(DISTANCES, (63, 576)):
        case = make_case(H, torch.float32, distance)
        hidden = case.pop("hidden").requires_grad_()
        wide = hidden.detach().double().requires_grad_()
        (ours,) = torch.autograd.grad(triton_loss(hidden=hidden, **case), hidden)
        (twin,) = torch.autograd.grad(visual_distill_loss(wide, **case, backend="torch"), wide)
        torch.testing.assert_close(ours.double(), twin, rtol=1e-5, atol=1e-6 * float(twin.abs().max()))


def test_zero_vectors_have_cosine_distance_one_and_no_gradient():
    hidden = torch.stack([torch.zeros(9), torch.ones(9)]).requires_grad_()
    target = torch.stack([torch.ones(9), torch.zeros(9)])
    loss, distances = triton_loss(
        hidden=hidden, rows=torch.arange(2), target=target, distance="cosine", return_rows=True
    )
    loss.backward()
    assert distances.tolist() == [1, 1] and not hidden.grad.any()


def test_what_a_gpu_cannot_report_makes_the_loss_nan():
    hidden = torch.randn(4, 8)
    target = torch.randn(2, 8)
    for rows, target_rows in ([0, 4], [0, 1]), ([0, -1], [0, 1]), ([0, 1], [0, 2]), ([0, 1], [-1, 0]):
        for gradient in (False, True):
            case = dict(rows=torch.tensor(rows), target_rows=torch.tensor(target_rows), target=target)
            assert triton_loss(hidden=hidden.clone().requires_grad_(gradient), **case).isnan()
    repeated = dict(rows=torch.tensor([1, 1]), target_rows=torch.tensor([0, 1]), target=target)
    assert triton_loss(hidden=hidden.clone().requires_grad_(), **repeated).isnan()


def test_nan_in_hidden_reaches_the_loss_also_through_the_margin():
    hidden = torch.full((2, 8), float("nan"), requires_grad=True)
    repel = torch.tensor([True, True])
    assert triton_loss(hidden=hidden, rows=torch.arange(2), target=torch.zeros(2, 8), repel=repel).isnan()


def test_rows_beyond_two_to_the_31_elements():
    """4.3 GB of address space, of which only the pages of two rows are ever touched."""
    H = 4096
    T = 2**31 // H + 2
    hidden = torch.empty(T, H, dtype=torch.bfloat16)
    hidden[-1], hidden[0] = 3, 1
    loss, distances = triton_loss(
        hidden=hidden, rows=torch.tensor([T - 1, 0]), target=torch.zeros(1, H), target_rows=torch.tensor([0, 0]),
        return_rows=True,
    )  # fmt: skip
    assert distances.tolist() == [9, 1] and loss == 5


# (text in the kernels' source, what it is replaced by): each drops or changes one term
MUTATIONS = {
    "cosine gradient without its radial term": ("return along_x * x - along_t * t", "return -along_t * t"),
    "cosine radial term without 1 / |x|": ("cosine * x_inverse * x_inverse", "cosine * x_inverse"),
    "mse gradient without its factor 2": ("factor * (2.0 * scale_per_element)", "factor * scale_per_element"),
    "smooth_l1 without - beta / 2": ("slope * (error - 0.5 * beta * slope)", "slope * error"),
    "smooth_l1 slope not clamped below": ("tl.maximum(error / beta, -1.0)", "(error / beta)"),
    "repelled rows attracted": ("tl.where(d >= margin, 0.0, -factor)", "tl.where(d >= margin, 0.0, factor)"),
    "margin ignored in the gradient": ("tl.where(d >= margin, 0.0, -factor)", "-factor"),
    "margin ignored in the loss": ("tl.where(d >= margin, 0.0, margin - d)", "margin - d"),
    "weights ignored in the loss": (
        "tl.load(weight + start + o_n, mask=m_n, other=0).to(tl.float32) * d",
        "tl.where(m_n, d, 0.0)",
    ),
    "target not mapped": ("target + target_row * stride_target", "target + (token % n_targets) * stride_target"),
    "outer stride dropped": ("(row // n_inner) * stride_outer + (row % n_inner)", "(row % n_inner)"),
    "last element of a row lost": ("m_h = o_h < readable", "m_h = o_h < readable - 1"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_gate_fails_a_wrong_kernel(name, tmp_path):
    """A copy of the source with one term changed must not pass the checks that the true kernel passes."""
    found, replacement = MUTATIONS[name]
    text = SOURCE.read_text()
    assert found in text, "the source has changed: adapt the mutation"
    copy = tmp_path / "wrong_distill_loss.py"
    namespace = f"fastvkd_wrong_{list(MUTATIONS).index(name)}"
    copy.write_text(text.replace(found, replacement).replace('"fastvkd::', f'"{namespace}::'))
    spec = importlib.util.spec_from_file_location(namespace, copy)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def wrong_loss(**case):
        return module.visual_distill_loss(**case, backend="triton")

    caught = []
    for distance in DISTANCES:
        case = make_case(63, torch.float32, distance, layout="sliced")
        check_distill_loss(triton_loss, case)
        try:
            check_distill_loss(wrong_loss, case)
        except AssertionError as error:
            caught.append(f"{distance}: {error}")
    assert caught, "the gate did not notice"
