"""The distillation loss on the CPU: its twin against float64, its derivative, its contract, and torch.compile."""

import pytest
import torch
from fastvkd_kernels import backend, visual_distill_loss
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_gate import DISTANCES, HIDDEN_SIZES, check_distill_loss, make_case, moved_to
from torch.profiler import ProfilerActivity, profile


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("H", [*HIDDEN_SIZES, 16384])
def test_twin_is_as_accurate_as_eager(H, dtype, distance):
    check_distill_loss(visual_distill_loss, make_case(H, dtype, distance))
    check_distill_loss(visual_distill_loss, make_case(H, dtype, distance, options=False, layout="sliced", seed=1))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_property_any_combination_is_as_accurate_as_eager(data):
    case = make_case(
        data.draw(st.integers(1, 300)),
        data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])),
        data.draw(st.sampled_from(DISTANCES)),
        target_dtype=data.draw(st.sampled_from([None, torch.float8_e4m3fn, torch.float8_e5m2, torch.float32])),
        layout=data.draw(st.sampled_from(["dense", "sliced", "transposed", "unfoldable"])),
        options=data.draw(st.booleans()),
        n=data.draw(st.integers(0, 10)),
        seed=data.draw(st.integers(0, 2**31)),
    )
    case["rows"] = case["rows"].to(data.draw(st.sampled_from([torch.int32, torch.int64])))
    check_distill_loss(visual_distill_loss, case)


@pytest.mark.parametrize("options", [False, True])
@pytest.mark.parametrize("distance", DISTANCES)
def test_gradcheck(distance, options):
    case = make_case(9, torch.float64, distance, options=options)
    hidden = case.pop("hidden").requires_grad_()
    assert torch.autograd.gradcheck(lambda x: visual_distill_loss(x * 1.0, **case), (hidden,))


def test_the_backward_pass_allocates_nothing_of_the_gradients_size():
    """The gradient is an output that cannot be differentiated: autograd would fill a tensor of its size with zeros."""
    hidden = torch.randn(512, 1024, requires_grad=True)
    rows, target = torch.arange(512), torch.randn(512, 1024)
    loss = visual_distill_loss(hidden, rows, target)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        (gradient,) = torch.autograd.grad(loss, hidden)
    events = profiler.profiler.kineto_results.events()
    allocated = [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]
    assert gradient.any() and sum(allocated) < 1024, allocated


@pytest.mark.parametrize("layout", ["dense", "sliced", "transposed", "unfoldable"])
@pytest.mark.parametrize("target_dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
def test_a_case_keeps_values_and_strides_when_it_is_moved_to_a_device(layout, target_dtype):
    case = make_case(9, torch.bfloat16, "mse", layout=layout, target_dtype=target_dtype)
    for device in ("cpu", "meta"):
        moved = moved_to(case, device)
        for key, value in case.items():
            if not isinstance(value, torch.Tensor):
                assert moved[key] == value
                continue
            assert moved[key].stride() == value.stride() and moved[key].storage_offset() == value.storage_offset()
            assert moved[key].device.type == device and moved[key].dtype == value.dtype
            if device == "cpu":
                assert torch.equal(moved[key].float(), value.float()) and moved[key].data_ptr() != value.data_ptr()


def test_many_rows_are_taken_in_chunks():
    check_distill_loss(visual_distill_loss, make_many_rows())


def make_many_rows() -> dict:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1000, 1024, generator=generator)
    rows = torch.randperm(1000, generator=generator)[:777]
    return dict(hidden=hidden, rows=rows, target=torch.randn(777, 1024, generator=generator), distance="mse")


@pytest.mark.parametrize("options", [False, True])
@pytest.mark.parametrize("distance", DISTANCES)
def test_torch_compile_traces_it_without_a_graph_break(distance, options):
    case = make_case(96, torch.float32, distance, options=options)
    hidden = case.pop("hidden")

    def step(x):
        loss, rows = visual_distill_loss(torch.tanh(x), **case, return_rows=True)
        return 3 * loss, rows

    results = []
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x = hidden.clone().requires_grad_()
        loss, rows = f(x)
        loss.backward()
        results.append((loss.detach(), rows, x.grad))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.slow
def test_torch_compile_with_inductor():
    case = make_case(96, torch.float32, "mse")
    hidden = case.pop("hidden").requires_grad_()

    def step(x):
        return visual_distill_loss(torch.tanh(x), **case) * 3

    gradients = [torch.autograd.grad(f(hidden), hidden)[0] for f in (step, torch.compile(step, fullgraph=True))]
    torch.testing.assert_close(*gradients)


def test_custom_ops_obey_torchs_rules():
    """Schema, fake implementation and autograd registration, by torch's own checker."""
    for options in (False, True):
        case = make_case(8, torch.float32, "mse", options=options)
        arguments = (case["hidden"].requires_grad_(), case["rows"], case["target"], case.get("target_rows"))
        arguments += (case.get("weight"), case.get("repel"), 1.0, "mse", 1.0, 1.0, True, "torch")
        # not test_aot_dispatch_dynamic: it looks at the saved gradient after backward has scaled it in place, which
        # no caller of the public function can; test_torch_compile_* cover tracing
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(torch.ops.fastvkd.visual_distill_loss.default, arguments, test_utils=tests)
    gradient = torch.randn(3, 4)
    torch.library.opcheck(
        torch.ops.fastvkd.scale_gradient.default, (gradient, torch.tensor(2.0), torch.float32, "torch")
    )
    torch.library.opcheck(torch.ops.fastvkd.scale_gradient_.default, (gradient, torch.tensor(2.0), "torch"))


