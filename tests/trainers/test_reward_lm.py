"""`lm_coef`: the language-modelling term of Askell et al. 2021 against plain logits, and what is saved of it."""

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from rlhf_ext.functional import token_logps
from rlhf_ext.functional.candidates import preferred_lm_loss, preferred_tokens
from rlhf_ext.models.hub import local_folder
from rlhf_ext.models.lm_head import keep_lm_head
from rlhf_ext.models.scoring import classifier_of, load_reward_model
from rlhf_ext.trainers.reward_config import PreferenceRewardConfig
from rlhf_ext.trainers.reward_trainer import PreferenceRewardTrainer
from tests.tiny import tiny_causal_lm, tiny_reward_model, tiny_tokenizer


ROWS = [
    {"prompt": "w1 ", "completions": ["good", "bad w2", "w4"], "target": [0.0, 1.0, 0.0], "ranking": None},
    {"prompt": "w2 w3 ", "completions": ["bad", "good w7 w8"], "target": [0.5, 0.5], "ranking": None},
    {"prompt": "w4 ", "completions": ["w5 w6 w7", "w9"], "target": [0.75, 0.25], "ranking": None},
    {"prompt": "w9 ", "completions": ["w1", "w2 w2", "w3 w3 w3"], "target": None, "ranking": [2, 0, 1]},
]
PREFERRED = [(0, 1), (3, 2)]
"""Row and candidate of each preferred completion of `ROWS`; ties and votes have none."""

OPTIONS = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "max_steps": 2,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "lm_coef": 0.5,
}


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    """Folders of causal language models by kind; the embeddings of Llama are not tied, the others are."""
    root, tokenizer = tmp_path_factory.mktemp("sft"), tiny_tokenizer()
    for kind in ("llama", "gpt2", "gemma3"):
        tiny_causal_lm(kind, tokenizer).save_pretrained(root / kind)
        tokenizer.save_pretrained(root / kind)
    return root


def build(folder, model, rows=ROWS, peft_config=None, quantization_config=None, streams=False, **kwargs):
    dataset = Dataset.from_list(rows)
    return PreferenceRewardTrainer(
        model=model if not hasattr(model, "joinpath") else str(model),
        args=PreferenceRewardConfig(str(folder), **{**OPTIONS, **kwargs}),
        train_dataset=dataset.to_iterable_dataset() if streams else dataset,
        processing_class=tiny_tokenizer(),
        quantization_config=quantization_config,
        peft_config=peft_config,
    )


