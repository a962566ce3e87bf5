"""The loop on the toy world: an SFT policy that makes mistakes, and prompts; gold labels."""

from pathlib import Path

from trl import ModelConfig

from ..data.loop_arguments import LoopArguments
from ..toyworld.corpus import prompt_rows
from ..toyworld.tiny import build_tokenizer
from .finished_runs import run_once
from .loop_run import write_jsonl
from .quickstart import quick, train_sft


PROMPTS, TEST_PROMPTS = 8_192, 512


def prepare_toy(args: LoopArguments, model_args: ModelConfig) -> None:
    """
    Train the SFT policy and write the prompts under `output_dir`/toy, once, and name them in the arguments.

    Raises:
        ValueError: a model or prompts were named too.
    """
    named = {"model_name_or_path": model_args.model_name_or_path, "dataset_name": args.dataset_name}
    folder = Path(args.output_dir) / "toy"
    ours = {"model_name_or_path": str(folder / "sft"), "dataset_name": str(folder / "prompts.jsonl")}
    if odd := {name: value for name, value in named.items() if value and value != ours[name]}:
        raise ValueError(f"`toy` brings its own model and prompts, but {odd} were given. Leave them out.")

    def prepare(aside: Path) -> dict:
        train_sft(str(aside), build_tokenizer(), quick(), args.seed)
        write_jsonl(aside / "prompts.jsonl", prompt_rows(PROMPTS, args.seed, split="labels"))
        write_jsonl(aside / "test.jsonl", prompt_rows(TEST_PROMPTS, args.seed, split="test"))
        return {}

    run_once(folder, {"toy": True, "seed": args.seed}, prepare)
    model_args.model_name_or_path = ours["model_name_or_path"]
    args.dataset_name, args.eval_dataset_name = ours["dataset_name"], str(folder / "test.jsonl")
