"""
Every role under torch's `fully_shard`, without accelerate, which does not enter FSDP on a CPU.

    torchrun --nproc_per_node 2 tests/distributed/fsdp2_worker.py --world WORLD --output OUT --cases plain ckpt

A process takes its half of the rows, the plain model all of them; the differences stand in `OUT/CASE.rank0.pt`.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from rlhf_ext.models.build import build_roles, load_policy
from rlhf_ext.models.roles import checkpoint_context


def build(world: Path, checkpointing: bool) -> torch.nn.Module:
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    policy = load_policy(str(world / "base"))
    model = build_roles(policy, critic="adapter", reward_adapter=str(world / "reward"), peft_config=config).model
    if checkpointing:
        kwargs = {"use_reentrant": False, "context_fn": checkpoint_context}
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
        model.enable_input_require_grads()
    return model.train()


def shard(model: torch.nn.Module) -> torch.nn.Module:
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    model = fully_shard(model)
    register_fsdp_forward_method(model, "generate")  # as `Trainer` does
    return model


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Four rows with padding on the left, on the right and on both sides."""
    ids = torch.arange(5, 33).view(4, 7)
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[2, 5:] = mask[3, :1] = mask[3, 6:] = 0
    return ids, mask


def step(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """What every role says, and one backward of a term of the policy and one of the critic; in the order of PPO."""
    with torch.no_grad():  # not last: it leaves the root's parameters whole, and a whole one has no gradient yet
        scores = model(input_ids=ids, attention_mask=mask, role="reward")
    logits = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    values = model(input_ids=ids, attention_mask=mask, role="critic")
    (logits.square().mean() + (values * mask).square().mean()).backward()
    return {"policy": logits.detach(), "critic": values.detach(), "reward": scores}


def run(case: str, world: Path) -> dict[str, float]:
    checkpointing, rank = case == "ckpt", dist.get_rank()
    ids, mask = rows()
    half = slice(2 * rank, 2 * rank + 2)
    plain, sharded = build(world, checkpointing), shard(build(world, checkpointing))
    expected, found = step(plain, ids, mask), step(sharded, ids[half], mask[half])
    apart = {name: (expected[name][half] - tensor).abs().max().item() for name, tensor in found.items()}
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters() if parameter.grad is not None}
    theirs = {n: whole(p.grad) for n, p in sharded.named_parameters() if p.grad is not None}
    assert gradients.keys() == theirs.keys(), sorted(gradients.keys() ^ theirs.keys())[:8]
    assert any(".critic." in name for name in theirs)
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    apart["gradients"] = max((gradients[n] - theirs[n]).abs().max().item() for n in theirs) / largest
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    prompt, prompt_mask = ids[half, :4], torch.ones(2, 4, dtype=torch.long)
    completions = [
        model.eval().generate(input_ids=prompt, attention_mask=prompt_mask, **settings) for model in (plain, sharded)
    ]
    apart["generate"] = float((completions[0] != completions[1]).sum())
    return apart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", default=["plain", "ckpt"])
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for case in parsed.cases:
        torch.save(run(case, parsed.world), parsed.output / f"{case}.rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
