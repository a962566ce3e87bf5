"""An ensemble: own bootstrap, own unit, one base; whole folders are not trained again; scores of each alone."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import BitsAndBytesConfig

from rlhf_ext import PreferenceRewardConfig
from rlhf_ext.data.bootstrap import bootstrap_by_prompt
from rlhf_ext.functional.scores import preference_variance, score_normalization
from rlhf_ext.models.ensembles import load_reward_ensemble
from rlhf_ext.models.reward_functions import ModelReward
from rlhf_ext.models.rewards import resolve_rewards
from rlhf_ext.models.scoring import load_reward_model, saved_normalization
from rlhf_ext.pipelines import reward_ensemble
from rlhf_ext.pipelines.finished_runs import read_run
from rlhf_ext.pipelines.reward_ensemble import train_reward_ensemble
from rlhf_ext.pipelines.reward_normalization import reference_samples
from tests.tiny import tiny_causal_lm, tiny_tokenizer


# Two rows of each prompt; the last words make rows of different lengths.
ROWS = [
    {"prompt": f"w{i} ", "completions": ["good", f"bad w{j} w{i}"], "target": [1.0, 0.0]}
    for i in range(12)
    for j in range(2)
]
PROMPTS = ["w1 ", "w20 w21 ", "the cat "]
TEXTS = ["good", "bad w3", "w4 w5 w6"]


def config(folder, **kwargs):
    options = {
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 5,
        **kwargs,
    }
    return PreferenceRewardConfig(str(folder), **options)


def lora():
    return LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")


def train(folder, base, num_members=3, peft_config=None, rows=ROWS, quantization_config=None, samples=None, **kwargs):
    return train_reward_ensemble(
        str(base),
        config(folder, **kwargs),
        Dataset.from_list(rows),
        tiny_tokenizer(),
        num_members=num_members,
        peft_config=peft_config,
        quantization_config=quantization_config,
        samples=samples,
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_causal_lm("llama", tiny_tokenizer(), hidden_size=64, intermediate_size=128).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory, base):
    folder = tmp_path_factory.mktemp("ensemble")
    return folder, train(folder, base, peft_config=lora())


def texts():
    tokenizer = tiny_tokenizer()
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in TEXTS]
    return {"prompts": PROMPTS, "completions": TEXTS, "completion_ids": ids}


def alone(folder):
    """Scores by the member's folder alone, on a base of its own."""
    return torch.tensor(ModelReward(load_reward_model(folder), tiny_tokenizer(), tiny_tokenizer())(**texts()))


