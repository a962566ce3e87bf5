"""The steps of Constitutional AI that write text: answers, revisions, and pairs that a judge labels."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase, set_seed

from ..data.constitution_arguments import ConstitutionArguments
from ..data.jsonl import read_jsonl
from ..data.prompts import check_tokenizer
from ..feedback.constitution import Principle
from ..feedback.judge import AIJudge
from ..feedback.revision import Reviser
from ..functional.ai_feedback import label_entropy, position_bias, swap_disagreement
from ..models.base_quantization import QUANTIZATION_FILE, as_loading_option, read_base_quantization
from ..models.build import load_policy
from ..models.generation import end_token_ids, sample_completions
from ..models.hub import check_model_name, find_file
from .chunked_rows import write_in_chunks


ROWS, TRANSCRIPTS = "rows.jsonl", "transcripts.jsonl"


@dataclass
class Loading:
    """How language models of the run are loaded."""

    device: torch.device
    dtype: str = "float32"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    quantization: BitsAndBytesConfig | None = None

    def model(self, path: str, revision: str | None = None) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        """A language model, full or an adapter, and its tokenizer. The base is quantised if the run's models are, and
        an adapter's as it was in training."""
        check_model_name(path, "model path", revision)
        options = as_loading_option(read_base_quantization(find_file(path, QUANTIZATION_FILE, revision)))
        if not options and self.quantization is not None:
            options = {"quantization_config": self.quantization}
        given = {"dtype": self.dtype, "revision": revision, "attn_implementation": self.attn_implementation}
        options |= {name: value for name, value in given.items() if value is not None}
        model = load_policy(path, trust_remote_code=self.trust_remote_code, **options).requires_grad_(False).eval()
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=self.trust_remote_code)
        check_tokenizer(tokenizer)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return (model if model.device == self.device else model.to(self.device)), tokenizer


def as_prompt(prompt: str, as_messages: bool) -> Any:
    """A prompt as the policy reads it."""
    return [{"role": "user", "content": prompt}] if as_messages else prompt


def as_completion(prompt: str, text: str, as_messages: bool) -> Any:
    """An answer as the policy reads it. Behind a text that does not end in a space it begins with one."""
    if as_messages:
        return [{"role": "assistant", "content": text.strip()}]
    return text if not text or prompt[-1:].isspace() or text[0].isspace() else f" {text}"


def sample(
    args: ConstitutionArguments,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    num_samples: int,
    seed: int,
) -> tuple[list[list[str]], list[list[bool]]]:
    """`num_samples` answers to each prompt, and whether each was cut by length."""
    set_seed(seed)
    samples = sample_completions(
        model,
        tokenizer,
        [as_prompt(prompt, args.as_messages) for prompt in prompts],
        num_samples=num_samples,
        max_new_tokens=args.max_completion_length,
        temperature=args.temperature,
        batch_size=args.batch_size,
        eos_token_ids=end_token_ids(model, tokenizer),
    )
    starts = range(0, len(samples.texts), num_samples)
    texts, cut = ([of[start : start + num_samples] for start in starts] for of in (samples.texts, samples.truncated))
    return texts, cut


def write_responses(
    folder: Path, args: ConstitutionArguments, loading: Loading, policy: str, prompts: list[str], revision: str | None
) -> dict[str, Any]:
    """One answer of the helpful policy to each red-team prompt."""
    model, tokenizer = loading.model(policy, revision)

    def make(chunk: list[str], number: int) -> list[dict[str, Any]]:
        texts, cut = sample(args, model, tokenizer, list(chunk), num_samples=1, seed=args.seed + number)
        return [
            {"prompt": prompt, "answer": text, "truncated": flag}
            for prompt, (text,), (flag,) in zip(chunk, texts, cut, strict=True)
        ]

    rows = write_in_chunks(folder / ROWS, prompts, make, chunk_size=args.chunk_size, title="answers")
    return {
        "answers": len(rows),
        "empty": sum(not row["answer"].strip() for row in rows),
        "truncated": sum(row["truncated"] for row in rows) / len(rows),
    }


