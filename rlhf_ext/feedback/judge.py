"""AI feedback: a model compares two answers under a principle, by the log-probability of (A) and (B).

Bai et al. 2022 (https://huggingface.co/papers/2212.08073), Sec. 4.1. Every pair is asked in both orders, so that a
preference for a position cancels.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..functional.ai_feedback import (
    clamp_label,
    judge_probabilities,
    position_bias,
    swap_average,
    swap_disagreement,
)
from ..models.generation import end_token_ids, sample_completions
from ..models.positions import positions_from_mask
from .constitution import Principle


BASE_TEMPLATE = """\
Here is a conversation, a question about two possible answers to its last turn, and the choice that was made.

{few_shots}Conversation:
{prompt}

Question: {question}
(A) {first}
(B) {second}
Choice:"""
"""For base models, which know no chat: the question as a document that goes on with the choice."""

CHAT_TEMPLATE = """\
Read this conversation and two possible answers to its last turn.

Conversation:
{prompt}

{question}
(A) {first}
(B) {second}

Answer with (A) or (B) alone."""
"""The turn of the user for models with a chat template; the reply is read at its first tokens."""

CHOICE = "\nChoice:"
THINK = "\nThoughts on both:"


@dataclass
class Verdicts:
    """
    What a judge said of N pairs under M principles each.

    Attributes:
        targets (`list[float]`): P(first is better), both orders and all principles averaged, clamped if asked.
        first_as_a, second_as_a (`torch.Tensor` of shape `(N, M)`): probability of option (A) in the two orders.
        principles (`list[list[str]]`): names of the M principles each pair was asked.
        position_bias (`float`): mean probability of (A) over all questions, less one half.
        swap_disagreement (`float`): share of questions whose winner changes with the order; 0.5 exactly counts half.
        thoughts (`list[list[str]]`): with a chain of thought, what was written before each choice, else empty.
    """

    targets: list[float]
    first_as_a: torch.Tensor
    second_as_a: torch.Tensor
    principles: list[list[str]]
    position_bias: float
    swap_disagreement: float
    thoughts: list[list[str]]


class AIJudge:
    """
    Compares completions by asking a causal language model.

    Args:
        model (`nn.Module`):
            Causal language model, in the state it should judge in; it is switched to eval.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer. With a chat template the question is a user's turn, else [`BASE_TEMPLATE`] is used.
        principles (`Sequence[Principle]`):
            Of [`~rlhf_ext.feedback.constitution.load_constitution`].
        principles_per_pair (`int`, *optional*, defaults to 1):
            How many are drawn for each pair, without repetition; their labels are averaged.
        chain_of_thought (`bool`, *optional*, defaults to `False`):
            Let the model write first, greedily. Its labels are then clamped to `clamp`.
        clamp (`tuple[float, float]`, *optional*):
            Bounds of every label. By default (0.4, 0.6) after a chain of thought, else none.
        few_shots (`Sequence[str]`, *optional*):
            Solved questions in the form of the template, put before the question in an order drawn per pair. Base
            template only.
        template (`str`, *optional*):
            Replaces the base template; a format string with `prompt`, `question`, `first`, `second` and `few_shots`.
        labels (`tuple[str, str]`, *optional*):
            The two continuations whose log-probabilities are compared; " (A)" and " (B)" by default, without the space
            at the start of a chat model's reply.
        max_thought_tokens (`int`, *optional*, defaults to 128), batch_size (`int`, *optional*, defaults to 16), seed
            (`int`, *optional*, defaults to 0).

    Raises:
        ValueError: no principle, more drawn than there are, equal labels, or few-shots with a chat template.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        principles: Sequence[Principle],
        *,
        principles_per_pair: int = 1,
        chain_of_thought: bool = False,
        clamp: tuple[float, float] | None = None,
        few_shots: Sequence[str] = (),
        template: str | None = None,
        labels: tuple[str, str] | None = None,
        max_thought_tokens: int = 128,
        batch_size: int = 16,
        seed: int = 0,
    ):
        if not 1 <= principles_per_pair <= len(principles):
            raise ValueError(
                f"`principles_per_pair` is {principles_per_pair} of {len(principles)} principles; choose 1 to that."
            )
        self.uses_chat = template is None and tokenizer.chat_template is not None
        if self.uses_chat and few_shots:
            raise ValueError(
                "`few_shots` go with the base template. Pass `template=BASE_TEMPLATE`, or leave them out."
            )
        if labels is None:
            labels = ("(A)", "(B)") if self.uses_chat and not chain_of_thought else (" (A)", " (B)")
        self.label_ids = [tokenizer(label, add_special_tokens=False)["input_ids"] for label in labels]
        if self.label_ids[0] == self.label_ids[1] or not all(self.label_ids):
            raise ValueError(
                f"The tokenizer makes {self.label_ids} of the `labels` {labels}; they must differ. Give "
                "two that it tells apart (`--judge_labels` of recipes/evaluate.py)."
            )
        self.model, self.tokenizer, self.principles = model.eval(), tokenizer, list(principles)
        self.principles_per_pair, self.few_shots = principles_per_pair, list(few_shots)
        self.chain_of_thought, self.clamp = chain_of_thought, clamp or ((0.4, 0.6) if chain_of_thought else None)
        self.template, self.max_thought_tokens = template or BASE_TEMPLATE, max_thought_tokens
        self.batch_size, self.seed = batch_size, seed

    def compare(
        self,
        prompts: Sequence[str],
        first: Sequence[str],
        second: Sequence[str],
        progress: str | None = None,
    ) -> Verdicts:
        """
        Ask about pairs of completions.

        Args:
            prompts, first, second (`Sequence[str]`):
                Texts. What is drawn for a pair depends on the seed and these three alone.
            progress (`str`, *optional*):
                Title of a progress bar.

        Raises:
            ValueError: there is no pair, or a question is longer than the model's context.
        """
        if not prompts:
            raise ValueError("`prompts` is empty; give at least one pair to compare.")
        drawn = [self._draw(*pair) for pair in zip(prompts, first, second, strict=True)]
        questions = []
        for pair, (principles, shots) in zip(zip(prompts, first, second, strict=True), drawn, strict=True):
            for principle in principles:
                for a, b in ((pair[1], pair[2]), (pair[2], pair[1])):
                    questions.append(self._ask(pair[0], principle.question, a, b, shots))
        thoughts = [""] * len(questions)
        if self.chain_of_thought:
            questions, thoughts = self._think(questions, progress)
        p_a = judge_probabilities(self._option_logps(questions, progress))
        first_as_a, second_as_a = p_a.view(len(prompts), -1, 2).unbind(-1)
        each = swap_average(first_as_a, second_as_a)
        if self.clamp is not None:
            each = clamp_label(each, low=self.clamp[0], high=self.clamp[1])
        size = 2 * self.principles_per_pair
        return Verdicts(
            targets=each.mean(dim=1).tolist(),
            first_as_a=first_as_a,
            second_as_a=second_as_a,
            principles=[[principle.name for principle in principles] for principles, _ in drawn],
            position_bias=position_bias(first_as_a, second_as_a).item(),
            swap_disagreement=swap_disagreement(first_as_a, second_as_a).item(),
            thoughts=[thoughts[start : start + size] for start in range(0, len(thoughts), size)],
        )

    @property
    def context(self) -> int | None:
        """Tokens that the model reads; `None` without a limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def question_lengths(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[int]:
        """Tokens of the longest question about each pair, whichever principle is drawn, with few-shots, the longest
        chain of thought and label."""
        shots = "".join(f"{shot}\n\n" for shot in self.few_shots)
        label = max(map(len, self.label_ids))
        if self.chain_of_thought:
            around = self.tokenizer(THINK + CHOICE, add_special_tokens=False)["input_ids"]
            label += len(around) + self.max_thought_tokens
        return [
            label + max(len(self._ids(self._ask(prompt, p.question, a, b, shots))) for p in self.principles)
            for prompt, a, b in zip(prompts, first, second, strict=True)
        ]

    def rows(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str], **kwargs: Any) -> list[dict]:
        """Soft-labelled preference rows: `prompt`, `completions`, `target` = [p, 1 - p], `principles`."""
        verdicts = self.compare(prompts, first, second, **kwargs)
        columns = zip(prompts, first, second, verdicts.targets, verdicts.principles, strict=True)
        return [
            {"prompt": prompt, "completions": [a, b], "target": [p, 1 - p], "principles": names}
            for prompt, a, b, p, names in columns
        ]

    def _draw(self, prompt: str, first: str, second: str) -> tuple[list[Principle], str]:
        # Not by the order of the two: the same pair the other way round is asked the same.
        key = repr((self.seed, prompt, sorted((first, second))))
        chance = random.Random(hashlib.sha256(key.encode()).digest())
        shots = "".join(f"{shot}\n\n" for shot in chance.sample(self.few_shots, len(self.few_shots)))
        return chance.sample(self.principles, self.principles_per_pair), shots

    def _ask(self, prompt: str, question: str, first: str, second: str, shots: str) -> str:
        parts = {"prompt": prompt, "question": question, "first": first, "second": second}
        if not self.uses_chat:
            return self.template.format(**parts, few_shots=shots)
        messages = [{"role": "user", "content": CHAT_TEMPLATE.format(**parts)}]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _ids(self, question: str) -> list[int]:
        # A chat template writes its own special tokens.
        return self.tokenizer(question, add_special_tokens=not self.uses_chat)["input_ids"]

    def _think(self, questions: list[str], progress: str | None) -> tuple[list[str], list[str]]:
        """The questions with what the model writes of its own accord before the choice, and that alone."""
        starts = [question.removesuffix(CHOICE) + THINK for question in questions]
        thoughts = sample_completions(
            self.model,
            self.tokenizer,
            starts,
            max_new_tokens=self.max_thought_tokens,
            temperature=0.0,
            batch_size=self.batch_size,
            progress=progress,
            eos_token_ids=end_token_ids(self.model, self.tokenizer),
            add_special_tokens=not self.uses_chat,
        ).texts
        # A thought that goes on to choose, or starts another document, is read up to there.
        thoughts = [thought.split(CHOICE)[0].split("\n\n")[0] for thought in thoughts]
        return [start + thought + CHOICE for start, thought in zip(starts, thoughts, strict=True)], thoughts

    @torch.no_grad()
    def _option_logps(self, questions: list[str], progress: str | None) -> torch.Tensor:
        """Log-probability of both labels after each question, `(len(questions), 2)` in nats."""
        device = next(self.model.parameters()).device
        contexts = [self._ids(question) for question in questions]
        longest = max(map(len, contexts)) + max(map(len, self.label_ids))
        if self.context is not None and longest > self.context:
            raise ValueError(
                f"A question is {longest} tokens long, the judge's context {self.context}. Shorten prompts and "
                "completions, or take fewer `few_shots`."
            )
        found = torch.empty(len(contexts), 2)
        for start in tqdm(range(0, len(contexts), self.batch_size), desc=progress, disable=progress is None):
            for option, label in enumerate(self.label_ids):
                rows = [torch.tensor(ids + label) for ids in contexts[start : start + self.batch_size]]
                ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left").to(device)
                mask = nn.utils.rnn.pad_sequence(
                    [torch.ones_like(r) for r in rows], batch_first=True, padding_side="left"
                )
                mask = mask.to(device)
                # Only the label's own positions are projected on the vocabulary.
                logits = self.model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions_from_mask(mask),
                    logits_to_keep=len(label) + 1,
                ).logits[:, :-1]
                logps = logits.float().log_softmax(-1).gather(-1, ids[:, -len(label) :, None])
                found[start : start + len(rows), option] = logps.sum(dim=(1, 2)).cpu()
        return found
