"""LoRA layers with a fused update: PEFT's outputs and gradients, and PEFT's own forward wherever it is not covered."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from rlhf_ext.models import fused_lora
from rlhf_ext.models.fused_lora import fuse_lora_updates
from tests.tiny import tiny_causal_lm, tiny_tokenizer


class Layers(nn.Module):
    def __init__(self, bias=False):
        super().__init__()
        self.one, self.two = nn.Linear(6, 10, bias=bias), nn.Linear(10, 4, bias=bias)

    def forward(self, x):
        return self.two(self.one(x).tanh())


def pair(bias=False, dtype=torch.float64, adapters=("default",), **kwargs):
    """A model with adapters that say something, and its fused copy."""
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["one", "two"], init_lora_weights=False, **kwargs)
    model = get_peft_model(Layers(bias), config)
    for name in adapters[1:]:
        model.add_adapter(name, config)
    model = model.to(dtype)
    other = copy.deepcopy(model)
    assert fuse_lora_updates(other) == 2
    return model, other


def counted(monkeypatch, form):
    calls, apply = [], form.apply
    monkeypatch.setattr(form, "apply", lambda *args: calls.append(1) or apply(*args))
    return calls


@pytest.fixture
def fused(monkeypatch):
    """How often the form inside of the product ran."""
    return counted(monkeypatch, fused_lora._Update)


@pytest.fixture
def beside(monkeypatch):
    """How often the form ran that leaves the base layer alone."""
    return counted(monkeypatch, fused_lora._Beside)


def outcome(model, x, autocast=False, recompute=False):
    """Output, and the gradients of the input and of what trains."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
    (y.double() * torch.arange(y.numel()).view(y.shape).double().sin()).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **grads}


def assert_alike(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        error = (found[name].double() - value.double()).abs().max() / value.abs().max()
        assert error < tolerance, f"{name}: {error}"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7, 6), (2, 5, 6)])
@pytest.mark.parametrize("recompute", [False, True])
def test_outputs_and_gradients_are_those_of_peft(fused, bias, shape, recompute):
    model, other = pair(bias)
    x = torch.randn(shape, dtype=torch.float64)
    assert_alike(outcome(other, x, recompute=recompute), outcome(model, x, recompute=recompute), 1e-13)
    assert len(fused) == 2 * (1 + recompute)


def test_the_gradient_is_that_of_finite_differences():
    _, other = pair(bias=True)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    trained = [p for p in other.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(lambda x, *_: other(x), (x, *trained))


def test_under_autocast_it_computes_in_bf16(fused):
    model, other = pair(dtype=torch.float32)
    x = torch.randn(64, 6)
    found, expected = outcome(other, x, autocast=True), outcome(model, x, autocast=True)
    assert found["y"].dtype == torch.bfloat16 and len(fused) == 2
    assert_alike(found, expected, 2e-2)
    assert_alike(found, outcome(model, x) | {"y": outcome(model, x)["y"].bfloat16()}, 4e-2)


def test_each_adapter_is_heard(fused):
    model, other = pair(adapters=("default", "critic"))
    x = torch.randn(5, 6, dtype=torch.float64)
    said = []
    for name in ("default", "critic"):
        for m in (model, other):
            m.set_adapter(name)
        said.append(outcome(other, x))
        assert_alike(said[-1], outcome(model, x), 1e-13)
    assert not torch.allclose(said[0]["y"], said[1]["y"])


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (0, 5, 6)])
def test_no_tokens_are_no_error(fused, shape):
    model, other = pair()
    x = torch.randn(shape, dtype=torch.float64)
    assert other(x).shape == model(x).shape
    other(x).sum().backward()
    assert len(fused) == 4


def test_dropout_that_was_switched_off_is_none(fused):
    model, other = pair(lora_dropout=0.5)
    for m in (model, other):
        for module in m.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    x = torch.randn(5, 6, dtype=torch.float64)
    assert_alike(outcome(other, x), outcome(model, x), 1e-13)
    assert len(fused) == 2


