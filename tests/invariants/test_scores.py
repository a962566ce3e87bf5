"""What is done to a score before it is paid: gain and bias that have to be there, cut answers, rewards of tokens."""

import pytest
import torch

from rlhf_ext.models.score_wrappers import Clipped, MissingEOS, Normalized
from rlhf_ext.models.scoring import save_normalization
from tests.models.test_score_wrappers import lengths, resolve, saved_model
from tests.tiny import tiny_causal_lm, tiny_tokenizer
from tests.trainers.test_ppo_roles import base_policy, build, length, lora, rollout, zero


def test_s29_gain_and_bias_asked_for_and_absent_raise(tmp_path):
    """A missing file must not become gain 1 and bias 0."""
    folder = saved_model(tmp_path)
    for inner in (str(folder), Clipped(str(folder), -1.0, 1.0), lengths):
        with pytest.raises(ValueError, match="gain and the bias"):
            resolve(Normalized(inner))
    save_normalization(folder, 1.0, 0.0)  # identity that was asked for is one
    resolve(Normalized(str(folder)))
    with pytest.raises(ValueError, match="positive"):
        save_normalization(folder, -1.0, 0.0)
    with pytest.raises(ValueError, match="no reward model"):
        save_normalization(tmp_path / "nowhere", 1.0, 0.0)
    with pytest.raises(ValueError, match="both"):
        Normalized(lengths, gain=1.0)


def test_s29_ppo_asks_for_them_of_a_reward_adapter(tmp_path, adapters):
    folder = adapters["llama"]
    adapter = Normalized(str(folder / "reward"))
    with pytest.raises(ValueError, match="gain and the bias"):
        build(tmp_path, base_policy(folder), reward_adapter=adapter, peft_config=lora())


def test_s11_every_eos_id_is_spared_the_penalty_for_a_cut_answer(tmp_path):
    trainer = build(tmp_path, reward_funcs=MissingEOS(zero, penalty=1.0))
    assert trainer.reward_funcs[0].reward.eos_token_ids == {1}
    policy = tiny_causal_lm("llama", tiny_tokenizer())
    policy.generation_config.eos_token_id = [1, 9, 12]
    trainer = build(tmp_path, policy, reward_funcs=MissingEOS(zero, penalty=1.0))
    for _ in range(10):
        batch = rollout(trainer)
        lasts = (batch["completion_mask"].sum(1) - 1).tolist()
        ends = [ids[last] for ids, last in zip(batch["completion_ids"].tolist(), lasts, strict=True)]
        expected = [0.0 if token in (1, 9, 12) else -1.0 for token in ends]
        assert trainer._scores.tolist() == expected
        if {9, 12} & set(ends) and -1.0 in expected:
            return
        torch.manual_seed(batch["completion_ids"].sum().item())
    raise AssertionError("no rollout with another end")


def last_only(prompts, completions, completion_ids, **kwargs):
    return [[0.0] * (len(ids) - 1) + [float(len(ids))] for ids in completion_ids]


@pytest.mark.parametrize("critic", ["model", "none"])
def test_r30_a_reward_at_the_last_token_alone_is_a_score(tmp_path, critic):
    config = {"critic": critic, "advantage_estimator": "gae" if critic == "model" else "returns"}
    batches = []
    for kwargs in ({"reward_funcs": length}, {"token_reward_funcs": last_only}):
        batches.append(rollout(build(tmp_path, config=config, **kwargs)))
    assert batches[0]["advantages"].abs().max() > 0.1
    for name in ("completion_ids", "advantages", "returns"):
        if name in batches[0]:
            assert torch.equal(batches[0][name], batches[1][name]), name
