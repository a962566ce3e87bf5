"""Does a quickstart reward model see each mistake? Right answers against the same answer's scene with one mistake.

    python benchmarks/value_probe.py --reward runs/quickstart-1/reward

Prints, per kind of mistake, the share of pairs whose right answer scores higher. Scenes are those of the test split.
"""

import argparse
import random

from rlhf_ext.models.scoring import ModelReward, load_reward_model
from rlhf_ext.toyworld.corpus import scenes
from rlhf_ext.toyworld.grammar import PERFECT_MIX, ErrorMix, render_prompt, write_answer
from rlhf_ext.toyworld.tiny import build_tokenizer


MISTAKES = ("insult", "product", "attribute", "value", "broken")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward", required=True)
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--seed", type=int, default=99)
    args = parser.parse_args()
    tokenizer = build_tokenizer()
    reward = ModelReward(load_reward_model(args.reward), tokenizer, tokenizer, batch_size=256)
    for mistake in MISTAKES:
        mix, rng = ErrorMix(**{**vars(PERFECT_MIX), mistake: 1.0}), random.Random(5)
        found = scenes(args.pairs, args.seed, "test")
        prompts = [render_prompt(scene) for scene in found]
        scores = []
        for kind in (PERFECT_MIX, mix):
            texts = [" " + write_answer(scene, rng, kind) for scene in found]
            ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
            scores.append(reward(prompts, texts, ids))
        share = sum(right > wrong for right, wrong in zip(*scores, strict=True)) / args.pairs
        print(f"{mistake:<10}{share:.3f}")


if __name__ == "__main__":
    main()
