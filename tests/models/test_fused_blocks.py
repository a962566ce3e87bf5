"""Norms and gated feed-forward layers that keep less: a model's own bits forward, its gradients, nothing else."""

import copy
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RMSNormGated
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from rlhf_ext.models import fused_blocks
from rlhf_ext.models.fused_blocks import fuse_blocks
from tests.tiny import SIZES, tiny_causal_lm, tiny_config, tiny_tokenizer


SMALL = {**SIZES, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 40, "pad_token_id": 0}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "embd_pdrop": 0, "attn_pdrop": 0, "resid_pdrop": 0}
# Of each family: how many modules are covered, of two layers and the norm above them.
FAMILIES = {
    "llama": 7,
    "mistral": 7,
    "qwen2": 7,
    "qwen3": 11,  # queries and keys have norms too
    "gemma2": 11,
    "gemma3_text": 15,
    "olmo2": 11,  # multiplies in float32
    "phi3": 5,  # one matrix for gate and up: only norms
    "gpt2": 0,
}


def family(kind, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(GPT2 if kind == "gpt2" else SMALL)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # A norm at its starting weights would not show how it uses them.
            parameter.add_(torch.randn_like(parameter) * (0.3 if "norm" in name else 0.1))
    return model.to(dtype)


def outcome(model, ids, autocast=False, recompute=False):
    model.zero_grad()
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        if recompute:
            logits = checkpoint(lambda ids: model(input_ids=ids).logits, ids, use_reentrant=False)
        else:
            logits = model(input_ids=ids).logits
    weights = torch.arange(logits.numel()).view(logits.shape).double().sin()
    (logits.double() * weights).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        error = (found[name].double() - value.double()).norm() / value.double().norm()
        assert error < tolerance, f"{name}: {error}"


@pytest.mark.parametrize(("kind", "number"), FAMILIES.items())
def test_a_family_says_the_same_bits_and_learns_the_same(kind, number):
    stock = family(kind)
    fused = copy.deepcopy(stock)
    assert fuse_blocks(fused) == number
    ids = torch.randint(2, 40, (3, 9))
    (said, found), (expected, grads) = outcome(fused, ids), outcome(stock, ids)
    assert torch.equal(said, expected)
    assert_alike(found, grads, 1e-5)
    with torch.no_grad():
        assert torch.equal(fused.eval()(input_ids=ids).logits, stock.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "olmo2"])
@pytest.mark.parametrize("way", ["autocast", "bf16", "recompute"])
def test_other_precisions_and_recomputation(kind, way):
    """In 16 bits gradients are those of float32, no farther than the model's own."""
    exact = family(kind)
    if way == "bf16":
        with torch.no_grad():
            for parameter in exact.parameters():
                parameter.copy_(parameter.bfloat16())
    stock = copy.deepcopy(exact).to(torch.bfloat16 if way == "bf16" else torch.float32)
    fused = copy.deepcopy(stock)
    fuse_blocks(fused)
    ids = torch.randint(2, 40, (3, 9))
    options = {way: True} if way != "bf16" else {}
    (said, found), (expected, grads) = outcome(fused, ids, **options), outcome(stock, ids, **options)
    assert torch.equal(said, expected) and said.dtype == expected.dtype
    assert {name: grad.dtype for name, grad in found.items()} == {name: grad.dtype for name, grad in grads.items()}
    if way == "recompute":
        return assert_alike(found, grads, 1e-5)
    _, true = outcome(exact, ids)
    for name, grad in true.items():
        ours, theirs = (
            (those[name].double() - grad.double()).norm() / grad.double().norm() for those in (found, grads)
        )
        assert ours < 1.3 * theirs + 1e-3 and ours < 0.1, (name, ours, theirs)


def test_a_backward_pass_under_autocast_computes_in_float32():
    norm = LlamaRMSNorm(16)
    assert fuse_blocks(norm) == 1
    x, grad = torch.randn(5, 16, requires_grad=True), torch.randn(5, 16)
    said = []
    for enabled in (False, True):
        y = norm(x)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            said.append(torch.autograd.grad(y, x, grad)[0])
    assert torch.equal(*said)


