# /// script
# dependencies = ["rlhf-ext"]
# ///

"""
What a reward model knows, or what a policy does.

A reward model (full, adapter or ensemble) on labelled answers, in our rows, TRL's pairs or RewardBench's columns:

```bash
accelerate launch --config_file accelerate_configs/cpu.yaml recipes/evaluate.py --config recipes/evaluate_tiny.yaml \
    --reward_model_path runs/reward --dataset_name PAIRS.jsonl --output_dir runs/evaluate_reward
```

A policy (full or adapter) on prompts, against a baseline:

```bash
accelerate launch --config_file accelerate_configs/cpu.yaml recipes/evaluate.py --config recipes/evaluate_tiny.yaml \
    --policy_model_path runs/ppo --baseline_model_path runs/sft --reference_model_path runs/sft \
    --reward_model_path runs/reward --dataset_name PROMPTS.jsonl --output_dir runs/evaluate_policy
```

Both leave `evaluation.json`, `evaluation.md` and `report.html`. The measures stand in docs/measures.md.
"""

import sys
from pathlib import Path


# A script's own folder comes first on the path, where this file would hide the library of the same name.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from accelerate import PartialState  # noqa: E402
from trl import TrlParser  # noqa: E402

from rlhf_ext.data.arguments import import_function  # noqa: E402
from rlhf_ext.data.evaluation_arguments import EvaluationArguments  # noqa: E402
from rlhf_ext.pipelines.evaluation import run_evaluation  # noqa: E402


def main(args: EvaluationArguments) -> None:
    functions = {name: import_function(name) for name in args.reward_funcs or []}
    if PartialState().is_main_process:  # one process does it all; others of a launch have nothing to do
        run_evaluation(args, functions)
        print((Path(args.output_dir) / "evaluation.md").read_text(encoding="utf-8"), flush=True)


if __name__ == "__main__":
    (arguments,) = TrlParser((EvaluationArguments,)).parse_args_and_config()
    main(arguments)
