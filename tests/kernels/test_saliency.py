"""Fisher accumulation and bit-packed saliency masks: exact selections, exact zeros, and refusals."""

import pytest
import torch
from fastvkd_kernels import SaliencyMask, apply_mask_, fisher_accumulate_, saliency_mask
from hypothesis import given, settings
from hypothesis import strategies as st


def fishers(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator).square() for _ in range(2))


@settings(max_examples=100, deadline=None)
@given(
    shape=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    fraction=st.floats(0, 1),
    granularity=st.sampled_from(["weight", "neuron"]),
    ties=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_fraction_takes_exactly_the_highest_ratios(shape, fraction, granularity, ties, seed):
    forget, retain = fishers(shape, seed)
    if ties:
        forget, retain = forget.round(), retain.round()
    mask = saliency_mask(forget, retain, fraction=fraction, granularity=granularity)
    if granularity == "neuron":
        forget, retain = (f.reshape(f.shape[0], -1).sum(1) for f in (forget, retain))
    ratio = (forget / retain.clamp_min(torch.finfo(torch.float32).tiny)).flatten()
    taken = mask.to_bool().flatten()
    assert taken.sum() == round(fraction * ratio.numel())
    order = ratio.argsort(descending=True, stable=True)
    assert torch.equal(taken.nonzero().flatten(), order[: int(taken.sum())].sort().values)
    assert mask.bits.numel() == -(-ratio.numel() // 8)


@settings(max_examples=50, deadline=None)
@given(
    shape=st.lists(st.integers(1, 30), min_size=1, max_size=3), threshold=st.floats(0, 5), seed=st.integers(0, 2**31)
)
def test_threshold_and_the_packed_form(shape, threshold, seed):
    forget, retain = fishers(shape, seed)
    forget[forget < 0.2] = 0
    mask = saliency_mask(forget, retain, threshold=threshold)
    expected = (forget >= threshold * retain) & (forget > 0)
    assert torch.equal(mask.to_bool(), expected) and mask.count() == expected.sum()
    by_hand = [0] * -(-expected.numel() // 8)
    for i, bit in enumerate(expected.flatten().tolist()):
        by_hand[i // 8] |= bit << (i % 8)
    assert mask.bits.tolist() == by_hand


def test_masked_gradients_are_exactly_zero_and_others_untouched():
    forget, retain = fishers((6, 5))
    for granularity in ("weight", "neuron"):
        mask = saliency_mask(forget, retain, fraction=0.5, granularity=granularity)
        grad = torch.randn(6, 5)
        grad[~mask.to_bool().expand(6, 5)] = float("nan")
        masked = apply_mask_(grad.clone(), mask)
        keep = mask.to_bool().expand(6, 5)
        assert torch.equal(masked[keep], grad[keep]) and torch.equal(masked[~keep], torch.zeros(int((~keep).sum())))
        strided = torch.randn(5, 6).T
        assert torch.equal(apply_mask_(strided, mask), strided * keep)


def test_a_masked_weight_ends_bit_identical_under_adamw():
    """The use that masks are made for: gradients masked at every step, no weight decay."""
    weight = torch.nn.Parameter(torch.randn(8, 8))
    start = weight.detach().clone()
    forget, retain = fishers((8, 8))
    mask = saliency_mask(forget, retain, fraction=0.25)
    optimizer = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.0)
    handle = weight.register_hook(lambda grad: apply_mask_(grad.clone(), mask))
    for _ in range(5):
        optimizer.zero_grad()
        (weight * torch.randn(8, 8)).sum().backward()
        optimizer.step()
    handle.remove()
    moved = weight.detach() != start
    assert torch.equal(moved, mask.to_bool())


def test_fisher_is_float32_where_half_precision_underflows():
    grad = torch.full((4,), 1e-4, dtype=torch.float16)
    assert not (grad * grad).any()
    fisher = fisher_accumulate_(torch.zeros(4), grad, scale=0.5)
    torch.testing.assert_close(fisher, 0.5 * grad.float().square())
    strided = torch.randn(3, 2).T
    assert torch.equal(fisher_accumulate_(torch.zeros(2, 3), strided), strided.square())


def test_a_mask_of_scattered_sizes_moves_with_its_shape():
    mask = saliency_mask(torch.ones(3, 2), torch.ones(3, 2), threshold=2.0)
    assert mask.count() == 0 and not mask.to_bool().any()
    every = saliency_mask(torch.ones(3, 2), torch.zeros(3, 2), threshold=2.0, granularity="neuron").to("cpu")
    assert every.count() == 6 and isinstance(every, SaliencyMask) and every.to_bool().shape == (3, 1)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        (dict(), "give one of threshold and fraction"),
        (dict(threshold=1.0, fraction=0.5), "give one of threshold and fraction"),
        (dict(threshold=-1.0), "threshold=-1.0 must be 0 or more"),
        (dict(fraction=1.5), "fraction=1.5 must lie between 0 and 1"),
        (dict(fraction=float("nan")), "must lie between 0 and 1"),
        (dict(threshold=1.0, granularity="row"), "granularity='row'.*weight, neuron"),
        (dict(threshold=1.0, fisher_retain=torch.ones(3)), "must have the parameter's shape"),
        (dict(threshold=1.0, fisher_forget=torch.full((2, 2), float("nan"))), "fisher_forget holds values.*not finite"),
        (dict(threshold=1.0, fisher_retain=-torch.ones(2, 2)), "fisher_retain holds values that are negative"),
        (dict(threshold=1.0, fisher_forget=torch.ones(2, 2).half()), "float32 is needed"),
    ],
)
def test_what_does_not_fit_is_refused(kwargs, words):
    with pytest.raises(ValueError, match=words):
        saliency_mask(**{**dict(fisher_forget=torch.ones(2, 2), fisher_retain=torch.ones(2, 2)), **kwargs})


def test_mismatched_gradients_are_refused():
    mask = saliency_mask(torch.ones(2, 2), torch.ones(2, 2), threshold=1.0)
    with pytest.raises(ValueError, match=r"grad \(3, 2\).*mask of \(2, 2\)"):
        apply_mask_(torch.ones(3, 2), mask)
    with pytest.raises(TypeError, match="float32 is needed"):
        fisher_accumulate_(torch.zeros(2).half(), torch.zeros(2))
    with pytest.raises(ValueError, match=r"fisher \(2,\).*grad \(3,\)"):
        fisher_accumulate_(torch.zeros(2), torch.zeros(3))