@pytest.mark.parametrize(("offset", "casts_first"), fused_blocks.NORMS)
@pytest.mark.parametrize("shape", [(7, 6), (2, 5, 6), (2, 0, 6), (6,)])
def test_the_norm_against_its_definition(offset, casts_first, shape):
    torch.manual_seed(1)
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(6, requires_grad=True)
    factors = torch.randn(shape)
    y = fused_blocks._Norm.apply(x, weight, 1e-3, offset, casts_first)
    grads = torch.autograd.grad((y * factors).sum(), (x, weight))
    wide, w = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt() * (w + offset)
    expected = torch.autograd.grad((exact * factors).sum(), (wide, w))
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-6)
    for one, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "options"), fused_blocks.ACTIVATIONS)
def test_the_gate_has_the_gradient_of_finite_differences(name, options):
    torch.manual_seed(0)
    gate, up = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda g, u: fused_blocks._Gate.apply(g, u, name, options), (gate, up))
    for frozen in (gate, up):  # as behind layers that do not train
        frozen.requires_grad_(False)
        assert torch.autograd.gradcheck(lambda g, u: fused_blocks._Gate.apply(g, u, name, options), (gate, up))
        frozen.requires_grad_(True)


def test_gradients_of_gradients_raise():
    x, weight = torch.randn(3, 6, requires_grad=True), torch.ones(6, requires_grad=True)
    for y in (fused_blocks._Norm.apply(x, weight, 1e-6, 0.0, True), fused_blocks._Gate.apply(x, x, "silu", {})):
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.square().sum().backward()


def kept(module, x):
    """Bytes that autograd keeps for the backward pass, without parameters and the input."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), x)}
    sizes = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = module(x)
    return sum(size for size, _ in sizes.values()), y


def test_what_is_kept():
    config = tiny_config("llama", tiny_tokenizer())
    x = torch.randn(10, 16, requires_grad=True)
    norm, x16 = LlamaRMSNorm(16).bfloat16(), torch.randn(10, 16, dtype=torch.bfloat16, requires_grad=True)
    # x in float32 and the scale, their product in bf16; then the scale
    assert kept(norm, x16)[0] == 4 * (10 * 16 + 10) + 2 * 10 * 16
    fuse_blocks(norm)
    assert kept(norm, x16)[0] == 4 * 10
    for module, before, now in (
        # x / rms(x) and the token's scale; then the scale
        (LlamaRMSNorm(16), 10 * 16 + 10, 10),
        # gate, up, act(gate), and their product for `down_proj`; then without act(gate)
        (LlamaMLP(config), 4 * 10 * 32, 3 * 10 * 32),
    ):
        fused = copy.deepcopy(module)
        assert fuse_blocks(fused) == 1
        assert kept(module, x)[0] == 4 * before and kept(fused, x)[0] == 4 * now


def test_without_gradients_gate_and_up_are_gone_before_the_next_product():
    module, alive = LlamaMLP(tiny_config("llama", tiny_tokenizer())), []
    assert fuse_blocks(module) == 1
    made = []
    for part in (module.gate_proj, module.up_proj):
        part.register_forward_hook(lambda m, args, y: made.append(weakref.ref(y)))
    module.down_proj.register_forward_pre_hook(lambda m, args: alive.append([ref() is not None for ref in made]))
    with torch.no_grad():
        module(torch.randn(10, 16))
    assert alive == [[False, False]]


class Shifted(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x) + 1e-3


class Centred(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class TwoInputs(LlamaRMSNorm):
    def forward(self, x, gate):
        return super().forward(x * gate)


class TinyFloor(LlamaRMSNorm):
    def forward(self, x):
        return self.weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True).clamp_min(1e-8))).to(x)


class OfTheWeight(LlamaRMSNorm):
    """T5's: 16 bits if the weight has them, whatever the input has."""

    def forward(self, x):
        x = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (x.to(self.weight.dtype) if self.weight.dtype == torch.bfloat16 else x)


