"""Padding, and the token that ends a completion: what is trained, what is scored, and where the score is paid."""

import copy

import pytest
import torch
from tokenizers import pre_tokenizers

from rlhf_ext.data.candidates import pair_to_candidates, tokenize_candidates
from rlhf_ext.models.scoring import ModelReward, last_token_scores, pool_by_attention_mask, token_scores
from rlhf_ext.trainers.ppo_rollout import token_mask
from tests.models.test_scoring import rows
from tests.tiny import WORDS, tiny_causal_lm, tiny_reward_model, tiny_tokenizer
from tests.trainers.ppo_runs import gradients, make_trainer
from tests.trainers.ppo_runs import rollout as ragged_rollout
from tests.trainers.test_ppo_roles import PROMPTS, build, rollout
from tests.trainers.test_reward_trainer import PAIRS, loss_of
from tests.trainers.test_reward_trainer import build as build_reward


def keep_rollout(trainer):
    """What `compute_advantages` is given, by name, filled by the next rollout."""
    kept, stock = {}, trainer.compute_advantages
    trainer.compute_advantages = lambda batch: kept.update(batch) or stock(batch)
    return kept


def constant(prompts, completions, **kwargs):
    return [1.0] * len(prompts)


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_s01_eos_keeps_its_policy_gradient_when_pad_is_eos(tmp_path, pad_is_eos):
    tokenizer = tiny_tokenizer(pad_is_eos)
    trainer = make_trainer(tmp_path, tokenizer=tokenizer)
    batch = ragged_rollout(trainer)
    ended = (batch["completion_ids"] == tokenizer.eos_token_id) & token_mask(batch)
    assert ended.any(), "the seed must give a finished completion"
    assert (batch["advantages"][ended] != 0).all()
    batch["advantages"] = torch.where(ended, batch["advantages"], 0.0)
    trainer.compute_policy_loss(batch).backward()
    # The row of EOS in an output layer that is not tied: the gradient of its logit.
    assert gradients(trainer)["lm_head.weight"][tokenizer.eos_token_id].abs().max() > 1e-6


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_s02_a_reward_model_reads_eos_where_pad_is_eos(kind):
    tokenizer = tiny_tokenizer(pad_is_eos=True)
    model = tiny_reward_model(kind, tokenizer)
    eos = tokenizer.eos_token_id
    ids, mask = torch.tensor([[5, 6, eos], [5, 6, eos]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    finished, cut = model(input_ids=ids, attention_mask=mask).logits.flatten()
    torch.testing.assert_close(finished, cut)  # the stock forward reads both at token 6
    pool_by_attention_mask(model)
    finished, cut = model(input_ids=ids, attention_mask=mask).logits.flatten()
    assert abs(finished - cut) > 1e-3
    torch.testing.assert_close(cut[None], model(input_ids=ids[1:, :2], attention_mask=mask[1:, :2]).logits[0])


def test_s02_reward_training_scores_alike_where_pad_is_eos(tmp_path):
    # One model for both: the padding id of a config zeroes a row of the embedding.
    model = tiny_reward_model("llama", tiny_tokenizer())
    one = build_reward(tmp_path, PAIRS, model=copy.deepcopy(model))
    two = build_reward(tmp_path, PAIRS, model=copy.deepcopy(model), pad_is_eos=True)
    assert one.processing_class.pad_token_id != two.processing_class.pad_token_id
    assert torch.equal(loss_of(one)[1], loss_of(two)[1])
    ids = torch.tensor([[5, 6, 7, 1], [5, 6, 7, 1]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    finished, cut = two.model(input_ids=ids, attention_mask=mask).logits.flatten()
    assert abs(finished - cut) > 1e-3


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_s02_the_score_is_read_at_eos_and_paid_there(tmp_path, pad_is_eos):
    tokenizer = tiny_tokenizer(pad_is_eos=pad_is_eos)
    model = tiny_reward_model("llama", tokenizer, seed=1)
    trainer = build(tmp_path, tokenizer=tokenizer, reward_funcs=model, config={"kl_coef": 0.0})
    kept = keep_rollout(trainer)
    batch = rollout(trainer)
    ended = 0
    for row in range(len(PROMPTS)):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        last = len(completion) - 1
        ids = torch.cat([prompt, completion])[None]
        with torch.no_grad():
            score = model.score(model.model(input_ids=ids).last_hidden_state)[0, -1, 0]
        paid = kept["rewards"][row]
        assert paid[last].item() == pytest.approx(score.item(), abs=1e-5)
        assert paid.abs().sum().item() == pytest.approx(abs(score.item()), abs=1e-5), "once, on the last real token"
        ended += int(completion[-1] == tokenizer.eos_token_id)
    assert ended


def test_s03_messages_are_closed_by_the_template_only_when_finished():
    own = tiny_tokenizer(words=tuple(reversed(WORDS)))
    model = tiny_reward_model("llama", own)
    reward = ModelReward(model, own, tiny_tokenizer())
    prompt, completion = [{"role": "user", "content": "w1"}], [{"role": "assistant", "content": "good"}]
    trained = own.apply_chat_template(prompt + completion, tokenize=True, return_dict=True)["input_ids"]
    finished, cut = reward([prompt, prompt], [completion, completion], [[6, 1], [6]])
    for score, ids in ((finished, trained), (cut, trained[:-1])):
        ids = torch.tensor([ids])
        assert score == pytest.approx(token_scores(model, ids, torch.ones_like(ids))[0, -1].item(), abs=1e-5)


def line_break_tokenizer(words=WORDS):
    """A tokenizer that keeps line breaks, and a template that writes one behind the end of every turn, as ChatML."""
    tokenizer = tiny_tokenizer(words=(*words, "\n"))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer.chat_template = tokenizer.chat_template.replace("eos_token + ' '", "eos_token + ' \\n '")
    return tokenizer


@pytest.mark.parametrize("own_words", [WORDS, tuple(reversed(WORDS))], ids=["shared", "own"])
def test_s03_training_and_scoring_end_at_the_token_that_closes_the_turn(own_words):
    own, policy = line_break_tokenizer(own_words), line_break_tokenizer()
    prompt, good = [{"role": "user", "content": "w1"}], [{"role": "assistant", "content": "good"}]
    bad = [{"role": "assistant", "content": "bad"}]
    template = own.apply_chat_template(prompt + good, tokenize=True, return_dict=True)["input_ids"]
    assert own.decode(template[-1:]) == "\n" and template[-2] == own.eos_token_id
    general = tokenize_candidates({"prompt": prompt, "completions": [good, bad]}, own)
    assert general["candidate_ids"][0] == template[:-1]
    pair = {"prompt": prompt, "chosen": prompt + good, "rejected": prompt + bad}
    pair |= {"chosen_ids": template, "rejected_ids": [*template[:-3], *own("bad")["input_ids"], *template[-2:]]}
    assert pair_to_candidates(pair, 0, own, None)["candidate_ids"] == general["candidate_ids"]

    model = tiny_reward_model("llama", own)
    reward = ModelReward(model, own, policy)
    ids = [*policy("good")["input_ids"], policy.eos_token_id]
    row = torch.tensor([general["candidate_ids"][0]])
    trained = token_scores(model, row, torch.ones_like(row))[0, -1].item()
    assert reward([prompt], [good], [ids])[0] == pytest.approx(trained, abs=1e-5)


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_s05_gae_is_that_of_each_row_alone(tmp_path, pad_is_eos):
    """A score one slot behind EOS would add an absorbing step, and one more lambda to every advantage."""
    tokenizer = tiny_tokenizer(pad_is_eos)
    model = tiny_reward_model("llama", tokenizer, seed=1)
    config = {"gamma": 0.9, "gae_lambda": 0.8, "kl_coef": 0.3, "whiten_advantages": False}
    trainer = build(tmp_path, tokenizer=tokenizer, reward_funcs=model, config=config)
    with torch.no_grad():
        trainer.roles.base.lm_head.weight.mul_(1.1)  # away from the reference, so that every token is charged
    kept = keep_rollout(trainer)
    batch = rollout(trainer)
    for row, mask in enumerate(token_mask(batch)):
        kl, values = kept["kl"][row][mask].tolist(), batch["values"][row][mask].tolist()
        rewards = [-0.3 * one for one in kl]
        rewards[-1] += trainer._scores[row].item()
        advantages, carry = [0.0] * len(rewards), 0.0
        for t in reversed(range(len(rewards))):
            following = values[t + 1] if t + 1 < len(values) else 0.0
            carry = rewards[t] + 0.9 * following - values[t] + 0.9 * 0.8 * carry
            advantages[t] = carry
        assert max(abs(one) for one in kl) > 1e-4
        assert batch["advantages"][row][mask].tolist() == pytest.approx(advantages, abs=1e-5)
        assert batch["advantages"][row][~mask].abs().sum() == 0
        returns = [a + v for a, v in zip(advantages, values, strict=True)]
        assert batch["returns"][row][mask].tolist() == pytest.approx(returns, abs=1e-5)


def test_r10_returns_end_at_eos(tmp_path):
    """`[t0, t1, eos, pad, pad]`: a score of 1 at discount .5 is .25, .5, 1 and nothing on the padding."""
    config = {"gamma": 0.5, "gae_lambda": 1.0, "kl_coef": 0.0}
    trainer = build(tmp_path, tokenizer=tiny_tokenizer(pad_is_eos=True), reward_funcs=constant, config=config)
    batch = rollout(trainer)
    lengths = batch["completion_mask"].sum(1).tolist()
    assert min(lengths) < batch["completion_ids"].size(1), "a padded row is needed"
    for row, length in enumerate(lengths):
        by_hand = [0.5 ** (length - 1 - t) for t in range(length)]
        assert batch["returns"][row].tolist() == pytest.approx(
            [*by_hand, *[0.0] * (batch["returns"].size(1) - length)], abs=1e-6
        )


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_s06_logps_and_values_do_not_depend_on_left_padding(tmp_path, kind):
    """With 0, 1 and 7 left pads, through the trainer's own forwards; a policy of GPT-2 counts them otherwise."""
    trainer = make_trainer(tmp_path, kind)
    batch = {k: v[3:4] for k, v in ragged_rollout(trainer).items() if v.dim()}
    found = []
    for pads in (0, 1, 7):
        keep = batch["prompt_mask"][0].bool()
        ids = batch["prompt_ids"][:, keep]
        row = dict(batch)
        row["prompt_ids"] = torch.cat([torch.zeros(1, pads, dtype=torch.long), ids], dim=1)
        row["prompt_mask"] = torch.cat([torch.zeros(1, pads, dtype=torch.long), torch.ones_like(ids)], dim=1)
        with torch.no_grad():
            found.append(
                (
                    trainer._logps(trainer.model, row, "train"),
                    trainer._reference_logps(row, "train"),
                    trainer._values(row, "train")["values"],
                )
            )
    for padded in found[1:]:
        for numbers, expected in zip(padded, found[0], strict=True):
            torch.testing.assert_close(numbers, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_s06_scores_do_not_depend_on_left_padding(kind):
    model = pool_by_attention_mask(tiny_reward_model(kind, tiny_tokenizer()))
    ids, mask = rows([5, 6, 7, 8], [9, 10])
    expected = model(input_ids=ids, attention_mask=mask).logits
    for width in (4, 5, 11):
        left, left_mask = rows([5, 6, 7, 8], [9, 10], side="left", width=width)
        torch.testing.assert_close(model(input_ids=left, attention_mask=left_mask).logits, expected, atol=1e-5, rtol=0)
        scores = last_token_scores(token_scores(model, left, left_mask), left_mask)
        torch.testing.assert_close(scores, expected[:, 0], atol=1e-5, rtol=0)


def test_s11_r11_every_eos_id_ends_a_completion(tmp_path):
    """All ids of the generation config end the mask; the logged cut rate is the true one; only cut rows bootstrap."""
    tokenizer = tiny_tokenizer()
    policy = tiny_causal_lm("llama", tokenizer)
    stops = [tokenizer.eos_token_id, *range(5, 15)]
    policy.generation_config.eos_token_id = stops
    trainer = build(
        tmp_path,
        policy,
        tokenizer=tokenizer,
        reward_funcs=tiny_reward_model("llama", tokenizer, seed=1),
        config={"bootstrap_truncated": True, "max_completion_length": 3},
    )
    kept = keep_rollout(trainer)
    batch = rollout(trainer)
    assert set(trainer.reward_funcs[0].reward.eos_token_ids) == set(stops)
    ends = []
    for ids, mask in zip(batch["completion_ids"].tolist(), batch["completion_mask"].tolist(), strict=True):
        stop = next((i for i, token in enumerate(ids) if token in stops), None)
        assert sum(mask) == (len(ids) if stop is None else stop + 1)
        ends.append(None if stop is None else ids[stop])
    assert any(end not in (None, tokenizer.eos_token_id) for end in ends), "one of the others has to be drawn"
    is_cut = [end is None for end in ends]
    assert (kept["bootstrap_values"] != 0).tolist() == is_cut and any(is_cut)
    assert trainer._metrics["train"]["completions/clipped_ratio"][-1] == pytest.approx(sum(is_cut) / len(is_cut))
