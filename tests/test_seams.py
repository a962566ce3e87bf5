"""Names, signatures, keys and branches of TRL 1.16 that we lean on. A red test here says what of ours would break."""

import inspect

import pytest
import torch
from trl import GRPOTrainer, RewardTrainer
from trl.trainer.utils import add_fused_lm_head, shuffle_sequence_dict, split_tensor_dict

from tests.trainers.test_ppo_loss import PROMPTS, make_trainer, rollout


SIGNATURES = {
    (GRPOTrainer, "_calculate_rewards"): ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    (GRPOTrainer, "_generate_and_score_completions"): ["self", "inputs"],
    (GRPOTrainer, "_compute_loss"): ["self", "model", "inputs"],
    (GRPOTrainer, "_tokenize_prompts"): ["self", "prompts"],
    (GRPOTrainer, "_save"): ["self", "output_dir", "state_dict"],
    (GRPOTrainer, "create_optimizer"): ["self", "model"],
    (RewardTrainer, "compute_loss"): ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    (RewardTrainer, "_prepare_dataset"): ["self", "dataset", "processing_class", "args", "dataset_name"],
    (RewardTrainer, "_set_signature_columns_if_needed"): ["self"],
}


@pytest.mark.parametrize("seam", SIGNATURES, ids=lambda seam: f"{seam[0].__name__}.{seam[1]}")
def test_signatures_of_wrapped_methods(seam):
    owner, name = seam
    assert list(inspect.signature(getattr(owner, name)).parameters) == SIGNATURES[seam]


def test_log_probability_call_keeps_its_keywords():
    names = list(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)
    assert names[1:6] == ["model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"]
    assert list(inspect.signature(add_fused_lm_head).parameters)[:2] == ["model", "temperature"]


def test_loss_scaling_flags():
    """Our value term assumes that GRPO divides by accumulation itself; the preference loss that the trainer does."""
    assert GRPOTrainer.loss_is_scaled_for_ga is True
    assert RewardTrainer.loss_is_scaled_for_ga is False


def test_rollout_keys_and_shapes(tmp_path):
    trainer = make_trainer(tmp_path)
    batch = rollout(trainer)
    rows, tokens = batch["completion_ids"].shape
    assert rows == len(PROMPTS)
    for name in ("completion_mask", "advantages", "old_per_token_logps", "values", "returns"):
        assert batch[name].shape == (rows, tokens), name
    assert batch["prompt_ids"].shape == batch["prompt_mask"].shape
    assert batch["num_items_in_batch"].dim() == 0
    assert int(batch["num_items_in_batch"]) == int(batch["completion_mask"].sum()), "the divisor counts the rollout"
    logps = trainer._logps(trainer.model, batch, "train")
    assert logps.shape == (rows, tokens)


def test_parent_takes_advantages_per_token(tmp_path):
    """The `(B, T)` branch has no user left in TRL; without it PPO's advantages would be misread."""
    trainer = make_trainer(tmp_path)
    batch = rollout(trainer)
    per_row = torch.randn(len(PROMPTS))
    per_token = per_row[:, None].expand_as(batch["advantages"])
    losses = [
        GRPOTrainer._compute_loss(trainer, trainer.model, {**batch, "advantages": advantages})
        for advantages in (per_row, per_token)
    ]
    assert losses[0].item() == losses[1].item()


def test_divisor_is_the_parents(tmp_path):
    trainer = make_trainer(tmp_path, epsilon=0.9)
    batch = rollout(trainer)
    ones = {**batch, "advantages": torch.ones_like(batch["advantages"])}
    loss = GRPOTrainer._compute_loss(trainer, trainer.model, ones)
    assert loss.item() == pytest.approx(
        -(batch["completion_mask"].sum() / trainer._loss_divisor(batch)).item(), abs=1e-5
    )


def test_foreign_keys_stay_aligned_through_shuffle_and_split():
    rows = torch.arange(8)
    batch = {
        "completion_ids": rows[:, None].repeat(1, 3),
        "values": rows[:, None].repeat(1, 3).float(),
        "n": torch.tensor(5),
    }
    parts = split_tensor_dict(shuffle_sequence_dict(batch), 2)
    for part in parts:
        assert torch.equal(part["completion_ids"].float(), part["values"])
    assert sorted(torch.cat([p["values"][:, 0] for p in parts]).tolist()) == list(range(8))