def test_an_output_may_be_changed_in_place(fused):
    """As OLMo clips its queries."""
    model, other = pair()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    said = []
    for m in (model, other):
        first = m.base_model.model.one
        m.zero_grad()
        first(x).clamp_(-0.5, 0.5).square().sum().backward()
        said.append(first.lora_A["default"].weight.grad.clone())
    torch.testing.assert_close(said[1], said[0], rtol=1e-12, atol=0)
    assert len(fused) == 1


def test_gradients_of_gradients_raise():
    _, other = pair()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(other(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_layers_are_fused_once_and_others_forwards_stay():
    _, other = pair()
    assert fuse_lora_updates(other) == 0


def test_a_copy_is_a_model_of_its_own(fused):
    _, other = pair()
    again = copy.deepcopy(other)
    x = torch.randn(5, 6, dtype=torch.float64)
    before = outcome(other, x)["y"]
    with torch.no_grad():
        for name, parameter in again.named_parameters():
            parameter.mul_(2 if "lora_B" in name else 1)
    assert torch.equal(outcome(other, x)["y"], before)
    assert not torch.allclose(outcome(again, x)["y"], before)
    assert len(fused) == 6


def both_active(model):
    model.base_model.set_adapter(["default", "critic"])


def disabled(model):
    model.base_model.disable_adapter_layers()


def merged(model):
    model.merge_adapter()


def base_trains(model):
    for name, parameter in model.named_parameters():
        if "base_layer" in name:
            parameter.requires_grad_()


def hooked(model):
    for module in model.modules():
        if type(module) is nn.Linear and module.in_features > 3 and module.out_features > 3:
            module.register_forward_hook(lambda m, args, y: 2 * y)


def adapter_hooked(model):
    for module in model.modules():
        if type(module) is nn.Linear and module.out_features == 3:
            module.register_forward_hook(lambda m, args, y: 2 * y)


def backward_hooked(model):
    for module in model.modules():
        if type(module) is nn.Linear and 3 not in (module.in_features, module.out_features):
            module.register_full_backward_hook(lambda m, grads, _: tuple(2 * grad for grad in grads))


@pytest.mark.parametrize("change", [both_active, disabled, merged, adapter_hooked])
def test_what_is_not_covered_is_left_to_peft(fused, beside, change):
    model, other = pair(adapters=("default", "critic"))
    for m in (model, other):
        change(m)
    x = torch.randn(5, 6, dtype=torch.float64)
    assert_alike(outcome(other, x), outcome(model, x), 1e-13)
    assert not fused and not beside


@pytest.mark.parametrize("change", [base_trains, hooked, backward_hooked])
@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6), (0, 6)])
def test_a_base_layer_that_has_to_run_itself_does(fused, beside, change, shape):
    model, other = pair(bias=True)
    for m in (model, other):
        change(m)
    x = torch.randn(shape, dtype=torch.float64)
    found, expected = outcome(other, x), outcome(model, x)
    if x.numel():
        assert_alike(found, expected, 1e-13)
    assert found.keys() == expected.keys() and not fused and len(beside) == 2


def test_the_gradient_beside_a_base_layer_is_that_of_finite_differences(beside):
    _, other = pair(bias=True)
    base_trains(other)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: other(x), (x, *other.parameters()))
    assert beside


