"""Evaluation: one number whatever the batch, a name for each data set, tables of its own, and training as without."""

import pandas as pd
import pytest
import torch
from datasets import Dataset

from rlhf_ext import PreferenceRewardConfig, PreferenceRewardTrainer
from tests.tiny import tiny_reward_model, tiny_tokenizer
from tests.trainers.test_ppo_roles import PROMPTS, build, weights


ROWS = [{"prompt": prompt} for prompt in PROMPTS[:5]]


def long_prompts(prompts, prompt_ids, **kwargs):
    return [float(len(ids)) for ids in prompt_ids]


def reward_trainer(tmp_path, batch_size, eval_dataset):
    config = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
    return PreferenceRewardTrainer(
        model=tiny_reward_model("llama", tiny_tokenizer()),
        args=PreferenceRewardConfig(str(tmp_path), per_device_eval_batch_size=batch_size, disable_tqdm=True, **config),
        train_dataset=eval_dataset,
        eval_dataset=eval_dataset,
        processing_class=tiny_tokenizer(),
    )


def test_numbers_of_a_reward_model_do_not_hang_on_the_batch(tmp_path):
    rows = [{"prompt": f"w{i} ", "chosen": f"w{i + 1} good", "rejected": "bad w2 w3"[: 3 + i]} for i in range(9)]
    found = [reward_trainer(tmp_path, size, Dataset.from_list(rows)).evaluate() for size in (9, 1, 4)]
    for name in ("eval_accuracy", "eval_margin", "eval_mean_reward", "eval_min_reward", "eval_max_reward"):
        assert found[0][name] == pytest.approx(found[1][name], abs=1e-5) == pytest.approx(found[2][name], abs=1e-5), (
            name
        )
    assert 0 < found[0]["eval_accuracy"] < 1


@pytest.mark.parametrize("size", [1, 2, 5])
def test_numbers_of_a_policy_do_not_hang_on_the_batch(tmp_path, size):
    """Rows without a score are in no mean of scores."""

    def some(prompts, prompt_ids, **kwargs):
        return [
            None if prompt == PROMPTS[0] else float(len(ids)) for prompt, ids in zip(prompts, prompt_ids, strict=True)
        ]

    config = {"per_device_eval_batch_size": size, "kl_coef": 0.0}
    trainer = build(tmp_path, reward_funcs=some, eval_dataset=Dataset.from_list(ROWS), config=config)
    lengths = [len(tiny_tokenizer()(row["prompt"])["input_ids"]) for row in ROWS[1:]]
    found = trainer.evaluate()
    for name in ("eval_reward", "eval_rlhf_reward"):
        assert found[name] == pytest.approx(sum(lengths) / len(lengths)), name


def test_what_ended_weighs_by_what_ended(tmp_path):
    trainer = build(tmp_path, reward_funcs=long_prompts)
    trainer.model.eval()
    trainer._eval_prefix = "eval"
    for ended, length in ((0, 0.0), (3, 7.0), (1, 11.0)):
        trainer._count_eval_rows(4, ended=ended)
        for name in ("mean", "min", "max"):
            trainer._metrics["eval"][f"completions/{name}_terminated_length"].append(length)
    trainer.log(logs := {})
    assert [logs[f"eval_completions/{name}_terminated_length"] for name in ("mean", "min", "max")] == [8.0, 7.0, 11.0]


@pytest.mark.parametrize("between", ["predict", "prefix", "error"])
def test_an_evaluation_leaves_nothing_to_the_next(tmp_path, between):
    fails = {"now": False}

    def reward(prompts, prompt_ids, **kwargs):
        if fails["now"] and len(prompts) == 1:
            raise RuntimeError("no score")
        return long_prompts(prompts, prompt_ids)

    data, config = Dataset.from_list(ROWS), {"per_device_eval_batch_size": 2}
    trainer = build(tmp_path, reward_funcs=reward, eval_dataset=data, config=config)
    expected = trainer.evaluate()["eval_reward"]
    state = torch.get_rng_state()
    if between == "predict":
        trainer.predict(data)
    elif between == "prefix":
        assert trainer.evaluate(metric_key_prefix="test")["eval_reward"] == pytest.approx(expected)
    else:
        fails["now"] = True
        with pytest.raises(RuntimeError, match="no score"):
            trainer.evaluate()
        fails["now"] = False
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.evaluate()["eval_reward"] == pytest.approx(expected)


def test_each_data_set_has_its_name(tmp_path):
    sets = {"a/short": Dataset.from_list(ROWS[:1]), "long": Dataset.from_list(ROWS[1:2])}
    trainer = build(tmp_path, reward_funcs=long_prompts, eval_dataset=sets, config={"log_completions": True})
    found = trainer.evaluate()
    assert found["eval_a/short_reward"] < found["eval_long_reward"] and "eval_reward" not in found
    tables = {path.name for path in (tmp_path / "out" / "completions").iterdir()}
    assert tables == {"eval_a-short_00000.parquet", "eval_long_00000.parquet"}
    rows = [{"prompt": "w1 ", "chosen": "good", "rejected": "bad"}]
    pairs = {"a": Dataset.from_list(rows), "b": Dataset.from_list(rows * 2)}
    trainer = reward_trainer(tmp_path, 2, Dataset.from_list(rows))
    assert {"eval_a_accuracy", "eval_b_accuracy"} <= trainer.evaluate(pairs).keys()


def test_training_is_as_without_an_evaluation_and_tables_are_apart(tmp_path):
    ended = {}
    for strategy in ("no", "steps"):
        config = {"eval_strategy": strategy, "eval_steps": 1, "log_completions": True, "max_steps": 2}
        trainer = build(
            tmp_path / strategy, reward_funcs=long_prompts, eval_dataset=Dataset.from_list(ROWS), config=config
        )
        trainer.train()
        ended[strategy] = weights(trainer.model)
    assert all(torch.equal(tensor, ended["steps"][name]) for name, tensor in ended["no"].items())
    tables = {path.name: pd.read_parquet(path) for path in (tmp_path / "steps/out/completions").iterdir()}
    names = {f"{kind}_{step:05d}.parquet" for kind in ("completions", "eval") for step in (1, 2)}
    assert tables.keys() == names
    assert {len(table) for name, table in tables.items() if name.startswith("eval")} == {len(ROWS)}
    trained = pd.read_parquet(tmp_path / "no/out/completions/completions_00002.parquet")
    assert tables["completions_00002.parquet"].equals(trained)
