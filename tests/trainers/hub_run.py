"""What `test_hub.py` runs in processes of their own: `push FOLDER` trains and pushes, `load FOLDER` reads it back.

Each leaves its numbers in `FOLDER/push.pt` or `FOLDER/load.pt`.
"""

import re
import sys
from pathlib import Path

import torch
from datasets import Dataset
from huggingface_hub import hf_hub_download
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from rlhf_ext import PPOConfig, PPOTrainer, PreferenceRewardConfig, PreferenceRewardTrainer
from rlhf_ext.models.build import load_policy
from rlhf_ext.models.scoring import load_critic, load_reward_model, token_scores
from tests.tiny import tiny_causal_lm, tiny_reward_model, tiny_tokenizer


PROMPTS = ["the cat sat", "w1 w2 w3 w4", "fine mat ?", "w5 the w6", "good cat", "bad w7 w8", "on the mat", "w9 ."]
IDS = torch.tensor([[5, 6, 7, 8, 1], [9, 10, 11, 12, 13], [30, 31, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
SHARED = {"use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "logging_steps": 1}
PPO = {
    **SHARED,
    "per_device_train_batch_size": 4,
    "steps_per_generation": 2,
    "gradient_accumulation_steps": 2,
    "max_completion_length": 6,
    "max_steps": 3,
    "learning_rate": 1e-2,
    "gradient_checkpointing": False,
    "save_steps": 2,
}


class WaitForPush(TrainerCallback):
    """`Trainer` uploads in the background what the next save overwrites: a slow machine would mix two steps."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer._finish_current_push()


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()]


def values(model):
    with torch.no_grad():
        return token_scores(model, IDS, MASK)[MASK.bool()]


def role(trainer, name):
    with torch.no_grad():
        return trainer.model.eval()(input_ids=IDS, attention_mask=MASK, role=name)[MASK.bool()]


def text(policy, tokenizer):
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    ids = policy.generate(**inputs, max_new_tokens=8, do_sample=False)
    return tokenizer.decode(ids[0])


def push(folder: Path) -> dict:
    found = {}
    tokenizer = tiny_tokenizer()
    # Large enough for an upload in parts.
    tiny_causal_lm("llama", tokenizer, hidden_size=64, intermediate_size=256).push_to_hub("base")
    tokenizer.push_to_hub("base")

    pairs = {"prompt": PROMPTS, "chosen": ["good"] * len(PROMPTS), "rejected": ["bad"] * len(PROMPTS)}
    reward = PreferenceRewardTrainer(
        model="tester/base",
        args=PreferenceRewardConfig(str(folder / "reward"), max_steps=3, learning_rate=1e-2, save_steps=2, **SHARED),
        train_dataset=Dataset.from_dict(pairs),
        peft_config=lora(),
    )
    reward.train()
    reward.push_to_hub()
    found["reward"] = values(reward.model)

    rows = Dataset.from_dict({"prompt": PROMPTS})
    one_base = PPOTrainer(
        model="tester/base",
        reward_adapter="tester/reward",
        args=PPOConfig(
            str(folder / "ppo"), push_to_hub=True, hub_strategy="every_save", adaptive_kl_target=6.0, **PPO
        ),
        train_dataset=rows,
        peft_config=lora(),
    )
    one_base.add_callback(WaitForPush(one_base))
    one_base.train()
    one_base.push_to_hub(dataset_name=str(folder / "rows.jsonl"))
    found["one_base"] = [logits(one_base.model), role(one_base, "critic"), role(one_base, "reward")]
    found["text"] = text(one_base.model, one_base.processing_class)

    full = PPOTrainer(
        model="tester/base",
        reward_funcs=tiny_reward_model("llama", tokenizer, seed=1),
        args=PPOConfig(str(folder / "full"), hub_private_repo=True, **PPO),
        train_dataset=rows,
    )
    full.train()
    full.push_to_hub(dataset_name="tester/prompts")
    found["full"] = [logits(full.model), role(full, "critic")]
    return found


def load(folder: Path) -> dict:
    found = {}
    # The card's own code
    card = Path(hf_hub_download("tester/ppo", "README.md")).read_text()
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        exec(block, names)
    found["one_base"] = [logits(names["policy"]), values(names["critic"]), values(names["reward_model"])]
    found["text"] = text(names["policy"], names["tokenizer"])
    found["keys"] = sorted(names["policy"].peft_config)
    found["reward"] = values(load_reward_model("tester/reward"))
    found["full"] = [logits(AutoModelForCausalLM.from_pretrained("tester/full")), values(load_critic("tester/full"))]

    # A run that starts from what was pushed, every role by its id
    policy = load_policy("tester/ppo")
    assert isinstance(policy, PeftModel) and any(p.requires_grad for p in policy.parameters())
    args = PPOConfig(str(folder / "next"), **PPO)
    following = PPOTrainer(
        model="tester/ppo",
        reward_adapter="tester/ppo/reward",
        args=args,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
    )
    found["next"] = [logits(following.model), role(following, "reward")]
    following = PPOTrainer(
        model="tester/full",
        reward_funcs=lambda prompts, **kwargs: [0.0] * len(prompts),
        critic_model="tester/full/critic",
        args=args,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=AutoTokenizer.from_pretrained("tester/full"),
    )
    found["next_full"] = [logits(following.model), role(following, "critic")]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    command, output = sys.argv[1], Path(sys.argv[2])
    torch.save({"push": push, "load": load}[command](output), output / f"{command}.pt")
