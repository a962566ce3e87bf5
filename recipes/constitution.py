# /// script
# dependencies = ["rlhf-ext"]
# ///

"""
Constitutional AI whole (Bai et al. 2022): harmlessness from a list of principles, without labels of people for it.

The helpful policy answers red-team prompts, a model criticises and revises the answers under drawn principles, and the
policy is fine-tuned on the revisions. A judge compares two answers of the result under drawn principles, in both
orders; a reward model learns its soft labels beside people's helpfulness pairs, and PPO follows. On the toy world,
which builds its own models and data:

```bash
accelerate launch --config_file accelerate_configs/cpu.yaml \
    recipes/constitution.py --config recipes/constitution_tiny.yaml --output_dir runs/constitution
```

With a model of your own `--model_name_or_path MODEL --red_team_prompts PROMPTS.jsonl --test_prompts TEST.jsonl
--helpful_rows ROWS.jsonl --helpful_pairs PAIRS.jsonl`, in a YAML without `toy`. Each finished step has a folder; the
same line goes on where a run stopped. `sft`, `reward` and `ppo` hold arguments of the trainers; any flag of
`trl.ModelConfig` goes on the line or into the YAML. Written: the models, all texts, `report.html`; see
docs/constitution.md.
"""

import sys
from pathlib import Path


# A script's own folder is searched first, and there `import evaluate` would find a recipe instead of the package.
sys.path.sort(key=lambda folder: Path(folder).resolve() == Path(__file__).resolve().parent)

from trl import ModelConfig

from rlhf_ext.data.constitution_arguments import ConstitutionArguments
from rlhf_ext.data.strict_parser import StrictParser
from rlhf_ext.pipelines.constitution import run_constitution


def main(script_args: ConstitutionArguments, model_args: ModelConfig) -> None:
    found = run_constitution(script_args, model_args)
    for name, metrics in found["evaluation"]["policies"].items():
        scores = {key: round(value, 3) for key, value in metrics.items() if key.startswith("score/")}
        print(name, {key: value for key, value in scores.items() if not key.endswith("_se")}, flush=True)
    print(f"Models, texts and report.html are in {script_args.output_dir}", flush=True)


if __name__ == "__main__":
    main(*StrictParser((ConstitutionArguments, ModelConfig)).parse_args_and_config())
