"""The policy loss against splits, padding, epochs and an EOS that pads. Its formulas: `test_ppo_pairs.py`."""

import copy

import pytest
import torch

from tests.tiny import tiny_tokenizer
from tests.trainers.ppo_runs import gradients, make_trainer, micro_batches, rollout, stir


def test_gradient_is_the_same_for_every_split(tmp_path):
    """Pitfall S15: a token mean per micro-batch, then averaged, is another objective for each split."""
    found = {}
    for count in (1, 2, 8):
        trainer = make_trainer(
            tmp_path,
            per_device_train_batch_size=8 // count,
            steps_per_generation=count,
            gradient_accumulation_steps=count,
        )
        batch = rollout(trainer) if not found else found["batch"]
        found.setdefault("batch", batch)
        stir(trainer)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = count
        for part in micro_batches(batch, count):
            trainer._compute_loss(trainer.model, part).backward()
        found[count] = gradients(trainer)
    for count in (2, 8):
        for name, gradient in found[1].items():
            torch.testing.assert_close(found[count][name], gradient, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("lora", [False, True])
def test_ratio_is_one_before_any_update(tmp_path, kind, lora):
    """Pitfall S7: lr = 0, every ratio of every epoch is 1, whatever the padding and the micro-batch."""
    trainer = make_trainer(
        tmp_path, kind, lora, learning_rate=0.0, per_device_train_batch_size=2, steps_per_generation=4
    )
    trainer.train()
    ratios = [
        (e["policy/ratio_min"], e["policy/ratio_max"]) for e in trainer.state.log_history if "policy/ratio_max" in e
    ]
    assert len(ratios) == 4
    assert all(abs(r - 1) < 1e-5 for pair in ratios for r in pair)
    assert all(e["clip_ratio/region_mean"] == 0 for e in trainer.state.log_history if "clip_ratio/region_mean" in e)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_logps_do_not_depend_on_left_padding(tmp_path, kind):
    """Pitfall S6: a row's log-probabilities with 0, 1 and 7 left pads."""
    trainer = make_trainer(tmp_path, kind)
    batch = {k: v[3:4] for k, v in rollout(trainer).items() if v.dim()}
    found = []
    for pads in (0, 1, 7):
        keep = batch["prompt_mask"][0].bool()
        ids = batch["prompt_ids"][:, keep]
        row = dict(batch)
        row["prompt_ids"] = torch.cat([torch.zeros(1, pads, dtype=torch.long), ids], dim=1)
        row["prompt_mask"] = torch.cat([torch.zeros(1, pads, dtype=torch.long), torch.ones_like(ids)], dim=1)
        with torch.no_grad():
            found.append((trainer._logps(trainer.model, row, "train"), trainer._values(row, "train")["values"]))
    for logps, values in found[1:]:
        torch.testing.assert_close(logps, found[0][0], atol=1e-5, rtol=0)
        torch.testing.assert_close(values, found[0][1], atol=1e-5, rtol=0)


def test_policy_moves_where_pad_is_eos(tmp_path):
    """Pitfall S1: with pad == eos the EOS of a completion still gets a policy gradient."""
    tokenizer = tiny_tokenizer(pad_is_eos=True)
    trainer = make_trainer(tmp_path, tokenizer=tokenizer)
    batch = rollout(trainer)
    ended = (batch["completion_ids"] == tokenizer.eos_token_id) & batch["completion_mask"].bool()
    assert ended.any(), "the seed must give a finished completion"
    only = copy.copy(batch)
    only["advantages"] = torch.where(ended, 1.0, 0.0)
    loss = trainer.compute_policy_loss(only)
    loss.backward()
    assert sum(g.abs().sum() for n, g in gradients(trainer).items() if "critic" not in n) > 0
