"""What PPO pays: wrapped scores, rewards of single tokens, and probes that are looked at and never paid."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from rlhf_ext.models.score_wrappers import Clipped, CutAt, EnsembleSpread, MissingEOS, Normalized
from rlhf_ext.models.scoring import (
    last_token_scores,
    load_critic,
    load_reward_model,
    pool_by_attention_mask,
    save_normalization,
    token_scores,
)
from rlhf_ext.trainers.ppo_rollout import token_mask, whole_rows
from tests.tiny import tiny_reward_model, tiny_tokenizer
from tests.trainers.test_ppo_roles import Adapters, build, length, logged, lora, rollout


GAIN, BIAS = 2.5, -0.75


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A base and a reward adapter with gain and bias saved."""
    folder = Adapters(tmp_path_factory.mktemp)["llama"]
    save_normalization(folder / "reward", GAIN, BIAS)
    return folder


def at_the_end(trainer, batch):
    """Output of the critic at the last real token of each row."""
    ids, mask = whole_rows(batch)
    with torch.no_grad():
        return last_token_scores(trainer.model(input_ids=ids, attention_mask=mask, role="critic"), mask)


def with_adapter(tmp_path, adapter, reward_adapter, **kwargs):
    policy = AutoModelForCausalLM.from_pretrained(adapter / "base")
    return build(tmp_path, policy, peft_config=lora(), reward_adapter=reward_adapter, **kwargs)


@pytest.mark.parametrize("critic", ["adapter", "shared"])
def test_the_critic_starts_at_the_score_after_gain_and_bias(tmp_path, adapter, critic):
    """Design 4, to 1e-5; a clip and a penalty are left to the rewards."""
    wrapped = MissingEOS(Clipped(Normalized(str(adapter / "reward")), -0.5, 0.5), penalty=3.0)
    config = {"critic": critic, "reward_weights": [2.0]}
    trainer = with_adapter(tmp_path, adapter, wrapped, config=config)
    batch = rollout(trainer)
    ids, mask = whole_rows(batch)
    with torch.no_grad():
        raw = last_token_scores(trainer.model(input_ids=ids, attention_mask=mask, role="reward"), mask)
    alone = load_reward_model(adapter / "reward", base_model=adapter / "base")
    expected = alone(input_ids=ids, attention_mask=mask).logits[:, 0].detach()
    torch.testing.assert_close(raw, expected, rtol=0, atol=1e-5)
    head = trainer.roles.base.reward_head
    assert head.score_normalization == (GAIN, BIAS)
    torch.testing.assert_close(at_the_end(trainer, batch), 2.0 * raw, rtol=0, atol=1e-5)
    finished = torch.tensor([ids[-1] == 1 for ids in _rows(batch)])
    paid = 2.0 * torch.where(finished, raw.clamp(-0.5, 0.5), raw.clamp(-0.5, 0.5) - 3.0)
    torch.testing.assert_close(trainer._scores, paid, rtol=0, atol=1e-5)
    assert not finished.all()


def _rows(batch):
    pairs = zip(batch["completion_ids"].tolist(), token_mask(batch).tolist(), strict=True)
    return [[token for token, real in zip(ids, mask, strict=True) if real] for ids, mask in pairs]


def test_what_is_saved_is_in_the_same_unit(tmp_path, adapter):
    trainer = with_adapter(tmp_path, adapter, str(adapter / "reward"), config={"max_steps": 2})
    trainer.train()
    trainer.save_model()
    out = tmp_path / "out"
    batch = rollout(trainer)
    ids, mask = whole_rows(batch)
    critic = load_critic(out, base_model=adapter / "base")
    with torch.no_grad():
        values = trainer.model(input_ids=ids, attention_mask=mask, role="critic")
    real = mask.bool()
    torch.testing.assert_close(token_scores(critic, ids, mask)[real], values[real], rtol=0, atol=1e-5)
    assert json.loads((out / "reward" / "reward_config.json").read_text())["score_gain"] == GAIN
    reward = load_reward_model(out, subfolder="reward", base_model=adapter / "base")
    scores = reward(input_ids=ids, attention_mask=mask).logits[:, 0]
    torch.testing.assert_close(scores, trainer._scores, rtol=0, atol=1e-5)
    AutoPeftModelForCausalLM.from_pretrained(out)


def test_a_critic_of_its_own_starts_in_the_same_unit(tmp_path):
    tokenizer = tiny_tokenizer()
    tiny_reward_model("llama", tokenizer, seed=5).save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    save_normalization(tmp_path / "rm", GAIN, BIAS)
    wrapped = Clipped(Normalized(Normalized(str(tmp_path / "rm")), gain=0.5, bias=1.0), -100.0, 100.0)
    trainer = build(tmp_path, reward_funcs=wrapped, config={"reward_weights": [0.5]})
    batch = rollout(trainer)
    torch.testing.assert_close(at_the_end(trainer, batch), trainer._scores, rtol=0, atol=1e-5)
    trainer.save_model()
    critic = load_critic(tmp_path / "out")
    ids, mask = whole_rows(batch)
    assert (token_scores(critic, ids, mask) - trainer.model(input_ids=ids, attention_mask=mask, role="critic"))[
        mask.bool()
    ].abs().max() < 1e-5