def test_a_bootstrap_keeps_prompts_together_and_holds_the_rest_out():
    rows = Dataset.from_list(
        [{"prompt": f"p{i}", "chosen": f"a{j}", "rejected": "b"} for i in range(400) for j in (0, 1)]
    )
    drawn, held = bootstrap_by_prompt(rows, 1)
    assert not set(drawn["prompt"]) & set(held["prompt"])
    assert set(drawn["prompt"]) | set(held["prompt"]) == set(rows["prompt"])
    assert len(drawn) == 800 and len(held) / 800 == pytest.approx(0.368, abs=0.06)
    counts = [(list(drawn["prompt"]).count(p), [r["chosen"] for r in drawn if r["prompt"] == p]) for p in ("p3", "p9")]
    assert all(found == ["a0", "a1"] * (count // 2) for count, found in counts)
    again, other = bootstrap_by_prompt(rows, 1)[0], bootstrap_by_prompt(rows, 2)[0]
    assert again["prompt"][:] == drawn["prompt"][:] != other["prompt"][:]
    ids = Dataset.from_list([{"chosen_ids": [i], "rejected_ids": [1]} for i in range(50)])
    assert len(bootstrap_by_prompt(ids, 0)[0]) == 50
    with pytest.raises(ValueError, match="All 1 different prompts.*more prompts"):
        bootstrap_by_prompt(rows.select([0, 1]), 0)


def test_variance_of_the_predicted_preference():
    first, second = torch.tensor([[2.0, -2.0], [1.0, 1.0]]), torch.zeros(2, 2)
    p = 0.8807970779778823  # sigmoid(2)
    assert preference_variance(first, second).tolist() == pytest.approx([(p - 0.5) ** 2, 0.0], abs=1e-6)
    with pytest.raises(ValueError, match="at least two members"):
        preference_variance(torch.zeros(1, 1), torch.zeros(1, 1))


def test_variance_of_the_prediction_of_noisy_labels():
    """Christiano et al. 2017, Sec. 2.2.3: a member predicts .9 P + .05, and it is this prediction that varies."""
    first, second = torch.tensor([[2.0, -2.0], [1.0, 3.0]]), torch.zeros(2, 2)
    p = 0.8807970779778823  # sigmoid(2)
    plain, noisy = (preference_variance(first, second, noises=noises) for noises in ([0.0, 0.0], [0.1, 0.1]))
    assert noisy[0].item() == pytest.approx((0.9 * (p - 0.5)) ** 2, abs=1e-6)
    torch.testing.assert_close(noisy, 0.81 * plain)  # shared: another scale, the same order
    unlike = preference_variance(first, second, noises=[0.1, 0.0])[0].item()
    assert unlike == pytest.approx(((0.9 * p + 0.05 - (1 - p)) / 2) ** 2, abs=1e-6)
    with pytest.raises(ValueError, match="1 numbers for 2 members"):
        preference_variance(first, second, noises=[0.1])


def test_members_are_ordinary_adapters_with_their_own_unit_and_validation(ensemble):
    folder, report = ensemble
    saved = json.loads((folder / "ensemble.json").read_text())
    assert saved == json.loads(json.dumps(report))
    assert [member["folder"] for member in saved["members"]] == ["member_0", "member_1", "member_2"]
    scores = torch.stack([alone(folder / f"member_{i}") for i in range(3)])
    assert (scores[0] - scores[1]).abs().max() > 1e-2, "members that agree in everything prove nothing"
    for place, member in enumerate(saved["members"]):
        path = folder / member["folder"]
        _, held = bootstrap_by_prompt(Dataset.from_list(ROWS), 5 + place)
        assert member["num_rows"] == len(held) and 0 <= member["interval"][0] <= member["accuracy"]
        # The unit, over the validation rows as the loader reads them.
        reward = ModelReward(load_reward_model(path), tiny_tokenizer(), tiny_tokenizer())
        flat = [(row["prompt"], text) for row in held for text in row["completions"]]
        ids = [[*tiny_tokenizer()(text)["input_ids"], 1] for _, text in flat]
        found = torch.tensor(reward([p for p, _ in flat], [t for _, t in flat], ids)).double()
        assert found.mean().item() == pytest.approx(0, abs=1e-4)
        assert found.std(correction=0).item() == pytest.approx(1, abs=1e-4)
        assert saved_normalization(str(path)) == (member["gain"], member["bias"])
        assert read_run(path)["settings"]["seed"] == 5 + place
        assert not list(path.glob("checkpoint-*"))


def test_one_base_gives_the_scores_of_each_member_alone(ensemble):
    folder, _ = ensemble
    found = load_reward_ensemble(folder)
    expected = torch.stack([alone(folder / f"member_{i}") for i in range(3)], dim=1).double()
    assert len({id(member.model) for member in found.members}) == 1
    for _ in range(2):  # nothing is left behind by the member before
        scores = torch.tensor([member(**texts()) for member in found.members]).T.double()
        torch.testing.assert_close(scores, expected, atol=1e-6, rtol=0)
    assert found.mean(**texts()) == pytest.approx(expected.mean(1).tolist(), abs=1e-6)
    assert found.spread(**texts()) == pytest.approx(expected.std(1, correction=0).tolist(), abs=1e-6)
    # What `reward_funcs="folder"` makes of it.
    reward = resolve_rewards(str(folder), None, tiny_tokenizer(), batch_size=2)[0]
    assert reward(**texts()) == pytest.approx(expected.mean(1).tolist(), abs=1e-6)
    names = [name for name, parameter in found.members[0].model.named_parameters() if parameter.requires_grad]
    assert names == []


def test_disagreement_is_in_the_unit_of_training(ensemble):
    folder, _ = ensemble
    found, given = load_reward_ensemble(folder), texts()
    turned = {"completions": given["completions"][::-1], "completion_ids": given["completion_ids"][::-1]}
    variance = found.disagreement(
        PROMPTS, TEXTS, turned["completions"], given["completion_ids"], turned["completion_ids"]
    )
    raw = []
    for member in found.members:
        gain, _ = member.normalization
        one, two = member(**given), member(**{**given, **turned})
        raw.append([(a - b) / gain for a, b in zip(one, two, strict=True)])
    expected = torch.tensor(raw).sigmoid().var(dim=0, correction=0)
    assert variance == pytest.approx(expected.tolist(), abs=1e-6)
    assert variance[1] == 0.0 and variance[0] > 1e-6  # the middle text is compared with itself
    for member, noise in zip(found.members, (0.0, 0.1, 0.4), strict=True):  # as saved with members of such losses
        member.prediction_noise = noise
    noises = torch.tensor([[0.0], [0.1], [0.4]])
    expected = ((1 - noises) * torch.tensor(raw).sigmoid() + noises / 2).var(dim=0, correction=0)
    noisy = found.disagreement(
        PROMPTS, TEXTS, turned["completions"], given["completion_ids"], turned["completion_ids"]
    )
    assert noisy == pytest.approx(expected.tolist(), abs=1e-6) and noisy[0] != pytest.approx(variance[0], abs=1e-6)


def test_finished_members_are_not_trained_again_and_a_killed_one_is(tmp_path, base, ensemble, monkeypatch):
    folder, report = ensemble
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "member_1")
    (copy / "ensemble.json").unlink()
    trained, real = [], reward_ensemble._train_member

    def watched(builder, aside, *args):
        trained.append(aside.name)
        return real(builder, aside, *args)

    monkeypatch.setattr(reward_ensemble, "_train_member", watched)
    assert train(copy, base, peft_config=lora()) == json.loads(json.dumps(report))
    assert trained == ["_unfinished_member_1"]
    # Trained alone on a fresh base it is, bit by bit, what it was on a base that another member had used.
    assert _weights(copy / "member_1") == _weights(folder / "member_1")
    assert not list(copy.glob("_unfinished*"))
    with pytest.raises(ValueError, match="other settings.*learning_rate.*0.01 before, 0.5 now.*output_dir"):
        train(copy, base, peft_config=lora(), learning_rate=0.5)


def _weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def test_a_member_goes_on_from_its_checkpoint(tmp_path, base, ensemble, monkeypatch):
    folder, _ = ensemble
    # The first call dies after the checkpoint of step 2.
    options = {"peft_config": lora(), "num_members": 2, "save_strategy": "steps", "save_steps": 2}
    with monkeypatch.context() as patch:
        patch.setattr(reward_ensemble, "score_rows", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(tmp_path, base, **options)
    assert (tmp_path / "_unfinished_member_0" / "checkpoint-2").exists() and not (tmp_path / "member_0").exists()
    resumed, real = [], reward_ensemble.RewardBuilder.build

    def watched(self, *args):
        trainer = real(self, *args)
        trainer._on_resume = resumed.append
        return trainer

    monkeypatch.setattr(reward_ensemble.RewardBuilder, "build", watched)
    train(tmp_path, base, **options)
    assert [path.split("_unfinished_")[1] for path in resumed] == ["member_0/checkpoint-3"]
    assert _weights(tmp_path / "member_0") == _weights(folder / "member_0")


def test_full_models_and_the_reference_as_unit(tmp_path, base):
    samples = reference_samples(str(base), tiny_tokenizer(), [f"w{i} " for i in range(24)], max_new_tokens=6)
    report = train(tmp_path, base, num_members=2, samples=samples)
    assert report["normalized_over"] == "reference"
    found = load_reward_ensemble(tmp_path)
    given = {"prompts": samples.prompts, "completions": samples.texts, "completion_ids": samples.completion_ids}
    for place, member in enumerate(found.members):
        scores = torch.tensor(member(**given, prompt_ids=samples.prompt_ids)).double()
        assert scores.mean().item() == pytest.approx(0, abs=1e-4)
        assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-4)
        torch.testing.assert_close(torch.tensor(member(**texts())), alone(tmp_path / f"member_{place}"))
        assert member.training_gain != 1.0
    assert found.members[0].model is not found.members[1].model


@pytest.mark.parametrize("kind", ["nf4", "bf16"])
def test_members_on_a_small_base(tmp_path, base, kind):
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    options = {"quantization_config": nf4} if kind == "nf4" else {"model_init_kwargs": {"dtype": "bfloat16"}}
    train(tmp_path, base, num_members=2, peft_config=lora(), **options)
    found = load_reward_ensemble(tmp_path)
    shared = found.members[0].model
    assert getattr(shared.get_base_model(), "is_loaded_in_4bit", False) is (kind == "nf4")
    named = dict(shared.named_parameters())
    assert {p.dtype for name, p in named.items() if "lora_" in name or "modules_to_save" in name} == {torch.float32}
    assert shared.get_base_model().model.norm.weight.dtype == (torch.bfloat16 if kind == "bf16" else torch.float32)
    for place, member in enumerate(found.members):
        assert torch.equal(torch.tensor(member(**texts())), alone(tmp_path / f"member_{place}"))


def test_what_cannot_be_an_ensemble_is_refused(tmp_path, base, ensemble):
    folder, _ = ensemble
    with pytest.raises(ValueError, match="num_members.*1.*two or more"):
        train(tmp_path, base, num_members=1)
    with pytest.raises(ValueError, match="push_to_hub"):
        train(tmp_path, base, push_to_hub=True)
    stream = Dataset.from_list(ROWS).to_iterable_dataset()
    with pytest.raises(ValueError, match="stream.*resampled"):
        train_reward_ensemble(str(base), config(tmp_path), stream, tiny_tokenizer())
    with pytest.raises(ValueError, match="no ensemble.json"):
        load_reward_ensemble(tmp_path)
    copy = tmp_path / "odd"
    shutil.copytree(folder, copy)
    file = copy / "member_2" / "adapter_config.json"
    file.write_text(file.read_text().replace(str(base), "elsewhere"))
    with pytest.raises(ValueError, match="member_2.*another base.*elsewhere"):
        load_reward_ensemble(copy)
    shutil.rmtree(copy / "member_2")
    with pytest.raises(ValueError, match="member_2.*not there"):
        load_reward_ensemble(copy)
    assert score_normalization(torch.tensor([1.2, -0.3, 0.5, 2.0])) == pytest.approx((1.1764705882352942, -1.0))


def test_members_keep_their_language_model_half(tmp_path, base):
    train(tmp_path, base, num_members=2, peft_config=lora(), lm_coef=0.5)
    halves = [AutoPeftModelForCausalLM.from_pretrained(tmp_path / f"member_{i}" / "lm") for i in range(2)]
    ids = torch.tensor([[5, 6, 7]])
    one, other = (half(input_ids=ids).logits for half in halves)
    assert not torch.allclose(one, other)
    scores = load_reward_ensemble(tmp_path).mean(**texts())
    assert len(scores) == 3 and len(set(scores)) == 3
