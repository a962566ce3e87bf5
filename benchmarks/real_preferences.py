"""Accuracy of a reward model on held-out human preferences, beside always-longer and bag-of-words on the same split.

    python benchmarks/real_preferences.py --model runs/real/reward --data runs/real --base_model MODEL \
        --log runs/real/reward/train_results.json --result benchmarks/results/reward_gemma270m.json
"""

import argparse
import collections
import json
import math
import re
import subprocess
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

from rlhf_ext.functional.pairs import preference_accuracy
from rlhf_ext.models.scoring import ModelReward, load_reward_model


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def interval(rows: list[dict], scores: list[tuple[float, float]]) -> str:
    """Accuracy on decisive pairs with its 95% Wilson interval."""
    kept = [i for i, row in enumerate(rows) if row["target"][0] != row["target"][1]]
    found = preference_accuracy(
        torch.tensor([scores[i] for i in kept], dtype=torch.float64),
        torch.tensor([rows[i]["target"][0] for i in kept], dtype=torch.float64),
    )
    return f"{found['accuracy']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def bag_of_words(train: list[dict], test: list[dict]) -> list[tuple[float, float]]:
    """Bradley-Terry on differences of word counts, log(1 + count), with an L2 penalty chosen beforehand."""

    def words(text: str) -> collections.Counter:
        return collections.Counter(re.findall(r"\w+", text.lower()))

    counts = collections.Counter(w for row in train for text in row["completions"] for w in set(words(text)))
    index = {w: i for i, (w, n) in enumerate(counts.most_common(5000)) if n > 1}

    def features(text: str) -> torch.Tensor:
        x = torch.zeros(len(index))
        for word, n in words(text).items():
            if word in index:
                x[index[word]] = math.log1p(n)
        return x

    x = torch.stack([features(r["completions"][0]) - features(r["completions"][1]) for r in train])
    y = torch.tensor([r["target"][0] for r in train])
    weights = torch.zeros(len(index), requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(x @ weights, y) + 1e-2 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return [tuple((features(t) @ weights).item() for t in row["completions"]) for row in test]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--base_model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--log", type=Path, help="train_results.json of the run, for its seconds")
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--title", default="Reward model on human preferences, Gemma 3 270M")
    parser.add_argument("--train_command", default="")
    args = parser.parse_args()
    train, test = read(args.data / "train.jsonl"), read(args.data / "test.jsonl")
    data = json.loads((args.data / "data.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = load_reward_model(args.model, dtype=torch.float32, base_model=args.base_model)
    reward = ModelReward(model, tokenizer, tokenizer, batch_size=8)
    # Training reads the text as one piece and closes it by EOS; so does this.
    start, scores = time.time(), []
    for i, row in enumerate(test):
        ids = [tokenizer(row["prompt"] + text)["input_ids"] + [tokenizer.eos_token_id] for text in row["completions"]]
        scores.append(tuple(reward([""] * 2, [""] * 2, ids, prompt_ids=[[], []])))
        if i % 20 == 0:
            print(f"{i}/{len(test)} rows, {time.time() - start:.0f} s", flush=True)
    systems = {
        "reward model": scores,
        "always longer": [tuple(float(len(t)) for t in row["completions"]) for row in test],
        "bag of words": bag_of_words(train, test),
    }
    decisive = [row for row in test if row["target"][0] != row["target"][1]]
    places = {
        s: [i for i, row in enumerate(test) if row["source"] == s] for s in sorted({r["source"] for r in decisive})
    }
    rows = []
    for name, found in systems.items():
        cells = [
            interval([test[i] for i in of_source], [found[i] for i in of_source]) for of_source in places.values()
        ]
        rows.append([name, interval(test, found), *cells])
    counts = {source: sum(row["source"] == source for row in decisive) for source in places}
    columns = ["", f"all ({len(decisive)} pairs)", *[f"{source} ({count})" for source, count in counts.items()]]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    seconds = json.loads(args.log.read_text())["train_runtime"] if args.log else float("nan")
    notes = [
        "Accuracy on held-out prompts (a fifth, by hash), decisive pairs, equal scores half; 95% Wilson interval.",
        f"Trained on {sum(s['train'] for s in data['sources'].values())} pairs, {data['train_tokens']} tokens, "
        f"{seconds:.0f} s. Left out as longer than {data['max_length']} tokens: "
        + ", ".join(f"{n} {s['too_long']} of {s['rows']}" for n, s in data["sources"].items())
        + ".",
    ]
    result = {
        "title": args.title,
        "command": args.train_command,
        "commit": commit,
        "seed": 42,
        "columns": columns,
        "rows": rows,
        "notes": notes,
    }
    args.result.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
