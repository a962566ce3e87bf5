# /// script
# dependencies = ["rlhf-ext"]
# ///

"""
Measures a reward model on preferences, or a policy on prompts; no training.

A reward model may be the folder of an ensemble: its mean is the score, and its members and their spread are reported.
With the `--eval_fraction` of training only the prompts that it held out are read.
Preferences are rows of `recipes/reward.py` or RewardBench's columns; a column `source`, `subset` or `category` gives
one line each, and a table of helpful, honest, harmless. On a CPU, with tiny models of your own:

```bash
accelerate launch --config_file accelerate_configs/cpu.yaml recipes/evaluate.py --config recipes/evaluate_tiny.yaml \
    --reward_model_path REWARD_MODEL --dataset_name ROWS.jsonl --output_dir runs/evaluate
```

A policy is sampled on rows with a `prompt`, scored by reward models and Python functions, and compared with a baseline
by these scores and, with `--judge_model_path`, by a model that is asked in both orders:

```bash
accelerate launch --config_file accelerate_configs/cpu.yaml recipes/evaluate.py --config recipes/evaluate_tiny.yaml \
    --policy_model_path POLICY --baseline_model_path SFT --reference_model_path SFT --reward_model_path REWARD_MODEL \
    --dataset_name PROMPTS.jsonl --output_dir runs/evaluate_policy
```

Several policies, such as checkpoints, give the frontier of score against KL. `--embedding_model_path` and
`--nli_model_path` add the diversity of meaning. Written: `evaluation.json`, `evaluation.md`, `report.html`.
"""

import dataclasses
import sys
from pathlib import Path


# A script's own folder is searched first, and there `import evaluate` would find this file instead of the package.
sys.path.sort(key=lambda folder: Path(folder).resolve() == Path(__file__).resolve().parent)

import torch
from accelerate import PartialState
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase

from rlhf_ext.data.evaluation_arguments import EvaluationArguments, load_evaluation_rows
from rlhf_ext.data.evaluation_rows import parse_source_map, unique_prompts
from rlhf_ext.data.strict_parser import StrictParser
from rlhf_ext.models.base_quantization import QUANTIZATION_FILE, as_loading_option, read_base_quantization
from rlhf_ext.models.build import load_policy
from rlhf_ext.models.hub import check_model_name, find_file
from rlhf_ext.models.nli import load_nli
from rlhf_ext.models.sentence_encoder import load_encoder
from rlhf_ext.pipelines.evaluation import evaluate_reward_model, load_reward_or_ensemble
from rlhf_ext.pipelines.evaluation_checks import (
    check_judge,
    check_judge_answers,
    check_output,
    check_policies,
    check_preferences,
    check_readers,
    check_reward_files,
)
from rlhf_ext.pipelines.evaluation_policy import (
    PolicySettings,
    Reference,
    build_judge,
    evaluate_policy,
    wins_by_judge,
    wins_by_score,
)
from rlhf_ext.pipelines.evaluation_report import write_policy_report, write_reward_report
from rlhf_ext.pipelines.evaluation_scorers import function_scorer, load_scorer


def judge_preferences(args: EvaluationArguments, device: torch.device) -> str:
    """Reward models on preference rows; returns the Markdown."""
    dataset, paths = load_evaluation_rows(args), names_of(args.reward_model_path)
    check_preferences(paths, dataset, args)
    results = []
    for name, path in paths.items():
        load = {"device": device, "trust_remote_code": args.trust_remote_code}
        result = evaluate_reward_model(
            load_reward_or_ensemble(path, name, batch_size=args.batch_size, **load),
            dataset,
            source_column=args.source_column,
            source_map=parse_source_map(args.source_map),
            as_messages=args.as_messages,
            max_length=args.max_length,
            num_bins=args.num_bins,
            progress=name,
        )
        results.append(result)
    return write_reward_report(args.output_dir, results, dataclasses.asdict(args))