@pytest.mark.parametrize("kwargs", [{"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}])
def test_other_kinds_of_lora_are_left_to_peft(fused, kwargs):
    model, other = pair(bias=True, **kwargs)
    x = torch.randn(5, 6, dtype=torch.float64)
    said = []
    for m in (model, other):
        torch.manual_seed(1)
        said.append(outcome(m, x))
    assert_alike(said[1], said[0], 1e-13)
    assert not fused


def test_adapters_in_float32_over_a_base_in_bf16(fused, beside):
    """PEFT rounds the update to bf16 and then the sum; here the sum is rounded alone."""
    exact, _ = pair(dtype=torch.float64)
    model, other = pair(dtype=torch.float32)
    for m in (exact, model, other):
        for name, parameter in m.named_parameters():
            if "base_layer" in name:
                rounded = parameter.data.bfloat16()
                parameter.data = rounded.double() if m is exact else rounded
    x = torch.randn(64, 6).bfloat16()
    found, expected = outcome(other, x), outcome(exact, x.double())
    assert {t.dtype for name, t in found.items() if "lora" in name} == {torch.float32}
    assert found["y"].dtype == found["x"].dtype == torch.bfloat16
    assert_alike({name: t.double() for name, t in found.items()}, expected, 1.5e-2)
    assert_alike(found, outcome(model, x), 1.5e-2)
    assert not fused and len(beside) == 2


@pytest.mark.parametrize("bits", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
@pytest.mark.parametrize("autocast", [False, True])
def test_over_a_quantised_base(fused, beside, bits, autocast, tmp_path):
    torch.manual_seed(0)
    tiny_causal_lm("llama", tiny_tokenizer()).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(**bits, llm_int8_skip_modules=["lm_head"])
    config = {"quantization_config": config, "dtype": torch.float32, "device_map": {"": "cpu"}}
    base = AutoModelForCausalLM.from_pretrained(tmp_path, **config)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(base, config).train()  # in evaluation bitsandbytes packs weights of 32 rows and more anew
    ids = torch.randint(2, 20, (3, 9))
    said = []
    for number in (0, 14):
        if number:
            assert fuse_lora_updates(model) == number
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logits = model(input_ids=ids).logits
        logits.float().logsumexp(-1).sum().backward()
        said.append({"logits": logits, **{name: p.grad for name, p in model.named_parameters() if p.requires_grad}})
    assert_alike(said[1], said[0], 4e-2 if autocast else 1e-5)
    assert not fused and len(beside) == 14


def test_the_output_of_the_base_keeps_its_digits():
    """As of a quantised layer that returns float32 while autocast computes the update in bf16."""
    torch.manual_seed(0)
    y, rows = torch.randn(9, 5), torch.randn(9, 4).bfloat16()
    down, up = torch.randn(2, 4).bfloat16(), torch.zeros(5, 2).bfloat16()
    assert torch.equal(fused_lora._Beside.apply(y, rows, down, up, 2.0), y)


def test_inputs_are_kept_once_and_as_they_came(beside):
    """Three layers read one input of bf16; PEFT keeps a copy of it in float32 for each."""
    torch.manual_seed(0)
    block = nn.ModuleDict({name: nn.Linear(64, 8, bias=False) for name in "qkv"}).bfloat16()
    model = get_peft_model(block, LoraConfig(r=2, target_modules=["q", "k", "v"]))
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.float()
    kept = []
    for fuse in (False, True):
        if fuse:
            fuse_lora_updates(model)
        sizes = {}
        x = torch.randn(100, 64).bfloat16().requires_grad_()

        def note(tensor, sizes=sizes):
            if tensor.shape == (100, 64):
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            y = sum(model.base_model.model[name](x) for name in "qkv")
        kept.append((sum(sizes.values()), y))
    assert kept[0][0] >= 3 * 100 * 64 * 4 and kept[1][0] == 100 * 64 * 2 and len(beside) == 3


@pytest.mark.parametrize(("kind", "number"), [("llama", 14), ("gpt2", 0)])
def test_a_language_model_says_the_same(fused, kind, number):
    """GPT-2's layers are no `nn.Linear`: they stay."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(tiny_causal_lm(kind, tiny_tokenizer()), config).eval()
    ids = torch.randint(2, 20, (3, 9))
    expected = model(input_ids=ids).logits
    assert fuse_lora_updates(model) == number
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-6)
    assert len(fused) == number
