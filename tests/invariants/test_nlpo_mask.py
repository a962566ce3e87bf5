"""NLPO's mask is that of a policy that is renewed, every sampled token lies in it, and EOS is always allowed."""

import pytest
import torch

from rlhf_ext.functional import top_p_mask
from rlhf_ext.trainers.ppo_rollout import token_mask, whole_rows
from tests.trainers.ppo_runs import rollout, stir
from tests.trainers.test_nlpo import make_nlpo, masks_of, plain_masks, policy_weights, same, weights_of_target


@pytest.mark.parametrize(("kind", "lora"), [("llama", False), ("gpt2", False), ("llama", True)])
def test_s25_samples_lie_in_the_masks_of_the_masking_policy(tmp_path, kind, lora):
    trainer = make_nlpo(tmp_path, kind, lora, temperature=0.8)
    stir(trainer)  # so that masking policy and policy differ
    batch = rollout(trainer)
    mask, allowed = token_mask(batch), masks_of(trainer, batch)
    assert len(set(batch["prompt_mask"].sum(1).tolist())) > 1
    assert allowed.gather(-1, batch["completion_ids"][..., None])[mask].all()
    assert trainer.processing_class.eos_token_id in trainer._keep_ids
    assert allowed[mask][:, trainer._keep_ids].all()
    assert allowed[mask].float().mean() < 0.9
    expected = plain_masks(trainer, batch)
    assert (allowed[mask] == expected[mask]).all(-1).float().mean() > 0.95  # a cache may flip a token at the border
    own = trainer.roles.base(input_ids=whole_rows(batch)[0], attention_mask=whole_rows(batch)[1]).logits
    first = batch["prompt_ids"].size(1)
    own = top_p_mask(own[:, first - 1 : -1] / 0.8, top_p=0.7, min_tokens=1, keep_ids=trainer._keep_ids)
    assert (own[mask] != allowed[mask]).any(), "the policy's own masks would prove nothing"
    assert "generate" not in vars(trainer.model)


@pytest.mark.parametrize("lora", [False, True])
def test_s25_the_masks_change_after_a_refresh_and_not_before(tmp_path, lora):
    """Public code copied the policy once and never again."""
    trainer = make_nlpo(tmp_path, lora=lora, mask_refresh_rollouts=2, max_steps=6, num_iterations=1)
    start, seen = weights_of_target(trainer), []
    probe = rollout(trainer)
    stock = trainer._generate_and_score_completions

    def watched(inputs):
        batch = stock(inputs)
        seen.append((weights_of_target(trainer), plain_masks(trainer, probe), policy_weights(trainer)))
        return batch

    trainer._generate_and_score_completions = watched
    trainer.train()
    targets, masks, policies = zip(*seen, strict=True)
    assert len(seen) == 6
    assert same(targets[0], start) and same(targets[1], start)
    assert same(targets[2], policies[2]) and same(targets[3], policies[2]) and not same(targets[3], policies[3])
    assert same(targets[4], policies[4])
    assert torch.equal(masks[0], masks[1])
    assert not all(torch.equal(masks[0], later) for later in masks[2:])