def test_resuming_under_another_gain_is_refused(tmp_path):
    folder = Adapters(lambda kind: tmp_path)["llama"]
    config = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    with_adapter(tmp_path, folder, str(folder / "reward"), config=config).train()
    save_normalization(folder / "reward", 2.0, 0.0)
    trainer = with_adapter(tmp_path, folder, str(folder / "reward"), config=config)
    with pytest.raises(ValueError, match="gain and bias of the reward head"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))


def test_resuming_with_a_critic_of_another_unit_is_refused(tmp_path, adapter):
    """The weights come from the checkpoint, gain and bias from the arguments."""
    config = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    given = {"reward_adapter": str(adapter / "reward"), "peft_config": lora(), "config": config}
    first = build(tmp_path, AutoModelForCausalLM.from_pretrained(adapter / "base"), **given)
    first.train()
    other = build(
        tmp_path / "other",
        AutoModelForCausalLM.from_pretrained(adapter / "base"),
        **{**given, "config": {**config, "reward_weights": [1.0]}},
    )
    other.roles.base.critic_head.score_normalization = (1.0, 7.0)
    with pytest.raises(ValueError, match="gain and bias of the critic head"):
        other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))


def test_a_shared_critic_cannot_read_a_cut_text(tmp_path, adapter):
    with pytest.raises(ValueError, match="CutAt"):
        with_adapter(tmp_path, adapter, CutAt(str(adapter / "reward"), token="."), config={"critic": "shared"})


def test_a_cut_is_made_for_the_score_alone(tmp_path, adapter):
    trainer = with_adapter(tmp_path, adapter, CutAt(str(adapter / "reward"), token="sat", missing_score=-9.0))
    batch = rollout(trainer)
    sat = trainer.processing_class("sat")["input_ids"][0]
    missing = torch.tensor([sat not in ids for ids in _rows(batch)])
    assert missing.any()
    assert torch.equal(trainer._scores == -9.0, missing)
    assert batch["completion_mask"].sum(1).max() > 1 and torch.isfinite(batch["advantages"]).all()


def last_only(prompts, completions, completion_ids, **kwargs):
    return [[0.0] * (len(ids) - 1) + [float(len(ids))] for ids in completion_ids]


def spread_out(prompts, completions, completion_ids, **kwargs):
    return [[0.1 * (t + 1) for t in range(len(ids))] for ids in completion_ids]


def test_token_rewards_are_paid_where_they_are_earned(tmp_path):
    config = {"critic": "none", "advantage_estimator": "returns", "whiten_advantages": False, "kl_coef": 0.0}
    trainer = build(tmp_path, reward_funcs=length, token_reward_funcs=[spread_out, last_only], config=config)
    batch = rollout(trainer)
    for row, ids in zip(batch["advantages"], _rows(batch), strict=True):
        n = len(ids)
        to_go = [sum(0.1 * (s + 1) for s in range(t, n)) + 2 * n for t in range(n)]
        assert row[:n].tolist() == pytest.approx(to_go, abs=1e-5)
        assert row[n:].abs().sum() == 0
    trainer.train()
    assert logged(trainer, "token_rewards/last_only/mean") == logged(trainer, "completions/mean_length")
    paid = zip(logged(trainer, "rlhf_reward"), logged(trainer, "token_rewards/spread_out/mean"), strict=True)
    means = logged(trainer, "completions/mean_length")
    assert [total for total, _ in paid] == pytest.approx(
        [2 * m + s for m, s in zip(means, logged(trainer, "token_rewards/spread_out/mean"), strict=True)], abs=1e-4
    )


def test_a_summing_reward_model_pays_by_the_token(tmp_path):
    tokenizer = tiny_tokenizer()
    model = pool_by_attention_mask(tiny_reward_model("llama", tokenizer, seed=5), "sum")
    config = {"critic": "none", "advantage_estimator": "returns", "whiten_advantages": False, "kl_coef": 0.0}
    whole = rollout(build(tmp_path, reward_funcs=model, config=config))
    parts = rollout(build(tmp_path, token_reward_funcs=model, config=config))
    # From the first token on there is as much to earn; from the last on, only its own part.
    torch.testing.assert_close(whole["advantages"][:, 0], parts["advantages"][:, 0], rtol=0, atol=1e-5)
    assert (whole["advantages"] - parts["advantages"]).abs().max() > 1e-2


def test_probes_are_logged_and_never_paid(tmp_path):
    def gold(prompts, completions, completion_ids, prompt_ids, **kwargs):
        return [float(len(p)) if len(ids) > 2 else None for p, ids in zip(prompt_ids, completion_ids, strict=True)]

    probes = [gold, EnsembleSpread([length, Normalized(length, gain=3.0, bias=0.0)])]
    with_probes = build(tmp_path, reward_funcs=length, probe_funcs=probes)
    with_probes.train()
    without = build(tmp_path, reward_funcs=length)
    without.train()
    for (name, a), (_, b) in zip(with_probes.model.named_parameters(), without.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    # Lengths n and 3n lie n from their middle.
    assert logged(with_probes, "probe/ensemble_spread/mean") == pytest.approx(logged(with_probes, "reward"), abs=1e-5)
    assert len(logged(with_probes, "probe/gold/mean")) == 3 and min(logged(with_probes, "probe/gold/std")) > 0


def test_nothing_to_pay_is_refused(tmp_path):
    with pytest.raises(ValueError, match="token_reward_funcs"):
        build(tmp_path)
