"""Full and LoRA reward models: the head is trained, saved, fp32, never wrapped; scores survive the disk."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

from rlhf_ext.models.scoring import load_reward_model
from rlhf_ext.trainers.reward_config import PreferenceRewardConfig
from rlhf_ext.trainers.reward_trainer import PreferenceRewardTrainer
from tests.tiny import tiny_causal_lm, tiny_reward_model, tiny_tokenizer


ROWS = [
    {"prompt": "w1 ", "completions": ["good", "bad w2", "w4"], "best": 0},
    {"prompt": "w2 w3 ", "completions": ["bad", "good", "w5 w6"], "best": 1},
]
OPTIONS = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "max_steps": 2,
    "learning_rate": 1e-2,
}
IDS = [[5, 6, 7, 1], [5, 6, 0, 0]]
MASK = [[1, 1, 1, 1], [1, 1, 0, 0]]

# One process loads every model of the file: importing torch and transformers is most of its time.
RELOAD = """
import json, sys, warnings
import torch
from rlhf_ext.models.scoring import load_reward_model
ids, mask = torch.tensor({ids}), torch.tensor({mask})
scores = []
for folder in sys.argv[1:]:
    with torch.no_grad():
        model = load_reward_model(folder)
        assert not model.training
        scores.append(model(input_ids=ids, attention_mask=mask).logits.flatten().tolist())
print("SCORES", json.dumps(scores))
"""


def train(folder, model, tokenizer=None, peft_config=None, **kwargs):
    tokenizer = tokenizer or tiny_tokenizer()
    trainer = PreferenceRewardTrainer(
        model=model,
        args=PreferenceRewardConfig(str(folder), **{**OPTIONS, **kwargs}),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.train()
    trainer.save_model()
    return trainer


def scores_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(IDS), attention_mask=torch.tensor(MASK)).logits.flatten()


def head_names(model):
    return [name for name, parameter in model.named_parameters() if "score" in name and parameter.requires_grad]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trained models by name: (trainer, folder)."""
    root = tmp_path_factory.mktemp("reward")
    tokenizer = tiny_tokenizer()
    for kind in ("llama", "gpt2"):
        tiny_causal_lm(kind, tokenizer).save_pretrained(root / kind)
        tokenizer.save_pretrained(root / kind)
    runs = {}
    lora = LoraConfig(r=4, target_modules="all-linear")
    for kind in ("llama", "gpt2"):
        runs[f"full-{kind}"] = train(root / f"full-{kind}", str(root / kind), tokenizer=tiny_tokenizer(True))
    runs["sum"] = train(root / "sum", str(root / "llama"), reward_aggregation="sum")
    runs["full-bf16"] = train(root / "full-bf16", tiny_reward_model("llama", tokenizer, torch.bfloat16))
    runs["lora"] = train(root / "lora", str(root / "llama"), peft_config=lora)
    runs["lora-sum"] = train(root / "lora-sum", str(root / "llama"), peft_config=lora, reward_aggregation="sum")
    runs["lora-bf16"] = train(
        root / "lora-bf16", str(root / "llama"), peft_config=lora, model_init_kwargs={"dtype": "bfloat16"}
    )
    return {name: (trainer, root / name) for name, trainer in runs.items()}


