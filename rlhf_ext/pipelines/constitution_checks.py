"""What Constitutional AI checks before its first step: who reads what, and what is held out."""

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..data.constitution_arguments import ConstitutionArguments
from ..data.loading import prompt_key
from ..feedback.constitution import Principle
from ..feedback.judge import AIJudge
from ..feedback.revision import Reviser
from .constitution_texts import as_prompt
from .constitution_training import helpful_pairs, helpful_rows


LONGEST = 16
"""Prompts that are measured: tokens follow characters well enough to look at the longest alone."""

Reader = tuple[PreTrainedTokenizerBase, int | None]
"""Tokenizer and context of a model."""


def check_contexts(
    args: ConstitutionArguments, principles: list[Principle], red_team: list[str], judge: Reader, reviser: Reader
) -> None:
    """
    Measure the longest question to the judge and the longest request to the reviser, with texts of full length.

    Raises:
        ValueError: one of them does not fit into its context.
    """
    prompts = sorted(red_team, key=len)[-LONGEST:]
    # Neither asks its model for a length.
    asks = AIJudge(
        nn.Module(),
        judge[0],
        principles,
        principles_per_pair=args.principles_per_pair,
        chain_of_thought=args.chain_of_thought,
        max_thought_tokens=args.max_thought_tokens,
    )
    writes = Reviser(
        nn.Module(),
        reviser[0],
        principles,
        num_rounds=args.num_rounds,
        max_new_tokens=args.max_completion_length,
    )
    nothing = [""] * len(prompts)
    question = max(asks.question_lengths(prompts, nothing, nothing)) + 2 * args.max_completion_length
    request = max(writes.request_lengths(prompts))
    for field, what, length, context in (
        ("judge_model_path", "question to the judge, with two answers", question, judge[1]),
        ("reviser_model_path", "request to the reviser, with answer, critique and revision", request, reviser[1]),
    ):
        if context is not None and length > context:
            raise ValueError(
                f"The longest {what} of `max_completion_length` {args.max_completion_length} has up to {length} "
                f"tokens, the context of `{field}` (by default the helpful policy) is {context}. Drop long prompts "
                "from `red_team_prompts`, lower `max_completion_length`, or take a model that reads more."
            )


def check_held_out(args: ConstitutionArguments, red_team: list[str], helpful: list[str], test: list[str]) -> None:
    """
    Refuse test prompts on which something of the run is trained: scores on them would not be held out.

    Raises:
        ValueError: a test prompt stands in what is trained on.
    """
    trained = {"red_team_prompts": red_team, "helpful_prompts": helpful}
    trained["helpful_rows"] = [row["prompt"] for row in helpful_rows(args)]
    trained["helpful_pairs"] = [row["prompt"] for row in helpful_pairs(args)]
    known = {prompt_key({"prompt": as_prompt(prompt, args.as_messages)}): prompt for prompt in test}
    for name, prompts in trained.items():
        keys = {
            prompt_key({"prompt": as_prompt(prompt, args.as_messages) if isinstance(prompt, str) else prompt})
            for prompt in prompts
        }
        if both := [prompt for key, prompt in known.items() if key in keys]:
            raise ValueError(
                f"{len(both)} of {len(known)} `test_prompts` stand in `{name}` too, {both[0][:60]!r} for one. Take "
                "them out of one of the two: what the run is trained on measures nothing."
            )
