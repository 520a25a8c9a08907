"""4-bit layers: the same product, weights and gradient on every kind of CPU, for any width, also after a pass."""

import copy
import logging
import os
import subprocess
import sys
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from torch.nn import functional as F

from fastvkd.models import nf4

ROOT = Path(__file__).parents[2]
# (in, out): both multiples of a block, and widths that 64 or 32 does not divide; 4304 is SigLIP's
WIDTHS = [(64, 96), (192, 64), (128, 33), (96, 32), (144, 96), (48, 40), (32, 64), (9, 7), (4304, 6), (1, 1)]


def layer_of(widths: tuple[int, int], kind=nf4.Linear4bit, dtype=torch.float32, nested=True, bias=True):
    """A layer whose rows differ so much in size that a scale out of place shows."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(widths[1], widths[0], generator=random) * torch.logspace(-2, 1, widths[1])[:, None]
    layer = kind(*widths, bias, compute_dtype=dtype, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(weight.to(dtype), quant_type="nf4", compress_statistics=nested)
    if bias:
        layer.bias = torch.nn.Parameter(torch.randn(widths[1], generator=random).to(dtype), requires_grad=False)
    return layer.to("cpu").eval()


def by_hand(layer) -> torch.Tensor:
    """(out, in) float32: code times scale, the scales in the order of memory."""
    state = layer.weight.quant_state
    scales = state.absmax
    if state.nested:
        scales = bnb.functional.dequantize_blockwise(scales, state.state2) + state.offset
    codes = layer.weight.data.flatten().long()
    values = bnb.functional.get_4bit_type("nf4", device="cpu")[torch.stack([codes >> 4, codes & 15], 1).flatten()]
    count = layer.in_features * layer.out_features
    scales = scales.repeat_interleave(nf4.BLOCK)[:count]
    return (values[:count] * scales).view(layer.out_features, layer.in_features)


def inputs(layer, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("nested", [True, False], ids=["nested scales", "plain scales"])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_a_layer_multiplies_with_its_rounded_weights(widths, nested, avx512bf16) -> None:
    layer = layer_of(widths, nested=nested)
    weight, x = by_hand(layer), inputs(layer)
    expected = F.linear(x, weight, layer.bias)
    with torch.no_grad():
        first = layer(x)
    assert torch.equal(first, expected)
    assert torch.equal(nf4.dequantized(layer), weight)  # a pass has left the weights as they were
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    restored = layer_of(widths, nested=nested)
    restored.weight.data.zero_()
    restored.weight.data.copy_(layer.state_dict()["weight"])
    assert torch.equal(restored(x), expected)


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_the_gradient_passes_also_after_a_pass_without_one(widths, avx512bf16) -> None:
    layer = layer_of(widths)
    layer.bias.requires_grad_(True)
    weight, x = by_hand(layer), inputs(layer).requires_grad_(True)
    with torch.no_grad():
        layer(x)
    layer(x.detach())
    output = layer(x)
    seed = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    output.backward(seed)
    assert torch.equal(x.grad, seed @ weight)
    assert torch.allclose(layer.bias.grad, seed.sum((0, 1)), atol=1e-5)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    assert not kept  # between the passes no second copy of the weights lies in memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("widths", [(64, 96), (192, 64), (128, 33)], ids=str)
def test_where_64_divides_the_width_the_numbers_are_bitsandbytes_own(widths, dtype, monkeypatch) -> None:
    """As they are on a CPU without AVX512-BF16, where bitsandbytes packs nothing."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: 0)
    ours, theirs = layer_of(widths, dtype=dtype), layer_of(widths, bnb.nn.Linear4bit, dtype=dtype)
    grads = []
    for layer in (ours, theirs):
        x = inputs(layer, dtype).requires_grad_(True)
        output = layer(x)
        output.sum().backward()
        grads.append((output, x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert torch.equal(ours(inputs(ours, dtype)), theirs(inputs(theirs, dtype)))
    assert torch.equal(
        nf4.dequantized(ours, dtype), bnb.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    )


def test_the_layers_of_a_loaded_model_are_changed_and_no_others() -> None:
    model = torch.nn.Sequential(layer_of((96, 32), bnb.nn.Linear4bit), torch.nn.Linear(32, 8), torch.nn.GELU())
    nf4.same_on_every_cpu(model)
    assert [type(module) for module in model] == [nf4.Linear4bit, torch.nn.Linear, torch.nn.GELU]
    assert torch.equal(nf4.dequantized(model[0]), by_hand(model[0]))


# Acts as a CPU with or without AVX512-BF16 from the first import on, and prints what 4- and 8-bit models compute there.
PROCESS = """
import ctypes, sys
kind, folder, root = int(sys.argv[1]), sys.argv[2], sys.argv[3]
class Library(ctypes.CDLL):
    def __getattr__(self, name):
        return (lambda: kind) if name == "has_avx512bf16_cpu" else super().__getattr__(name)
ctypes.cdll = ctypes.LibraryLoader(Library)
import fastvkd
import torch
from fastvkd.attacks.quantize import quantized
from fastvkd.models.loading import load_model
import bitsandbytes
assert fastvkd.__file__.startswith(root) and bitsandbytes.functional.has_avx512bf16() == kind
tokens = torch.arange(8)[None]
for bits in ("nf4", "int8"):
    with quantized(load_model(folder), bits) as whole, torch.no_grad():
        for model in (load_model(folder, quantize_llm=bits), whole):
            print(bits, model(input_ids=tokens).logits.double().sum().item())
"""


@pytest.mark.slow
def test_no_run_warns_of_a_package_named_kernels_and_both_kinds_of_cpu_agree(world, tmp_path: Path) -> None:
    """In the repository's root Python finds our folder `kernels`, elsewhere nothing of that name."""
    printed = []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    for kind, folder in ((1, ROOT), (1, tmp_path), (0, tmp_path)):
        command = [sys.executable, "-c", PROCESS, str(kind), str(world.model), str(ROOT)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "kernels" not in done.stderr, done.stderr
        printed.append(done.stdout)
    assert printed[0].count("\n") == 4 and len(set(printed)) == 1


def test_other_warnings_of_that_part_of_bitsandbytes_are_heard(caplog) -> None:
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    hushed = [ModuleNotFoundError(name="kernels"), ImportError(name="kernels")]  # there is none, or our folder
    broken = ImportError("cannot import name", name="kernels", path="site-packages/kernels/__init__.py")
    heard = [broken, ModuleNotFoundError(name="numpy"), OSError("no network"), "anything else"]
    for cause in (*hushed, *heard):
        log.warning("Failed to load CPU gemm_4bit_forward: %s", cause)
    log.warning("no cause")
    assert [record.args[0] if record.args else None for record in caplog.records] == [*heard, None]
