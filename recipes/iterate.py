# /// script
# dependencies = ["rlhf-ext"]
# ///

"""
The loop: sample, select, label, fit the reward model, PPO, measure, and again.

On the toy world, which needs nothing, with simulated labels:

```bash
accelerate launch --config_file accelerate_configs/cpu.yaml recipes/iterate.py --config recipes/iterate_tiny.yaml \
    --output_dir runs/loop
```

On your own SFT policy and prompts, with labels of people: `--model_name_or_path SFT --dataset_name PROMPTS.jsonl
--labels people`, and `rlhf-ext label --store runs/loop/labels.db` beside it. Killed anywhere, it goes on from the last
finished step when called again. With
`--launch_config accelerate_configs/multi_gpu.yaml` training runs on several GPUs.
`rlhf-ext iterate` takes the same flags; `rlhf-ext report runs/loop` writes one page about all rounds.
"""

import sys
from pathlib import Path


# A script's own folder is searched first, and there `import evaluate` would find this folder's recipe.
sys.path.sort(key=lambda folder: Path(folder).resolve() == Path(__file__).resolve().parent)

from trl import ModelConfig

from rlhf_ext.data.loop_arguments import LoopArguments
from rlhf_ext.data.strict_parser import StrictParser
from rlhf_ext.pipelines.loop import run_loop


if __name__ == "__main__":
    run_loop(*StrictParser((LoopArguments, ModelConfig)).parse_args_and_config())
