"""Wrappers around rewards, one by one and in each other, and gain and bias on disk."""

import json

import pytest
import torch

from rlhf_ext.models.critics import critic_from_reward
from rlhf_ext.models.rewards import adapter_of, resolve_rewards, resolve_token_rewards
from rlhf_ext.models.score_wrappers import parts_of, unit_of
from rlhf_ext.models.scoring import (
    Clipped,
    CutAt,
    EnsembleSpread,
    MissingEOS,
    ModelReward,
    Normalized,
    load_reward_model,
    normalization_of,
    pool_by_attention_mask,
    save_normalization,
    set_normalization,
    token_scores,
)
from tests.tiny import tiny_reward_model, tiny_tokenizer


TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id
TEXTS = ["good the cat", "bad . fine . sat", "the mat"]
IDS = [[*TOKENIZER(text)["input_ids"], EOS] for text in TEXTS[:2]] + [TOKENIZER(TEXTS[2])["input_ids"]]
ROWS = {"prompts": ["the"] * 3, "completions": TEXTS, "completion_ids": IDS}


def lengths(prompts, completions, completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def resolve(reward, tokenizer=TOKENIZER):
    return resolve_rewards([reward], None, tokenizer, batch_size=4)[0]


def saved_model(folder, aggregation="last"):
    model = pool_by_attention_mask(tiny_reward_model("llama", TOKENIZER), aggregation)
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    (folder / "reward_config.json").write_text(json.dumps({"reward_aggregation": aggregation}))
    return folder


def test_wrappers_compose_from_the_inside_out():
    assert lengths(**ROWS) == [4.0, 6.0, 2.0]
    reward = resolve(MissingEOS(Clipped(Normalized(lengths, gain=2.0, bias=-5.0), -0.5, 5.0), penalty=10.0))
    assert reward(**ROWS) == [3.0, 5.0, -10.5]
    assert reward.__name__ == "lengths"
    assert unit_of(reward) == (2.0, -5.0)
    assert unit_of(resolve(Normalized(Normalized(lengths, gain=2.0, bias=1.0), gain=3.0, bias=4.0)), 0.5) == (3.0, 3.5)


def test_a_row_without_a_score_stays_without():
    def some(prompts, completions, **kwargs):
        return [1.0, None, None]

    chain = MissingEOS(CutAt(Clipped(Normalized(some, gain=2.0, bias=0.0), -1.0, 1.0), token="."), penalty=1.0)
    assert resolve(chain)(**ROWS) == [-1.0, None, None]


def test_the_callers_wrappers_stay_as_they_are():
    wrapper = MissingEOS(lengths, penalty=1.0)
    resolve(wrapper)
    assert wrapper.inner is lengths and wrapper.eos_token_ids == set()


def test_a_cut_text_is_all_that_the_reward_reads():
    seen = {}

    def spy(prompts, completions, completion_ids, **kwargs):
        seen.update(completions=completions, completion_ids=completion_ids)
        return lengths(prompts, completions, completion_ids)

    reward = resolve(CutAt(spy, token=".", min_index=2, missing_score=-7.0))
    assert reward(**ROWS) == [-7.0, 4.0, -7.0]
    assert seen["completions"] == [TEXTS[0], "bad . fine .", TEXTS[2]]
    assert seen["completion_ids"][1] == IDS[1][:4]
    messages = {**ROWS, "completions": [[{"role": "assistant", "content": text}] for text in TEXTS]}
    reward(**messages)
    assert seen["completions"][1] == [{"role": "assistant", "content": "bad . fine ."}]
    with pytest.raises(ValueError, match="token='. \\?'"):
        resolve(CutAt(spy, token=". ?"))


def test_every_id_that_ends_a_completion_ends_it():
    """Pitfall S11: the tokenizer knows one of them only."""
    reward = resolve(MissingEOS(lengths, penalty=10.0))
    assert reward(**ROWS) == [4.0, 6.0, -8.0]
    reward.reward.eos_token_ids = {EOS, TOKENIZER("mat")["input_ids"][0]}
    assert reward(**ROWS) == [4.0, 6.0, 2.0]


@pytest.mark.parametrize("aggregation", ["last", "sum"])
def test_gain_and_bias_belong_to_the_saved_model(tmp_path, aggregation):
    folder = saved_model(tmp_path, aggregation)
    raw = torch.tensor(resolve(str(folder))(**ROWS))
    save_normalization(folder, 2.5, -0.75)
    assert json.loads((folder / "reward_config.json").read_text())["reward_aggregation"] == aggregation
    reward = resolve(Normalized(str(folder)))
    torch.testing.assert_close(torch.tensor(reward(**ROWS)), raw * 2.5 - 0.75, rtol=0, atol=1e-5)
    model = load_reward_model(folder)
    ids = torch.tensor([TOKENIZER("the")["input_ids"] + IDS[0]])
    own = {"completion_mask": torch.tensor([[0, 1, 1, 1, 1]])} if aggregation == "sum" else {}
    pooled = model(input_ids=ids, attention_mask=torch.ones_like(ids), **own).logits
    assert pooled.item() == pytest.approx(reward(**ROWS)[0], abs=1e-5)
    # A critic of it is in the same unit, and stays so on its way over the disk.
    critic = critic_from_reward(model, 2.0, 1.0)
    values = token_scores(critic, ids, torch.ones_like(ids))[0, -1]
    if aggregation == "last":
        assert values.item() == pytest.approx(2.0 * reward(**ROWS)[0] + 1.0, abs=1e-5)
    assert normalization_of(critic) == (1.0, 2.0 * -0.75 + 1.0)
    assert normalization_of(model) == (2.5, -0.75)


def test_a_model_without_a_score_head_is_normalised_too():
    class Encoder(torch.nn.Module):
        config = type("Config", (), {"num_labels": 1, "get_text_config": lambda self: self})()

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, input_ids, attention_mask):
            return type("Output", (), {"logits": attention_mask.sum(-1, keepdim=True) * self.weight})

    model = Encoder()
    set_normalization(model, 0.5, 1.0)
    assert ModelReward(model, TOKENIZER, TOKENIZER)(**ROWS) == [3.5, 4.5, 2.5]


