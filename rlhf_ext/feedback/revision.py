"""Critique and revision: a model says what is wrong with an answer under a principle, and writes it again.

The supervised half of Constitutional AI (Bai et al. 2022, https://huggingface.co/papers/2212.08073, Sec. 3.1): answer,
critique request, critique, revision request, revision; the revision is the answer of the next round, under another
principle. Every text in between is kept.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from ..models.generation import end_token_ids, prompt_length, sample_completions
from .constitution import Principle


@dataclass
class Round:
    """One critique and one revision, with the name of the principle that both were asked under; `truncated` says that
    the revision was cut by length and does not end where it stops."""

    principle: str
    critique: str
    revision: str
    truncated: bool = False


@dataclass
class Transcript:
    """
    How an answer was revised.

    Attributes:
        prompt, answer (`str`): the prompt, and the first answer.
        rounds (`list[Round]`): critiques and revisions, in order.
    """

    prompt: str
    answer: str
    rounds: list[Round] = field(default_factory=list)

    @property
    def revision(self) -> str:
        """The last revision, or the answer where there was no round."""
        return self.rounds[-1].revision if self.rounds else self.answer

    def row(self) -> dict[str, Any]:
        """The transcript as plain values, for JSON."""
        return asdict(self)


class Reviser:
    """
    Lets a causal language model criticise and revise answers.

    Args:
        model (`nn.Module`), tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The model that writes. With a chat template requests are turns of the user, else lines of a document.
        principles (`Sequence[Principle]`):
            Of [`~rlhf_ext.feedback.constitution.load_constitution`]; drawn anew for each answer and round, none twice
            for one answer.
        num_rounds (`int`, *optional*, defaults to 1):
            Rounds for each answer.
        few_shots (`str`, *optional*):
            Whole transcripts in the form of the document, put before it. Base models only.
        max_new_tokens (`int`, *optional*, defaults to 128), temperature (`float`, *optional*, defaults to 1.0),
            batch_size (`int`, *optional*, defaults to 16), seed (`int`, *optional*, defaults to 0).

    Raises:
        ValueError: more rounds than principles, or few-shots with a chat template.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        principles: Sequence[Principle],
        *,
        num_rounds: int = 1,
        few_shots: str = "",
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        batch_size: int = 16,
        seed: int = 0,
    ):
        if not 1 <= num_rounds <= len(principles):
            raise ValueError(
                f"`num_rounds` is {num_rounds}, of {len(principles)} principles, none of which an answer meets twice; "
                "choose 1 to that."
            )
        self.uses_chat = tokenizer.chat_template is not None
        if self.uses_chat and few_shots:
            raise ValueError("`few_shots` go with base models, but the tokenizer has a chat template. Leave them out.")
        self.model, self.tokenizer, self.principles = model.eval(), tokenizer, list(principles)
        self.num_rounds, self.few_shots = num_rounds, few_shots
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.batch_size, self.seed = batch_size, seed

    def revise(self, prompts: Sequence[str], answers: Sequence[str], progress: bool = False) -> list[Transcript]:
        """
        Revise each answer `num_rounds` times.

        Args:
            prompts, answers (`Sequence[str]`):
                Texts. Which principles are drawn depends on the seed and these two alone.
            progress (`bool`, *optional*, defaults to `False`):
                Whether to show progress bars.
        """
        transcripts = [Transcript(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        drawn = [self._draw(transcript) for transcript in transcripts]
        for number in range(self.num_rounds):
            asked = [principles[number] for principles in drawn]
            title = f"round {number + 1} of {self.num_rounds}" if progress else None
            requests = [
                self._request(transcript, [principle.critique])
                for transcript, principle in zip(transcripts, asked, strict=True)
            ]
            critiques, _ = self._write(requests, 2 * number, title and f"{title}: critiques")
            requests = [
                self._request(transcript, [principle.critique, critique, principle.revision])
                for transcript, principle, critique in zip(transcripts, asked, critiques, strict=True)
            ]
            revisions, cut = self._write(requests, 2 * number + 1, title and f"{title}: revisions")
            for transcript, principle, *made in zip(transcripts, asked, critiques, revisions, cut, strict=True):
                transcript.rounds.append(Round(principle.name, *made))
        return transcripts

    def request_lengths(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of the longest request about each prompt, whichever principle is drawn, with answer, critique and
        revision of `max_new_tokens` each."""
        transcripts = [Transcript(prompt, "") for prompt in prompts]
        turns = [[principle.critique, "", principle.revision] for principle in self.principles]
        read = [
            max(prompt_length(self.tokenizer, self._request(transcript, of_one)) for of_one in turns)
            for transcript in transcripts
        ]
        return [length + 3 * self.max_new_tokens for length in read]

    def _draw(self, transcript: Transcript) -> list[Principle]:
        key = repr((self.seed, transcript.prompt, transcript.answer))
        chance = random.Random(hashlib.sha256(key.encode()).digest())
        return chance.sample(self.principles, self.num_rounds)

    def _request(self, transcript: Transcript, turns: list[str]) -> Any:
        """What the model reads: prompt, newest answer, and requests and replies in turn."""
        if self.uses_chat:
            texts = [transcript.prompt, transcript.revision, *turns]
            return [
                {"role": ("user", "assistant")[place % 2], "content": text.strip()} for place, text in enumerate(texts)
            ]
        labels = ("Critique request", "Critique", "Revision request", "Revision")
        prompt, answer = transcript.prompt, transcript.revision
        # A revision was stripped, and the first answer of some tokenizers is.
        between = "" if prompt[-1:].isspace() or answer[:1].isspace() else " "
        lines = [f"{prompt}{between}{answer}"]
        lines += [f"{label}: {turn.strip()}" for label, turn in zip(labels, turns, strict=False)]
        return self.few_shots + "\n\n".join(lines) + f"\n\n{labels[len(turns)]}:"

    def _write(self, requests: list[Any], step: int, title: str | None) -> tuple[list[str], list[bool]]:
        """Texts, and whether each was cut by length."""
        set_seed(self.seed + step)
        samples = sample_completions(
            self.model,
            self.tokenizer,
            requests,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            batch_size=self.batch_size,
            progress=title,
            eos_token_ids=end_token_ids(self.model, self.tokenizer),
        )
        if self.uses_chat:
            return samples.texts, samples.truncated
        # A base model goes on with the next part of the document; it ends at an empty line.
        parts = [text.partition("\n\n") for text in samples.texts]
        cut = [flag and not line for flag, (_, line, _) in zip(samples.truncated, parts, strict=True)]
        return [text.strip() for text, _, _ in parts], cut


def revision_rows(transcripts: Sequence[Transcript]) -> list[dict[str, str]]:
    """Rows `{"prompt", "completion"}` for supervised fine-tuning on the last revisions; empty ones are left out, and
    those that were cut: fine-tuning ends every text, and would teach to stop in the middle of a sentence."""
    return [
        {"prompt": transcript.prompt, "completion": f" {transcript.revision.strip()}"}
        for transcript in transcripts
        if transcript.revision.strip() and not (transcript.rounds and transcript.rounds[-1].truncated)
    ]