def plain_nll(causal, row, candidate):
    """Sum over the completion's tokens of -log p, from a forward without padding, and their number."""
    ids = torch.tensor([row["candidate_ids"][candidate]])
    logps = causal(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    start = max(row["completion_starts"][candidate], 1)
    picked = logps.gather(-1, ids[0, 1:, None])[start - 1 :, 0]
    return -picked.sum(), len(picked)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_loss_and_gradient_equal_plain_logits(tmp_path, sft, kind, reduction):
    trainer = build(tmp_path, sft / kind, lm_reduction=reduction, preference_coef=2.0)
    data = trainer.train_dataset
    batch = trainer.data_collator(list(data))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()

    trainer.args.lm_coef = 0.0
    preference = trainer.compute_loss(trainer.model, batch)
    causal = AutoModelForCausalLM.from_pretrained(sft / kind)
    # The same trunk under the stock head: its gradients fall on the classifier's own parameters.
    setattr(causal, causal.base_model_prefix, trainer.model.base_model)
    if getattr(trainer.model, "lm_head", None) is not None:
        causal.lm_head = trainer.model.lm_head
    else:
        causal.lm_head.weight = trainer.model.get_input_embeddings().weight
    terms = [plain_nll(causal, data[row], candidate) for row, candidate in PREFERRED]
    term = sum(nll / (n if reduction == "mean" else 1) for nll, n in terms) / len(ROWS)
    expected = preference + 0.5 * term
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    expected.backward()
    assert any("lm_head" in name or "embed" in name or "wte" in name for name in gradients)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert trainer._metrics["eval"]["lm_loss"] == [pytest.approx(term.item(), rel=1e-6)]
    mean = sum(nll for nll, _ in terms) / sum(n for _, n in terms)
    assert trainer._metrics["eval"]["nll"] == [pytest.approx(mean.item(), rel=1e-6)]


def test_micro_batches_add_up(tmp_path, sft):
    trainer = build(tmp_path, sft / "llama")
    data = list(trainer.train_dataset)
    whole = trainer.compute_loss(trainer.model, trainer.data_collator(data))
    parts = [trainer.compute_loss(trainer.model, trainer.data_collator(data[i : i + 2])) for i in (0, 2)]
    assert whole.item() == pytest.approx(sum(part.item() for part in parts) / 2, rel=1e-6)
    # A batch of ties: a differentiable zero that touches the head, so that DDP does not wait for it
    tie = trainer.data_collator(data[1:2])
    trainer.compute_loss(trainer.model, tie).backward()
    assert trainer.model.lm_head.weight.grad is not None
    assert len(trainer._metrics["eval"]["nll"]) == len(trainer._metrics["eval"]["lm_loss"]) - 1


def test_the_first_token_of_a_text_is_not_predicted():
    targets, rankings = torch.tensor([[1.0, 0.0]]), torch.full((1, 2), -1)
    completions = torch.tensor([[True, True, False], [True, True, True]])
    mask = preferred_tokens(targets, rankings, torch.ones(1, 2, dtype=torch.bool), completions)
    assert mask.tolist() == [[False, True, False], [False, False, False]]
    logps = torch.tensor([[torch.nan, -2.0, torch.nan], [torch.nan] * 3])
    assert preferred_lm_loss(logps, mask, num_rows=2, reduction="sum")[0].item() == 1.0


class _Widest(TorchDispatchMode):
    """Remembers the largest float tensor with a given last dimension that an operation gives."""

    def __init__(self, width):
        super().__init__()
        self.width, self.rows = width, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.dim() >= 2:
                if tensor.shape[-1] == self.width:
                    self.rows = max(self.rows, tensor.numel() // self.width)
        return out


def test_logits_are_never_whole(tmp_path, sft, monkeypatch):
    monkeypatch.setattr(token_logps, "TILE", 4 * len(tiny_tokenizer()))
    tiles, tokens = token_logps._tiles, []
    monkeypatch.setattr(token_logps, "_tiles", lambda rows, head: tokens.append(len(rows)) or tiles(rows, head))
    trainer = build(tmp_path, sft / "llama")
    batch = trainer.data_collator(list(trainer.train_dataset) * 4)
    with _Widest(len(tiny_tokenizer())) as widest:
        trainer.compute_loss(trainer.model, batch).backward()
    hidden = trainer.model.config.hidden_size  # the head itself, transposed, has as many rows
    assert min(tokens) > hidden == widest.rows


def test_likelihood_of_preferred_completions_holds(tmp_path, sft):
    """Plain training lets it fall; with the term it rises, and the pairs are learnt all the same."""
    rows = [{"prompt": f"w{i} ", "chosen": f"good w{i} w{i + 1}", "rejected": f"bad w{i} w{i + 1}"} for i in range(8)]
    nll, accuracy = {}, {}
    for coef in (0.0, 1.0):
        reduction = "mean" if coef else "sum"
        options = {"max_steps": 40, "per_device_train_batch_size": 8, "save_strategy": "no"}
        trainer = build(tmp_path, sft / "llama", rows, lm_coef=coef, lm_reduction=reduction, **options)
        trainer.train()
        keep_lm_head(trainer.model, AutoModelForCausalLM.from_pretrained(sft / "llama").lm_head.state_dict())
        trainer.args.lm_coef, trainer.args.lm_reduction = 1.0, "mean"
        batch = trainer.data_collator(list(trainer.train_dataset))
        trainer._metrics["train"].clear()
        trainer.compute_loss(trainer.model, batch)
        nll[coef], accuracy[coef] = trainer._metrics["train"]["nll"][0], trainer._metrics["train"]["accuracy"][0]
    assert accuracy == {0.0: 1.0, 1.0: 1.0}
    assert nll[1.0] < 1.5 < 3.0 < nll[0.0]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_one_folder_loads_as_classifier_and_as_language_model(tmp_path, sft, kind, caplog):
    trainer = build(tmp_path, sft / kind)
    trainer.train()
    trainer.save_model()
    ids = torch.tensor([[5, 6, 7, 1]])
    scored = trainer.model.eval()(input_ids=ids, lm_mask=torch.ones_like(ids, dtype=torch.bool))
    assert torch.equal(load_reward_model(str(tmp_path))(input_ids=ids).logits, scored.logits)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    stock.config.pad_token_id = 0
    assert torch.equal(stock(input_ids=ids).logits, scored.logits)
    causal, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    logps = causal(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(logps, scored.lm_logps[0, 1:])
    before = AutoModelForCausalLM.from_pretrained(sft / kind)
    assert not torch.equal(causal.lm_head.weight, before.lm_head.weight)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_an_adapter_loads_as_a_causal_language_model(tmp_path, sft, kind, recwarn):
    trainer = build(tmp_path, sft / kind, peft_config=LoraConfig(r=4, target_modules="all-linear"))
    base = AutoModelForCausalLM.from_pretrained(sft / kind)
    trainer.train()
    assert not any("lm_head" in name for name, p in trainer.model.named_parameters() if p.requires_grad)
    trainer.save_model()
    ids = torch.tensor([[5, 6, 7, 1]])
    scored = trainer.model.eval()(input_ids=ids, lm_mask=torch.ones_like(ids, dtype=torch.bool))
    assert torch.equal(load_reward_model(str(tmp_path))(input_ids=ids).logits, scored.logits)
    assert not [key for key in load_file(tmp_path / "lm" / "adapter_model.safetensors") if "score" in key]
    half = AutoPeftModelForCausalLM.from_pretrained(local_folder(tmp_path, "lm")).eval()
    assert not [w for w in recwarn if "missing" in str(w.message).lower()]
    logps = half(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(logps, scored.lm_logps[0, 1:])
    assert not torch.allclose(half(input_ids=ids).logits, base(input_ids=ids).logits)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "0.5 x negative log-likelihood of preferred completions, sum over tokens" in card
    assert 'AutoPeftModelForCausalLM.from_pretrained(rlhf_ext.models.hub.local_folder(repo, "lm"))' in card


def test_checkpointing_changes_nothing_on_a_quantised_base(tmp_path, sft):
    """NF4 with LoRA; the kept head stays in the dtype of the trunk and is not quantised."""
    batches, gradients = [], []
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    for checkpointing in (False, True):
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        torch.manual_seed(0)
        trainer = build(
            tmp_path, sft / "llama", peft_config=config, gradient_checkpointing=checkpointing, quantization_config=nf4
        )
        base = classifier_of(trainer.model)
        assert base.lm_head.weight.dtype == torch.float32 and not base.lm_head.weight.requires_grad
        trainer.model.train()
        batches.append(trainer.data_collator(list(trainer.train_dataset)))
        trainer.compute_loss(trainer.model, batches[-1]).backward()
        gradients.append({n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-6)


def test_streams_and_messages_train_with_the_term(tmp_path, sft):
    pairs = [
        {
            "prompt": [{"role": "user", "content": f"w{i}"}],
            "chosen": [{"role": "assistant", "content": "good w1"}],
            "rejected": [{"role": "assistant", "content": "bad"}],
        }
        for i in range(8)
    ]
    logs = []
    for streams in (False, True):
        # All rows in one batch, so that their order does not matter
        options = {"learning_rate": 0.0, "per_device_train_batch_size": 8, "max_steps": 1}
        trainer = build(tmp_path, sft / "llama", pairs, streams=streams, **options)
        trainer.train()
        logs.append([entry["nll"] for entry in trainer.state.log_history if "nll" in entry])
    assert len(logs[0]) == len(logs[1]) == 1 and logs[0][0] == pytest.approx(logs[1][0], rel=1e-5)


@pytest.mark.parametrize("messages", [False, True])
@pytest.mark.parametrize("path", ["pairs", "stream", "truncated"])
def test_a_prompt_that_pairs_share_is_no_completion(tmp_path, sft, messages, path):
    """Pairs in TRL's implicit form: the term reads what it reads where the prompt has a column of its own."""
    apart = [{"prompt": f"w1 w{i} ", "chosen": "good w1", "rejected": "bad"} for i in range(4)]
    whole = [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in apart]
    if messages:
        turns = [("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")]
        apart = [{name: [{"role": role, "content": row[name]}] for name, role in turns} for row in apart]
        whole = [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in apart]
    found = []
    for rows in (apart, whole):
        rows = [{**row, "truncated": [False, False]} for row in rows] if path == "truncated" else rows
        options = {"learning_rate": 0.0, "per_device_train_batch_size": 4, "max_steps": 1}
        trainer = build(tmp_path, sft / "llama", rows, streams=path == "stream", **options)
        trainer.train()
        starts = [list(row["completion_starts"]) for row in trainer.train_dataset]
        found.append((starts, next(entry["lm_loss"] for entry in trainer.state.log_history if "lm_loss" in entry)))
        assert trainer.preference_reports["train"].num_prompt_mismatches == 0
    assert found[0][0] == found[1][0] and min(map(min, found[0][0])) > 0
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)


def test_what_cannot_work_is_refused(tmp_path, sft):
    with pytest.raises(ValueError, match="lm_coef.*no language-modelling head"):
        build(tmp_path, tiny_reward_model("llama", tiny_tokenizer()))
    with pytest.raises(ValueError, match="lm_coef.*no row.*preferred completion"):
        build(tmp_path, sft / "llama", ROWS[1:3])
    with pytest.raises(ValueError, match="lm_coef.*token ids alone"):
        build(tmp_path, sft / "llama", [{"chosen_ids": [5, 6, 1], "rejected_ids": [5, 7, 1]}])
    model = tiny_reward_model("llama", tiny_tokenizer())
    with pytest.raises(ValueError, match=r"lm_head.*\(3, 16\).*\(39, 16\)"):
        keep_lm_head(model, {"weight": torch.zeros(3, 16)})
    keep_lm_head(model, tiny_causal_lm("llama", tiny_tokenizer()).lm_head.state_dict())
    assert build(tmp_path, model).model.lm_head.weight.requires_grad