def test_spread_of_an_ensemble():
    doubled = Normalized(lengths, gain=2.0, bias=0.0)
    reward = resolve(EnsembleSpread([lengths, doubled]))
    assert reward(**ROWS) == [2.0, 3.0, 1.0]
    assert sum(part is lengths for part in parts_of(reward)) == 2
    with pytest.raises(ValueError, match="two or more"):
        EnsembleSpread([lengths])


def test_what_does_not_fit_is_refused(tmp_path):
    async def later(prompts, completions, **kwargs):
        return [0.0] * len(prompts)

    with pytest.raises(ValueError, match="coroutine"):
        resolve(Clipped(later, -1.0, 1.0))
    with pytest.raises(ValueError, match="whole scores"):
        resolve_token_rewards(Clipped(lengths, -1.0, 1.0), TOKENIZER, batch_size=4)
    with pytest.raises(ValueError, match="reward_adapter is a function"):
        adapter_of(Clipped(lengths, -1.0, 1.0))

    def broken(prompts, completions, **kwargs):
        return [float("nan")] * len(prompts)

    with pytest.raises(ValueError, match=r"'broken' returned .* rows \[0, 1, 2\]"):
        resolve(Clipped(broken, -1.0, 1.0))(**ROWS)


def test_a_summing_model_pays_each_token_its_part(tmp_path):
    folder = saved_model(tmp_path, "sum")
    save_normalization(folder, 2.0, 0.5)
    reward = resolve_token_rewards(str(folder), TOKENIZER, batch_size=2)[0]
    rows = reward(**ROWS)
    assert [len(row) for row in rows] == [len(ids) for ids in IDS]
    whole = resolve(str(folder))(**ROWS)
    assert [sum(row) for row in rows] == pytest.approx(whole, abs=1e-5)
    assert max(abs(row[0] - score) for row, score in zip(rows, whole, strict=True)) > 1e-3


def test_token_rewards_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="untrained"):
        resolve_token_rewards(str(saved_model(tmp_path / "last")), TOKENIZER, batch_size=4)
    other = tiny_tokenizer(words=("other", "words"))
    model = pool_by_attention_mask(tiny_reward_model("llama", TOKENIZER), "sum")
    model.config._name_or_path = str(saved_model(tmp_path / "sum", "sum"))
    with pytest.raises(ValueError, match="another tokenizer"):
        resolve_token_rewards(model, other, batch_size=4)

    def rewards(returned):
        return resolve_token_rewards(lambda **kwargs: returned, TOKENIZER, batch_size=4)[0]

    ones = [[1.0] * len(ids) for ids in IDS]
    assert rewards(ones)(**ROWS) == ones
    with pytest.raises(ValueError, match="2 rows for 3"):
        rewards(ones[:2])(**ROWS)
    with pytest.raises(ValueError, match=r"\{2: \(1, 2\)\}"):
        rewards([*ones[:2], [1.0]])(**ROWS)
    with pytest.raises(ValueError, match=r"not finite in rows \[2\]"):
        rewards([*ones[:2], [1.0, float("inf")]])(**ROWS)