def test_bitwise_repeatable_and_upstream_factor_with_and_without_a_kept_graph():
    case = make_case(576, torch.bfloat16, "smooth_l1")
    hidden = case.pop("hidden").requires_grad_()
    first, second = (visual_distill_loss(hidden, **case) for _ in range(2))
    assert torch.equal(first, second) and first.dtype == torch.float32
    gradient = torch.autograd.grad(first, hidden)[0]
    doubled = second * 2
    kept = torch.autograd.grad(doubled, hidden, retain_graph=True)[0]
    assert torch.equal(kept, torch.autograd.grad(doubled, hidden)[0]) and torch.equal(kept, gradient * 2)


def test_float16_gradient_survives_where_its_unscaled_value_underflows():
    """With loss scaling the true gradient is representable; rounded to float16 before the scaling it would be 0."""
    H, N = 4096, 512
    hidden = torch.full((N, H), 0.01, dtype=torch.float16, requires_grad=True)
    loss = visual_distill_loss(hidden, torch.arange(N), torch.zeros(N, H, dtype=torch.float16))
    (loss * 65536).backward()
    torch.testing.assert_close(hidden.grad, torch.full_like(hidden.grad, 65536 * 2 * 0.01 / (N * H)), rtol=2e-3, atol=0)


def test_repelled_rows_stop_at_the_margin():
    hidden = torch.tensor([[0.5], [2.0], [1.0]], requires_grad=True)  # d = 0.25, 4, 1 against 0
    repel = torch.tensor([True, True, True])
    loss, d = visual_distill_loss(
        hidden, torch.arange(3), torch.zeros(3, 1), repel=repel, margin=1.0, weight=torch.ones(3), return_rows=True
    )
    loss.backward()
    assert d.tolist() == [0.25, 4, 1] and loss.item() == 0.75 and hidden.grad.flatten().tolist() == [-1, 0, 0]


def test_zero_vectors_have_cosine_distance_one_and_no_gradient():
    hidden = torch.stack([torch.zeros(9), torch.ones(9)]).requires_grad_()
    target = torch.stack([torch.ones(9), torch.zeros(9)])
    loss, distances = visual_distill_loss(hidden, torch.arange(2), target, distance="cosine", return_rows=True)
    loss.backward()
    assert distances.tolist() == [1, 1] and not hidden.grad.any()


def test_nothing_is_differentiated_or_allocated_without_need():
    case = make_case(8, torch.float32, "mse")
    assert not visual_distill_loss(**case).requires_grad
    with torch.no_grad():
        assert not visual_distill_loss(**{**case, "hidden": case["hidden"].requires_grad_()}).requires_grad
    loss, rows = visual_distill_loss(**case, return_rows=True)
    assert loss.requires_grad and not rows.requires_grad and case["target"].grad is None


def test_saved_for_backward_is_the_gradient_alone():
    case = make_case(64, torch.bfloat16, "mse")
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        visual_distill_loss(**{**case, "hidden": case["hidden"].requires_grad_()})
    assert [(t.shape, t.dtype) for t in saved] == [(case["hidden"].shape, torch.bfloat16)]


H, N = 4, 2
HIDDEN, ROWS, TARGET = torch.randn(3, H), torch.arange(N), torch.randn(N, H)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(distance="l2"), ValueError, "distance='l2'.*mse, cosine, smooth_l1"),
        (dict(backend="cuda"), ValueError, "backend='cuda'.*'auto', 'triton' or 'torch'"),
        (dict(beta=0.0), ValueError, "beta=0.0.*above 0"),
        (dict(scale=torch.ones(())), TypeError, "scale must be a number, found Tensor"),
        (dict(hidden=HIDDEN.int()), TypeError, "hidden has dtype torch.int32"),
        (dict(target=TARGET.int()), TypeError, "target has dtype torch.int32"),
        (dict(target=torch.randn(N, H + 1)), ValueError, r"hidden \(3, 4\) and target \(2, 5\)"),
        (dict(target=torch.randn(N + 1, H)), ValueError, "3 rows for 2 visual tokens: pass target_rows"),
        (dict(target=TARGET.clone().requires_grad_()), ValueError, "target requires grad.*detach"),
        (dict(weight=torch.ones(N, requires_grad=True)), ValueError, "weight requires grad.*detach"),
        (dict(weight=torch.ones(N + 1)), ValueError, r"weight is torch.float32 \(3,\)"),
        (dict(repel=torch.ones(N)), ValueError, "repel is torch.float32"),
        (dict(rows=torch.ones(N)), TypeError, "rows has dtype torch.float32"),
        (dict(target_rows=torch.zeros(N + 1, dtype=torch.int64)), ValueError, r"target_rows has shape \(3,\)"),
        (dict(rows=torch.tensor([1, 1])), ValueError, "1 repeated entries"),
        (dict(rows=torch.tensor([0, 3])), IndexError, "out of bounds|out of range"),
        (dict(target=TARGET.to("meta")), ValueError, "target is on meta and hidden on cpu"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, words):
    with pytest.raises(error, match=words):
        visual_distill_loss(**{**dict(hidden=HIDDEN, rows=ROWS, target=TARGET), **change})


def test_triton_on_cpu_tensors_says_how_to_get_it():
    if backend.INTERPRETED:
        pytest.skip("the interpreter is on")
    with pytest.raises(RuntimeError, match=r"needs GPU tensors, found cpu.*TRITON_INTERPRET=1"):
        visual_distill_loss(HIDDEN, ROWS, TARGET, backend="triton")


def test_second_derivative_is_refused():
    hidden = HIDDEN.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"no second derivative.*create_graph"):
        torch.autograd.grad(visual_distill_loss(hidden, ROWS, TARGET), hidden, create_graph=True)
