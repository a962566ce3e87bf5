"""The `rlhf-ext` command: a shell over `pipelines/` and `models/`."""

import argparse
import os
import sys


def build_parser() -> argparse.ArgumentParser:
    """The command line; frozen by a test, since people script against it."""
    parser = argparse.ArgumentParser(prog="rlhf-ext", description="Classic RLHF on top of TRL.")
    commands = parser.add_subparsers(dest="command", required=True)
    quickstart = commands.add_parser(
        "quickstart",
        help="classic RLHF on an offline toy world, in minutes",
        description="SFT, preference labels, a reward model and PPO on a toy world whose true reward is known.",
    )
    quickstart.add_argument("--output_dir", default="quickstart", help="folder of the run (default: %(default)s)")
    quickstart.add_argument("--seed", type=int, default=0, help="seed of data, models and sampling (default: 0)")
    quickstart.add_argument("--num_updates", type=int, help="PPO updates; a small number only checks the set-up")
    quickstart.add_argument("--label_error_rate", type=float, help="share of labels drawn at random (default: 0)")
    merge = commands.add_parser(
        "merge",
        help="one model out of a base and its adapters",
        description="Write a base plus LoRA adapters as one model. Folders or ids on the Hub.",
    )
    merge.add_argument(
        "--adapter",
        action="append",
        required=True,
        help="LoRA adapter of a policy; once more for one that was trained on top of the one before it",
    )
    merge.add_argument("--output_dir", required=True, help="new folder for the model and its tokenizer")
    merge.add_argument("--base", help="base model (default: the one that the first adapter names)")
    merge.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="dtype that is written (default: the base's); the sum is taken in float32",
    )
    merge.add_argument(
        "--dequantize",
        action="store_true",
        help="merge a quantised base as the full weights it computes with",
    )
    env = commands.add_parser(
        "env",
        help="versions, devices, and whether a PPO run fits the card",
        description="Print the stack; with --config, plan the memory of a PPO run and end with 1 if it does not fit.",
    )
    env.add_argument("--config", help="YAML of recipes/ppo.py")
    env.add_argument("--model_config", help="config.json or its folder, instead of the model that the YAML names")
    env.add_argument("--card_gb", type=float, help="GiB of one device (default: the card here, or the YAML's)")
    env.add_argument("--num_processes", type=int, default=1, help="number of processes (default: 1)")
    env.add_argument(
        "--sharding",
        default="none",
        choices=["none", "ddp", "zero2", "zero3", "fsdp2"],
        help="how the processes share what they hold (default: none)",
    )
    label = commands.add_parser(
        "label",
        help="the page on which people compare answers",
        description="Serve the labelling page over a label store. Other addresses than this machine's need --users.",
    )
    label.add_argument("--store", required=True, help="file or URL of the label store (docs/labels.md)")
    label.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    label.add_argument("--port", type=int, default=7860, help="port; 0 takes a free one (default: %(default)s)")
    label.add_argument("--pool", help="label this pool only (default: all)")
    label.add_argument("--guidelines", help="text file that annotators are shown")
    label.add_argument("--users", help="file of accounts, made by label-user")
    label.add_argument("--hostname", help="name by which a proxy in front calls the page")
    label.add_argument("--https", action="store_true", help="a proxy in front speaks HTTPS")
    user = commands.add_parser(
        "label-user",
        help="add an annotator's account, or change its password",
        description="Ask for a password and store its hash in a file that only its owner can read.",
    )
    user.add_argument("--users", required=True, help="file of accounts")
    user.add_argument("--name", required=True, help="the annotator's name")
    commands.add_parser(
        "iterate",
        help="rounds of labels, reward model and PPO",
        description="The loop; takes the flags of recipes/iterate.py, --config among them. --help lists them.",
        add_help=False,  # theirs is printed
    )
    report = commands.add_parser(
        "report",
        help="one HTML page over all rounds of a run of the loop",
        description="Write one self-contained HTML page over the rounds of a run, finished or not.",
    )
    report.add_argument("run", help="folder of the run")
    report.add_argument("--output", help="HTML file (default: report.html in the folder of the run)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if args.command == "iterate":
        args.flags = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    commands = {"quickstart": _quickstart, "merge": _merge, "env": _env, "label": _label, "label-user": _label_user}
    commands |= {"iterate": _iterate, "report": _report}
    return commands[args.command](args)


def _label(args: argparse.Namespace) -> int:
    from .feedback.page.server import serve

    options = {name: value for name, value in vars(args).items() if name not in ("command", "store")}
    try:
        serve(args.store, **options)
    except (ValueError, OSError) as error:
        print(f"rlhf-ext label: {error}", file=sys.stderr)
        return 1
    return 0


def _label_user(args: argparse.Namespace) -> int:
    from .feedback.page.server import set_user

    try:
        set_user(args.users, args.name)
    except (ValueError, OSError) as error:
        print(f"rlhf-ext label-user: {error}", file=sys.stderr)
        return 1
    return 0


def _iterate(args: argparse.Namespace) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from .data.config_file import with_config

    try:
        flags = with_config(args.flags)  # before imports that take seconds
        from trl import ModelConfig

        from .data.loop_arguments import LoopArguments
        from .data.strict_parser import StrictParser

        parsed = StrictParser((LoopArguments, ModelConfig), prog="rlhf-ext iterate").parse_args_and_config(flags)
    except (ValueError, OSError) as error:
        print(f"rlhf-ext iterate: {error}", file=sys.stderr)
        return 1
    from .pipelines.loop import run_loop
    from .pipelines.loop_labels import LabelsMissing

    try:
        run_loop(*parsed)
    except LabelsMissing as missing:
        print(f"rlhf-ext iterate: {missing}", file=sys.stderr)
        return 3
    except (ValueError, OSError) as error:
        print(f"rlhf-ext iterate: {error}", file=sys.stderr)
        return 1
    return 0


def _report(args: argparse.Namespace) -> int:
    from .pipelines.loop_report import write_loop_report

    try:
        print(write_loop_report(args.run, args.output))
    except (ValueError, OSError) as error:
        print(f"rlhf-ext report: {error}", file=sys.stderr)
        return 1
    return 0


def _env(args: argparse.Namespace) -> int:
    from .pipelines.environment import run_environment

    try:
        run_environment(args.config, args.model_config, args.card_gb, args.num_processes, args.sharding)
    except (ValueError, OSError) as error:
        print(f"rlhf-ext env: {error}", file=sys.stderr)
        return 1
    return 0


def _quickstart(args: argparse.Namespace) -> int:
    if args.num_updates is not None and args.num_updates < 1:
        raise SystemExit(f"rlhf-ext: --num_updates is {args.num_updates}; give 1 or more")
    # Nothing here needs the Hub, and TRL would report its use from a trainer's constructor.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Read when torch loads. Threads that spin long while they wait cost a factor of four as soon as a core is shared;
    # threads that sleep at once, a third of the speed on quiet ones.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from .pipelines.quickstart import quick, run_quickstart

    settings = quick(num_updates=args.num_updates, label_error_rate=args.label_error_rate)
    run_quickstart(args.output_dir, args.seed, settings)
    return 0


def _merge(args: argparse.Namespace) -> int:
    from .models.merge import merge_adapters

    try:
        merge_adapters(args.adapter, args.output_dir, base=args.base, dtype=args.dtype, dequantize=args.dequantize)
    except ValueError as error:
        raise SystemExit(f"rlhf-ext: {error}") from error
    print(f"{args.output_dir}: base + {' + '.join(args.adapter)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