def write_revisions(
    folder: Path,
    args: ConstitutionArguments,
    loading: Loading,
    reviser_path: str,
    principles: list[Principle],
    responses: Path,
    revision: str | None,
) -> dict[str, Any]:
    """Rounds of critique and revision of each answer, every text of them kept."""
    model, tokenizer = loading.model(reviser_path, revision)

    def make(chunk: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
        reviser = Reviser(
            model,
            tokenizer,
            principles,
            num_rounds=args.num_rounds,
            max_new_tokens=args.max_completion_length,
            temperature=args.temperature,
            batch_size=args.batch_size,
            seed=args.seed + 1000 * number,  # a round draws by its own number, up to twice the rounds
        )
        prompts = [row["prompt"] for row in chunk]
        answers = [as_completion(row["prompt"], row["answer"], False) for row in chunk]
        revised = reviser.revise(prompts, answers)
        return [{**made.row(), "truncated": row["truncated"]} for made, row in zip(revised, chunk, strict=True)]

    rows = write_in_chunks(
        folder / TRANSCRIPTS, read_jsonl(responses), make, chunk_size=args.chunk_size, title="revisions"
    )
    last = [row["rounds"][-1]["revision"].strip() for row in rows]
    changed = [text != row["answer"].strip() for text, row in zip(last, rows, strict=True)]
    return {
        "transcripts": len(rows),
        "rounds": args.num_rounds,
        "changed": sum(changed) / len(rows),
        "empty": sum(not text for text in last),
        "truncated": sum(row["rounds"][-1]["truncated"] for row in rows) / len(rows),
    }


def _sample_pairs(
    path: Path, args: ConstitutionArguments, loading: Loading, policy: str, prompts: list[str]
) -> list[dict[str, Any]]:
    model, tokenizer = loading.model(policy)

    def make(chunk: list[str], number: int) -> list[dict[str, Any]]:
        seed = args.seed + 500_000 + number  # not the noise of the first answers
        texts, cut = sample(args, model, tokenizer, list(chunk), num_samples=2, seed=seed)
        return [
            {"prompt": prompt, "completions": pair, "truncated": flags}
            for prompt, pair, flags in zip(chunk, texts, cut, strict=True)
        ]

    return write_in_chunks(path, prompts, make, chunk_size=args.chunk_size, title="pairs")


def write_labels(
    folder: Path,
    args: ConstitutionArguments,
    loading: Loading,
    policy: str,
    judge_path: str,
    principles: list[Principle],
    prompts: list[str],
    revision: str | None,
) -> dict[str, Any]:
    """Two answers of the SFT model to each prompt, compared by the judge in both orders."""
    pairs = _sample_pairs(folder / "pairs.jsonl", args, loading, policy, prompts)
    judge_model, judge_tokenizer = loading.model(judge_path, revision)
    judge = AIJudge(
        judge_model,
        judge_tokenizer,
        principles,
        principles_per_pair=args.principles_per_pair,
        chain_of_thought=args.chain_of_thought,
        max_thought_tokens=args.max_thought_tokens,
        batch_size=args.batch_size,
        seed=args.seed,
    )

    def make(chunk: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
        first, second = ([row["completions"][place].strip() for row in chunk] for place in range(2))
        verdicts = judge.compare([row["prompt"] for row in chunk], first, second)
        return [
            {
                **row,
                "target": [verdicts.targets[place], 1 - verdicts.targets[place]],
                "principles": verdicts.principles[place],
                "first_as_a": verdicts.first_as_a[place].tolist(),
                "second_as_a": verdicts.second_as_a[place].tolist(),
                "thoughts": verdicts.thoughts[place],
            }
            for place, row in enumerate(chunk)
        ]

    rows = write_in_chunks(folder / ROWS, pairs, make, chunk_size=args.chunk_size, title="labels")
    return summarize_labels(rows)


def summarize_labels(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What can be said of labels without knowing the truth."""
    one, other = (torch.tensor([row[name] for row in rows]) for name in ("first_as_a", "second_as_a"))
    targets = torch.tensor([row["target"][0] for row in rows])
    return {
        "pairs": len(rows),
        "identical": sum(len(set(row["completions"])) == 1 for row in rows),
        "truncated": sum(sum(row["truncated"]) for row in rows) / (2 * len(rows)),
        "position_bias": position_bias(one, other).item(),
        "swap_disagreement": swap_disagreement(one, other).item(),
        "label_entropy": label_entropy(targets).item(),
        "certainty": (targets - 0.5).abs().mean().item() + 0.5,
    }
