"""The reward model: what it reads, how it is labelled, its head, and that a score is a score anywhere."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from rlhf_ext.models.scoring import classifier_of, last_token_scores, load_reward_model, token_scores
from tests.tiny import tiny_causal_lm, tiny_reward_model, tiny_tokenizer
from tests.trainers.test_ppo_roles import PROMPTS, one_base, rollout
from tests.trainers.test_ppo_roles import build as build_ppo
from tests.trainers.test_reward_trainer import PAIRS, build, loss_of, reference_scores


def test_s04_r28_prompts_that_hold_eos_are_learned_with_pad_equal_to_eos(tmp_path):
    rows = [{**row, "prompt": "w1 <eos> " + row["prompt"]} for row in PAIRS]
    trainer = build(tmp_path, rows, pad_is_eos=True, max_steps=30, per_device_train_batch_size=4, learning_rate=5e-3)
    _, scores = loss_of(trainer)
    chosen, rejected = scores.view(2, -1)
    assert ((chosen - rejected).abs() > 1e-3).all()
    trainer.train()
    assert trainer.state.log_history[-2]["loss"] < 0.5


def test_s22_r09_the_head_is_trained_never_wrapped_and_comes_back(tmp_path):
    tokenizer = tiny_tokenizer()
    tiny_causal_lm("llama", tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=4, target_modules="all-linear")
    options = {"model": str(tmp_path / "base"), "peft_config": lora, "model_init_kwargs": {"dtype": "bfloat16"}}
    trainer = build(tmp_path / "reward", PAIRS, **options, learning_rate=1e-2)
    head = classifier_of(trainer.model).score
    start = head.modules_to_save["default"].weight.detach().clone()
    trainer.train()
    assert not any(isinstance(module, BaseTunerLayer) for module in head.modules())
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert [name for name in trained if "score" in name] == ["base_model.model.score.modules_to_save.default.weight"]
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert not torch.equal(head.modules_to_save["default"].weight, start)
    moved = [parameter for name, parameter in trained.items() if "lora_B" in name]
    assert moved and all(parameter.abs().sum() > 0 for parameter in moved)
    trainer.save_model()
    ids = torch.tensor([[5, 6, 7, 1], [5, 6, 0, 0]])
    mask = (ids > 0).long()
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=ids, attention_mask=mask).logits
        for seed in (1, 2):
            torch.manual_seed(seed)  # a head that is drawn anew would differ
            found = load_reward_model(str(tmp_path / "reward"))(input_ids=ids, attention_mask=mask).logits
            assert torch.equal(found, expected)


def test_s22_heads_of_roles_on_one_base_are_no_adapters(tmp_path, adapters):
    trainer = one_base(tmp_path, adapters)
    for role, trains in (("critic", True), ("reward", False)):
        head = getattr(trainer.roles.base, f"{role}_head")
        assert isinstance(head, torch.nn.Linear) and not isinstance(head, BaseTunerLayer)
        assert head.weight.dtype == torch.float32
        assert head.weight.requires_grad is trains


def test_r09_a_missing_head_is_refused(tmp_path):
    tiny_causal_lm("llama", tiny_tokenizer()).save_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError, match="score.weight.*random"):
        load_reward_model(tmp_path / "lm")
    classifier = tiny_reward_model("llama", tiny_tokenizer())
    adapter = get_peft_model(classifier, LoraConfig(target_modules=["q_proj"]))
    adapter.peft_config["default"].base_model_name_or_path = str(tmp_path / "lm")
    adapter.save_pretrained(tmp_path / "no-head")
    with pytest.raises(ValueError, match="Neither the adapter.*score.weight.*modules_to_save"):
        load_reward_model(tmp_path / "no-head")


def test_s30_prompts_that_tokenize_differently_alone_are_counted(tmp_path):
    """ "w1" + "2" is one word: the prompt's own tokens are not where the completion's begin."""
    whole = {"prompt": "w1 ", "chosen": "good", "rejected": "bad"}
    merged = {"prompt": "w0 w1", "chosen": "2 good", "rejected": "2 bad"}
    trainer = build(tmp_path, [merged, whole])
    report = trainer.preference_reports["train"]
    assert report.num_prompt_mismatches == 1 and report.num_rows == 2
    assert trainer.train_dataset[0]["completion_starts"] == [1, 1]
    assert trainer.train_dataset[1]["completion_starts"] == [1, 1]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_s31_r32_a_score_depends_on_neither_batch_nor_padding(tmp_path, kind):
    rows = [{**PAIRS[index % 4], "prompt": " ".join(f"w{i}" for i in range(index + 1)) + " "} for index in range(8)]
    trainer = build(tmp_path, rows, kind=kind)
    ids = [torch.tensor(candidate) for row in trainer.train_dataset for candidate in row["candidate_ids"]]
    alone = torch.cat(
        [trainer.model(input_ids=row[None], attention_mask=torch.ones_like(row)[None]).logits for row in ids]
    )
    width = max(map(len, ids)) + 7
    for side in ("left", "right"):
        tokens, mask = torch.zeros(16, width, dtype=torch.long), torch.zeros(16, width, dtype=torch.long)
        for index, row in enumerate(ids):
            where = slice(width - len(row), None) if side == "left" else slice(0, len(row))
            tokens[index, where], mask[index, where] = row, 1
        batched = trainer.model(input_ids=tokens, attention_mask=mask).logits
        assert (batched - alone).abs().max() < 1e-5, side
        torch.testing.assert_close(last_token_scores(token_scores(trainer.model, tokens, mask), mask), batched[:, 0])


def test_s33_ties_count_one_half(tmp_path):
    row = {"prompt": "w1 ", "completions": ["good w2", "good w2"], "target": [0.5, 0.5]}
    trainer = build(tmp_path, [row, row], eval_rows=[row, row])
    trainer.evaluate()
    log = trainer.state.log_history[-1]
    assert log["eval_accuracy"] == 0.5
    assert log["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_r02_a_reward_model_with_another_tokenizer_reads_the_text(tmp_path):
    """score = rm(tok_rm(text)), closed by its own EOS if and only if the completion finished."""
    policy_tokenizer = tiny_tokenizer()
    other = tiny_tokenizer(words=["mat", "the", "cat", "sat", "on", "bad", "good", *[f"w{i}" for i in range(20)]])
    model = tiny_reward_model("llama", other, seed=2)
    trainer = build_ppo(
        tmp_path,
        tokenizer=policy_tokenizer,
        reward_funcs=model,
        reward_processing_classes=other,
        critic_model=tiny_reward_model("llama", policy_tokenizer, seed=4),
    )
    batch = rollout(trainer)
    ended = 0
    for row, prompt in enumerate(PROMPTS):
        completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        text = prompt + policy_tokenizer.decode(completion, skip_special_tokens=True)
        finished = completion[-1] == policy_tokenizer.eos_token_id
        ended += int(finished)
        ids = torch.tensor([other(text)["input_ids"] + [other.eos_token_id] * int(finished)])
        with torch.no_grad():
            by_hand = model(input_ids=ids).logits.item()
        assert trainer._scores[row].item() == pytest.approx(by_hand, abs=1e-5), text
    assert 0 < ended < len(PROMPTS), "finished and cut rows are both needed"


def test_r26_four_candidates_are_a_cross_entropy_and_two_a_pair(tmp_path):
    rows = [
        {"prompt": "w1 ", "completions": ["good", "bad w2", "fine . .", "w3"], "best": 2},
        {"prompt": "w4 w5 ", "completions": ["good", "bad", "w6 w7 w8", "fine"], "best": 0},
    ]
    trainer = build(tmp_path, rows)
    scores = torch.stack([reference_scores(trainer, row) for row in trainer.train_dataset])
    expected = torch.nn.functional.cross_entropy(scores, torch.tensor([2, 0]))
    torch.testing.assert_close(loss_of(trainer)[0], expected)
    pairs = build(tmp_path, PAIRS)
    loss, scores = loss_of(pairs)
    chosen, rejected = scores.view(2, -1)
    torch.testing.assert_close(loss, -torch.nn.functional.logsigmoid(chosen - rejected).mean())


def test_r27_scores_that_are_not_finite_name_their_rows(tmp_path):
    model = tiny_reward_model("llama", tiny_tokenizer())
    with torch.no_grad():
        model.model.embed_tokens.weight[tiny_tokenizer().get_vocab()["fine"]] = float("nan")
    trainer = build(tmp_path, PAIRS, model=model)
    with pytest.raises(FloatingPointError, match=r"rows \[2\]"):
        trainer.train()


def test_r27_head_and_loss_are_fp32_on_a_bf16_backbone(tmp_path):
    model = tiny_reward_model("llama", tiny_tokenizer(), torch.bfloat16)
    trainer = build(tmp_path, PAIRS, model=model, bf16=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, scores = loss_of(trainer)
    assert scores.dtype == loss.dtype == torch.float32
    assert classifier_of(trainer.model).score.weight.dtype == torch.float32
    assert classifier_of(trainer.model).model.norm.weight.dtype == torch.bfloat16
    assert not torch.equal(scores, scores.bfloat16().float()), "more digits than bf16 has"