def test_a_new_process_gives_the_same_scores_without_a_warning(trained):
    result = subprocess.run(
        [sys.executable, "-c", RELOAD.format(ids=IDS, mask=MASK), *(str(folder) for _, folder in trained.values())],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "newly initialized" not in result.stderr + result.stdout
    assert "MISSING" not in result.stderr + result.stdout
    line = next(line for line in result.stdout.splitlines() if line.startswith("SCORES"))
    for (name, (trainer, _)), scores in zip(trained.items(), json.loads(line.removeprefix("SCORES")), strict=True):
        assert torch.equal(torch.tensor(scores), scores_of(trainer.model)), name


def test_the_stock_classes_load_what_is_saved(trained):
    ids, mask = torch.tensor(IDS[:1]), torch.tensor(MASK[:1])
    trainer, folder = trained["full-llama"]
    stock = AutoModelForSequenceClassification.from_pretrained(folder)
    stock.config.pad_token_id = 0
    assert torch.equal(stock(input_ids=ids, attention_mask=mask).logits[:, 0], scores_of(trainer.model)[:1])
    trainer, folder = trained["lora"]
    base = AutoModelForSequenceClassification.from_pretrained(folder.parent / "llama", num_labels=1)
    stock = PeftModel.from_pretrained(base, folder).eval()
    stock.config.pad_token_id = 0
    assert torch.equal(stock(input_ids=ids, attention_mask=mask).logits[:, 0], scores_of(trainer.model)[:1])


def test_a_head_in_the_target_modules_is_taken_out(tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj", "score"], task_type=TaskType.CAUSAL_LM)
    trainer = train(tmp_path, tiny_reward_model("llama", tiny_tokenizer()), peft_config=lora, max_steps=1)
    assert len(head_names(trainer.model)) == 1
    assert lora.target_modules == {"q_proj", "score"} and lora.modules_to_save is None  # the caller's stays
    pattern = LoraConfig(r=2, target_modules=r".*(q_proj|score)")
    trainer = train(tmp_path, tiny_reward_model("llama", tiny_tokenizer()), peft_config=pattern, max_steps=1)
    assert len(head_names(trainer.model)) == 1


def test_a_peft_model_with_a_frozen_or_wrapped_head_is_refused(tmp_path):
    frozen = get_peft_model(tiny_reward_model("llama", tiny_tokenizer()), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="frozen.*modules_to_save"):
        train(tmp_path, frozen)
    wrapped = LoraConfig(target_modules=["q_proj", "score"])
    with pytest.raises(ValueError, match="wrapped.*target_modules"):
        train(tmp_path, get_peft_model(tiny_reward_model("llama", tiny_tokenizer()), wrapped))


def test_a_peft_model_trains_on(tmp_path):
    lora = LoraConfig(target_modules=["q_proj"], modules_to_save=["score"], task_type="SEQ_CLS")
    model = get_peft_model(tiny_reward_model("llama", tiny_tokenizer()), lora)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = train(tmp_path, model)
    after = dict(trainer.model.named_parameters())
    assert all(after[name].requires_grad for name in before)
    assert not any(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_new_head_is_drawn_as_in_the_papers_and_a_trained_one_is_kept(tmp_path):
    tokenizer = tiny_tokenizer()
    tiny_causal_lm("llama", tokenizer, hidden_size=512, num_attention_heads=8, num_key_value_heads=8).save_pretrained(
        tmp_path / "lm"
    )
    trained = tiny_reward_model("llama", tokenizer)
    trained.save_pretrained(tmp_path / "rm")

    def head(path, seed):
        args = PreferenceRewardConfig(
            str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", seed=seed
        )
        trainer = PreferenceRewardTrainer(
            model=str(path), args=args, train_dataset=Dataset.from_list(ROWS), processing_class=tiny_tokenizer()
        )
        return trainer.model.score.weight.detach()

    new = head(tmp_path / "lm", 1)
    assert new.std().item() == pytest.approx(513**-0.5, rel=0.1)
    assert torch.equal(new, head(tmp_path / "lm", 1))
    assert not torch.equal(new, head(tmp_path / "lm", 2))
    assert torch.equal(head(tmp_path / "rm", 1), trained.score.weight)


def test_an_adapter_on_a_quantised_base_loads_in_the_dtype_it_was_trained_in(tmp_path):
    """A base that is stored in bf16 and trained on in float32: embeddings and norms are not rounded on loading."""
    tokenizer = tiny_tokenizer()
    base = tiny_causal_lm("llama", tokenizer, dtype=torch.bfloat16, hidden_size=64, intermediate_size=128)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    trainer = PreferenceRewardTrainer(
        model=str(tmp_path / "base"),
        args=PreferenceRewardConfig(str(tmp_path / "out"), **OPTIONS, model_init_kwargs={"dtype": "float32"}),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type=TaskType.SEQ_CLS),
    )
    trainer.train()
    trainer.save_model()
    torch.testing.assert_close(
        scores_of(load_reward_model(tmp_path / "out")), scores_of(trainer.model), rtol=0, atol=1e-6
    )