class ChangesItsInput(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x.mul_(0.5))


class OfOneWidth(LlamaRMSNorm):
    def forward(self, x):
        if x.shape[-1] != 16:
            raise ValueError("another width")
        assert x.dim() == 3
        return super().forward(x)


class Drops(LlamaMLP):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.1, self.training)


class Swapped(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class Limited(LlamaMLP):
    def forward(self, x):
        gate, up = self.gate_proj(x).clamp(max=10), self.up_proj(x).clamp(-10, 10)
        return self.down_proj(self.act_fn(gate) * up)


class Dropout(LlamaMLP):
    def __init__(self, config):
        super().__init__(config)
        self.drop = nn.Dropout(0.0)


NORMS = [Shifted, Centred, TwoInputs, TinyFloor, OfTheWeight, ChangesItsInput, OfOneWidth, nn.RMSNorm, nn.LayerNorm]


@pytest.mark.parametrize("kind", NORMS)
def test_a_norm_of_another_formula_is_left_alone(kind):
    assert fuse_blocks(kind(16, eps=1e-8).eval()) == 0


@pytest.mark.parametrize("kind", [Drops, Swapped, Limited, Dropout])
def test_a_feed_forward_layer_of_another_formula_is_left_alone(kind):
    assert fuse_blocks(kind(tiny_config("llama", tiny_tokenizer())).eval()) == 0


@pytest.mark.parametrize("act", ["relu", "sigmoid", "quick_gelu", "gelu_10", "gelu_new"])
def test_another_activation_is_left_alone(act):
    module = LlamaMLP(tiny_config("llama", tiny_tokenizer(), hidden_act=act))
    assert type(module.act_fn) is type(ACT2FN[act]) and fuse_blocks(module) == 0


def test_a_second_input_is_for_the_class():
    """FalconH1's norm takes a gate, or none."""
    norm = FalconH1RMSNormGated(16, eps=1e-6, n_groups=1, norm_before_gate=False)
    x, gate = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    expected = norm(x, gate), norm(x, gate=gate), norm(hidden_states=x), norm(x)
    assert fuse_blocks(norm) == 1
    for said, other in zip((norm(x, gate), norm(x, gate=gate), norm(hidden_states=x), norm(x)), expected, strict=True):
        assert torch.equal(said, other)


def test_a_model_without_numbers_is_covered_like_one_with():
    with torch.device("meta"):
        model = family("gemma3_text")
    assert fuse_blocks(model) == FAMILIES["gemma3_text"]


def test_hooks_and_others_forwards():
    module = LlamaMLP(tiny_config("llama", tiny_tokenizer()))
    module.act_fn.register_forward_hook(lambda m, args, y: None)  # one that only looks on
    assert fuse_blocks(module) == 0
    norm, calls = LlamaRMSNorm(16), []
    norm.register_forward_hook(lambda m, args, y: calls.append(1) or 2 * y)
    x = torch.randn(3, 16)
    expected = norm(x)
    assert fuse_blocks(norm) == 1 and len(calls) == 1, "hooks are for real inputs"
    assert torch.equal(norm(x), expected) and len(calls) == 2
    assert fuse_blocks(norm) == 0, "once"


def test_a_copy_is_a_model_of_its_own():
    fused = tiny_causal_lm("llama", tiny_tokenizer())
    ids = torch.randint(2, 20, (2, 5))
    fuse_blocks(fused)
    before = fused(input_ids=ids).logits
    for again in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        with torch.no_grad():
            for name, parameter in again.named_parameters():
                if "norm" in name:
                    parameter.mul_(2)
        assert not torch.allclose(again(input_ids=ids).logits, before)
        assert torch.equal(fused(input_ids=ids).logits, before)