def judge_policies(args: EvaluationArguments, device: torch.device) -> str:
    """Policies on prompts; returns the Markdown."""
    dataset = unique_prompts(load_evaluation_rows(args))
    paths = names_of(args.policy_model_path)
    if args.baseline_model_path:  # it may be one of the policies
        paths |= {f"baseline {name}": path for name, path in names_of([args.baseline_model_path]).items()}
    # Whatever can fail does so before the first answer.
    tokenizers = {name: load_tokenizer(path, args) for name, path in paths.items()}
    rewards = names_of(args.reward_model_path)
    for path in rewards.values():
        check_reward_files(path, args.trust_remote_code)
    check_policies(paths, tokenizers, dataset, args.max_completion_length, args.trust_remote_code)
    columns = {name: dataset[name][:] for name in dataset.column_names if name != "prompt"}
    load = {"device": device, "dtype": "auto", "trust_remote_code": args.trust_remote_code}
    load["batch_size"] = args.batch_size
    scorers = [load_scorer(path, name, **load) for name, path in rewards.items()]
    scorers += [function_scorer(name, list(columns)) for name in args.reward_funcs or []]
    reference = judge = encoder = nli = None
    if args.reference_model_path:
        path = args.reference_model_path
        reference = Reference(load_language_model(path, args, device), load_tokenizer(path, args))
    prompts, knows_room = dataset["prompt"][:], True
    taken = ["judge"] if args.judge_model_path else []
    check_readers(scorers, reference, tokenizers, prompts, args.max_completion_length, taken)
    if args.judge_model_path:
        judge = build_judge(
            load_language_model(args.judge_model_path, args, device),
            load_tokenizer(args.judge_model_path, args),
            question=args.judge_question,
            template=Path(args.judge_template).read_text(encoding="utf-8") if args.judge_template else None,
            labels=args.judge_labels,
            batch_size=args.batch_size,
        )
        knows_room = check_judge(judge, tokenizers, prompts, args.max_completion_length)
    if args.embedding_model_path:
        encoder = load_encoder(args.embedding_model_path, device=device)
    if args.nli_model_path:
        nli = load_nli(args.nli_model_path, device=device, trust_remote_code=args.trust_remote_code)
    names = ("num_samples", "max_completion_length", "temperature", "batch_size", "seed", "insult_words")
    settings = PolicySettings(**{name: getattr(args, name) for name in names}, encoder=encoder, nli=nli)

    found = []
    for name, path in paths.items():
        model, tokenizer = load_language_model(path, args, device), tokenizers[name]
        evaluation = evaluate_policy(
            name,
            model,
            tokenizer,
            prompts,
            scorers,
            settings,
            reference=reference,
            columns=columns,
            progress=True,
        )
        found.append(evaluation)
        del model  # one policy at a time
        if not knows_room and len(found) == 1:
            check_judge_answers(judge, evaluation)
    policies, baseline = (found[:-1], found[-1]) if args.baseline_model_path else (found, None)
    wins = {policy.name: wins_by_score(policy, baseline) for policy in policies} if baseline else {}
    if judge is not None:
        for policy in policies:
            wins[policy.name]["judge"] = wins_by_judge(judge, policy, baseline, progress=f"{policy.name}: judge")
    return write_policy_report(args.output_dir, policies, baseline, wins, dataclasses.asdict(args), args.num_shown)


def load_tokenizer(path: str, args: EvaluationArguments) -> PreTrainedTokenizerBase:
    """The tokenizer saved with a model."""
    check_model_name(path, "model path")
    return AutoTokenizer.from_pretrained(path, trust_remote_code=args.trust_remote_code)


def load_language_model(path: str, args: EvaluationArguments, device: torch.device) -> torch.nn.Module:
    """A causal language model, full or an adapter; an adapter's base is quantised as it was in training."""
    options = as_loading_option(read_base_quantization(find_file(path, QUANTIZATION_FILE)))
    if args.load_in_4bit and not options:
        options = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")}
    model = load_policy(path, dtype=args.dtype, trust_remote_code=args.trust_remote_code, **options)
    model = model.requires_grad_(False).eval()
    return model if model.device == device else model.to(device)


def names_of(paths: list[str] | None) -> dict[str, str]:
    """Short names of paths: their last part, or all of it where that stands for two."""
    paths = paths or []
    if doubles := sorted({path for path in paths if paths.count(path) > 1}):
        raise ValueError(f"{doubles} stand twice in one list of models. Name each once.")
    short = [Path(path).name for path in paths]
    return {name if short.count(name) == 1 else path: path for name, path in zip(short, paths, strict=True)}


def main(args: EvaluationArguments) -> None:
    state = PartialState(cpu=args.use_cpu)
    if state.num_processes > 1:
        raise ValueError(
            f"{state.num_processes} processes were started; the evaluation runs in one (--num_processes 1)."
        )
    check_output(args.output_dir)
    judge = judge_policies if args.policy_model_path else judge_preferences
    print(judge(args, state.device), flush=True)
    print(f"Written to {args.output_dir}: evaluation.json, evaluation.md, report.html", flush=True)


if __name__ == "__main__":
    main(*StrictParser((EvaluationArguments,)).parse_args_and_config())
