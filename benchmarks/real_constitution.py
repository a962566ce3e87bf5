"""Small files for Constitutional AI on a real model, out of those of `real_data.py`.

    python benchmarks/real_constitution.py --data runs/real --output_dir runs/cai_gemma

Red-team prompts of hh-rlhf (`prompts.jsonl`), 24 to work on and 16 to test on; decisive short pairs of PandaLM
(`train.jsonl`) as people's data on helpfulness. Seed 0; nothing stands in two files of one kind.
"""

import argparse
import json
import random
from pathlib import Path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/real"))
    parser.add_argument("--output_dir", type=Path, default=Path("runs/cai_gemma"))
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)
    pairs = [
        row
        for row in read(args.data / "train.jsonl")
        if row["source"] == "PandaLM"
        and sorted(row["target"]) == [0.0, 1.0]
        and len(row["prompt"] + max(row["completions"], key=len)) < 500
    ]
    chance.shuffle(pairs)
    red = [prompt for prompt in dict.fromkeys(row["prompt"] for row in read(args.data / "prompts.jsonl"))]
    red = [prompt for prompt in red if len(prompt) < 160]
    chance.shuffle(red)
    best = [(row["prompt"], row["completions"][row["target"].index(1.0)]) for row in pairs[24:40]]
    files = {
        "red": [{"prompt": prompt} for prompt in red[:24]],
        "test": [{"prompt": prompt} for prompt in red[24:40]],
        "helpful_pairs": [{name: row[name] for name in ("prompt", "completions", "target")} for row in pairs[:24]],
        "helpful_rows": [{"prompt": prompt, "completion": completion} for prompt, completion in best],
        "helpful_prompts": [{"prompt": row["prompt"]} for row in pairs[40:52]],
    }
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (args.output_dir / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
