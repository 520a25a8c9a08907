"""The frozen-LLM operations: accuracy, derivative, bytes saved for backward, and patching a transformers model."""

import json
from pathlib import Path

import pytest
import torch
from fastvkd_kernels import frozen_rms_norm, frozen_swiglu, patch_frozen
from kernel_gate import SLACK, eager_rms_norm, eager_swiglu, worst_error
from torch import nn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("H", [1, 63, 4096])
def test_twins_are_as_accurate_as_eager(H, dtype):
    torch.manual_seed(H)
    x, up, grad_y = (2 * torch.randn(2, 3, H).to(dtype) for _ in range(3))
    weight = torch.randn(H).to(dtype)
    norms = (lambda x: frozen_rms_norm(x, weight, 1e-6), lambda x: eager_rms_norm(x, weight, 1e-6))
    errors = [worst_error(f, lambda x: eager_rms_norm(x, weight.double(), 1e-6), [x], grad_y) for f in norms]
    products = [worst_error(f, eager_swiglu, [x, up], grad_y) for f in (frozen_swiglu, eager_swiglu)]
    for ours, eager in (errors, products):
        assert all(value <= allowed + SLACK for value, allowed in zip(ours, eager, strict=True))


def test_gradcheck_and_no_second_derivative():
    x, up = (torch.randn(2, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: frozen_rms_norm(x, weight, 1e-3), (x,))
    assert torch.autograd.gradcheck(frozen_swiglu, (x, up))
    for y in (frozen_rms_norm(x, weight), frozen_swiglu(x, up)):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(y.sum(), x, create_graph=True)


def test_torch_compile_traces_both_without_a_graph_break():
    x, up = (torch.randn(3, 16, requires_grad=True) for _ in range(2))
    weight = torch.randn(16)

    def step(x, up):
        return frozen_swiglu(frozen_rms_norm(x, weight), up).sum()

    results = [
        torch.autograd.grad(f(x, up), (x, up)) for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager"))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    torch.library.opcheck(torch.ops.fastvkd.frozen_rms_norm.default, (x, weight, 1e-6, "torch"))
    torch.library.opcheck(torch.ops.fastvkd.frozen_swiglu.default, (x, up, "torch"))


def saved_bytes(function, *inputs) -> int:
    """Bytes that autograd keeps for backward, each storage counted once, frozen parameters not."""
    storages: dict[int, int] = {}

    def note(tensor):
        if not isinstance(tensor, nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        function(*inputs)
    return sum(storages.values())


def test_bytes_saved_for_backward():
    """bf16, H = 4096: the norm keeps 2 bytes an element where eager keeps 4, SwiGLU 4 where eager keeps 6."""
    x, up = (torch.randn(64, 4096).bfloat16().requires_grad_() for _ in range(2))
    weight = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16), requires_grad=False)
    n = x.numel()
    assert saved_bytes(lambda x: frozen_rms_norm(x, weight), x) == 2 * n
    assert saved_bytes(lambda x: eager_rms_norm(x, weight, 1e-6), x) >= 4 * n
    assert saved_bytes(frozen_swiglu, x, up) == 4 * n
    assert saved_bytes(eager_swiglu, x, up) == 6 * n


def tiny_model(kind: str):
    import transformers

    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    config_class = getattr(transformers, f"{kind}Config")
    model_class = getattr(transformers, f"{kind}Model")
    extra = dict(head_dim=8) if kind in ("Qwen3", "Gemma") else {}
    torch.manual_seed(0)
    model = model_class(config_class(num_key_value_heads=2, **sizes, **extra)).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    return model.requires_grad_(False)


class KeepsQueriesKeysValuesAndOutput(torch.autograd.Function):
    """What a fused attention kernel keeps, on a device without one."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output


@pytest.mark.parametrize(
    ("name", "tokens", "ours", "eager"),
    [("llava-1.5-7b", 581, 54.4, 76.8), ("llava-1.5-13b", 581, 68.1, 96.1), ("qwen2.5-vl-7b", 261, 27.9, 41.6)],
)
def test_bytes_that_a_real_decoder_layer_keeps(monkeypatch, name, tokens, ours, eager):
    """The table in docs/kernels.md: MB in bf16 for one image, on the meta device."""
    from transformers import AutoConfig, AutoModel

    facts = json.loads((Path(__file__).parents[2] / "configs" / "architectures" / f"{name}.json").read_text())
    facts["text_config"]["num_hidden_layers"] = 1
    config = AutoConfig.for_model(**{key: value for key, value in facts.items() if key != "name_or_path"})
    with torch.device("meta"):
        llm = AutoModel.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False).language_model
        hidden = torch.randn(1, tokens, llm.config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        positions = torch.arange(tokens)[None]
    rotary = llm.rotary_emb(hidden, positions if "llava" in name else positions[None].expand(3, 1, tokens))
    weights = {parameter.untyped_storage()._cdata for parameter in llm.parameters()}

    def attention(query, key, value, **_):
        return KeepsQueriesKeysValuesAndOutput.apply(query, key, value)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)

    def kept() -> float:
        storages = {}  # by address, and themselves, so that no address is used again

        def note(tensor):
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            llm.layers[0](hidden, position_embeddings=rotary, attention_mask=None)
        return sum(storage.nbytes() for key, storage in storages.items() if key not in weights) / 1e6

    assert kept() == pytest.approx(eager, abs=0.05)
    with patch_frozen(llm, backend="torch") as counts:
        assert counts == {"rms_norm": 2, "swiglu": 1} and kept() == pytest.approx(ours, abs=0.05)


@pytest.mark.parametrize(("kind", "norms"), [("Llama", 4), ("Mistral", 4), ("Qwen2", 4), ("Qwen3", 8)])
def test_patched_model_computes_the_same_saves_less_and_is_restored(kind, norms):
    model = tiny_model(kind)
    embeddings = torch.randn(2, 7, 32, requires_grad=True)

    def run():
        return model(inputs_embeds=embeddings).last_hidden_state

    expected, plain = run(), saved_bytes(run)
    (gradient,) = torch.autograd.grad(expected.square().sum(), embeddings)
    with patch_frozen(model) as counts:
        assert counts == {"rms_norm": norms, "swiglu": 2}
        result = run()
        torch.testing.assert_close(result, expected)
        torch.testing.assert_close(
            torch.autograd.grad(result.square().sum(), embeddings)[0], gradient, rtol=1e-4, atol=1e-4
        )
        assert saved_bytes(run) < plain
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(run(), expected)


def test_patch_leaves_trainable_and_unknown_layers_alone_and_restores_after_an_error():
    model = tiny_model("Llama")
    model.layers[0].input_layernorm.weight.requires_grad_(True)
    with pytest.raises(KeyError), patch_frozen(model) as counts:
        assert counts == {"rms_norm": 3, "swiglu": 2} and "forward" not in vars(model.layers[0].input_layernorm)
        raise KeyError
    assert not any("forward" in vars(module) for module in model.modules())
    with pytest.raises(ValueError, match="no frozen decoder layer of Llama"), patch_frozen(model.requires_grad_(True)):
        pass
    with pytest.raises(ValueError, match="no frozen decoder layer"), patch_frozen(tiny_model("Gemma")):
        pass


def test_what_does_not_fit_is_refused():
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match=r"x \(2, 4\) and weight \(3,\)"):
        frozen_rms_norm(x, torch.ones(3))
    with pytest.raises(ValueError, match="weight requires grad"):
        frozen_rms_norm(x, torch.ones(4, requires_grad=True))
    with pytest.raises(TypeError, match=r"x is torch\.int64"):
        frozen_rms_norm(x.long(), torch.ones(4))
    with pytest.raises(ValueError, match=r"gate \(2, 4\).*up \(4,\)"):
        frozen_swiglu(x, x[0])
    with pytest.raises(TypeError, match="one float dtype"):
        frozen_swiglu(x, x.half())
