"""Splits of real preferences for the run on Gemma 3 270M: by prompt hash, one split for every file.

    python benchmarks/real_data.py --data ../shared/data --tokenizer MODEL --output_dir runs/real

writes `train.jsonl`, `train_shuffled.jsonl` (the control: labels permuted within each row), `test.jsonl` and
`prompts.jsonl` (red-team prompts whose rows are not in the test split), `groups_train.jsonl` and `groups_test.jsonl`
(K answers of one prompt, one best), `traps.jsonl` (LLMBar), and `data.json` with the counts. Training rows
of more than `--max_length` tokens stay in the file: the recipe leaves them out and counts them. They do not count
towards `--max_tokens`, at which the training rows stop.
"""

import argparse
import gzip
import hashlib
import json
import random
from pathlib import Path

from transformers import AutoTokenizer


SOURCES = {"hh-rlhf": "anthropics/hh-rlhf", "PandaLM": "PandaLM"}


def read(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def is_test(prompt: str) -> bool:
    """A fifth of the prompts, by a hash that does not depend on the process."""
    return int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 5 == 0


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--max_tokens", type=int, default=250_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    rng = random.Random(args.seed)

    counts: dict = {name: {"rows": 0, "too_long": 0, "train": 0, "test": 0} for name in SOURCES}
    kept: dict[bool, list[dict]] = {True: [], False: []}
    for row in read(args.data / "pairs_train.jsonl.gz"):
        name = next((name for name, part in SOURCES.items() if part.lower() in row["source"].lower()), None)
        if name is None:
            continue
        counts[name]["rows"] += 1
        lengths = [len(tokenizer(row["prompt"] + text)["input_ids"]) + 1 for text in row["completions"]]
        small = {"prompt": row["prompt"], "completions": row["completions"], "target": row["target"], "source": name}
        too_long = max(lengths) > args.max_length
        counts[name]["too_long"] += too_long
        kept[is_test(row["prompt"])].append((small, 0 if too_long else sum(lengths)))
    for rows in kept.values():
        rng.shuffle(rows)
    train, tokens = [], 0
    for row, length in kept[False]:
        if tokens + length > args.max_tokens:
            break
        train.append(row)
        tokens += length
        counts[row["source"]]["train"] += length > 0
    test = [row for row, length in kept[True] if length]
    for row in test:
        counts[row["source"]]["test"] += 1
    shuffled = []
    for row in train:
        target = list(row["target"])
        rng.shuffle(target)
        shuffled.append({**row, "target": target})
    # K answers of one prompt: the marked best, or the first of a ranking. The questions of qa_feedback stay out: 99 of
    # 100 prompts alone are longer than 256 tokens.
    groups: dict[str, dict] = {}
    counts["OASST"] = {"rows": 0, "too_long": 0, "train": 0, "test": 0}
    for file in ("ranked_train.jsonl.gz", "best_of_k_train.jsonl.gz"):
        for row in read(args.data / file):
            if "oasst" in row["source"].lower() or "open-assistant" in row["source"].lower():
                best = row["ranking"][0] if "ranking" in row else row["target"].index(1)
                group = {"prompt": row["prompt"], "completions": row["completions"], "best": best}
                groups.setdefault(row["prompt"], {**group, "source": "zh" if "zh" in row["source"] else "en"})
    kway: dict[bool, list[dict]] = {True: [], False: []}
    kway_tokens = 0
    shuffled_groups = list(groups.values())
    random.Random(args.seed).shuffle(shuffled_groups)
    for row in shuffled_groups:
        counts["OASST"]["rows"] += 1
        lengths = [len(tokenizer(row["prompt"] + text)["input_ids"]) + 1 for text in row["completions"]]
        held_out = is_test(row["prompt"])
        if max(lengths) > args.max_length:
            counts["OASST"]["too_long"] += 1
        elif held_out or kway_tokens + sum(lengths) <= args.max_tokens:
            kway[held_out].append(row)
            kway_tokens += 0 if held_out else sum(lengths)
            counts["OASST"]["test" if held_out else "train"] += 1
    # A trap set, built to fool length and style: never trained on.
    traps = [
        {**{key: row[key] for key in ("prompt", "completions", "target")}, "source": row["source"].split()[-1]}
        for row in read(args.data / "pairs_train.jsonl.gz")
        if "LLMBar" in row["source"]
    ]
    prompts = [
        {"prompt": row["prompt"]} for row in read(args.data / "prompts_redteam.jsonl.gz") if not is_test(row["prompt"])
    ]
    rng.shuffle(prompts)
    write(args.output_dir / "train.jsonl", train)
    write(args.output_dir / "train_shuffled.jsonl", shuffled)
    write(args.output_dir / "test.jsonl", test)
    write(args.output_dir / "prompts.jsonl", prompts)
    write(args.output_dir / "groups_train.jsonl", kway[False])
    write(args.output_dir / "groups_test.jsonl", kway[True])
    write(args.output_dir / "traps.jsonl", traps)
    summary = {
        "sources": counts,
        "train_tokens": tokens,
        "groups_tokens": kway_tokens,
        "seed": args.seed,
        "max_length": args.max_length,
    }
    (args.output_dir / "data.json").write_text(json.dumps(summary, indent=2))
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
