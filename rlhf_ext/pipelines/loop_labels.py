"""The third step of a round: comparisons go into the store, labels come out, from whoever gives them."""

import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from ..data.functions import import_function
from ..data.texts import text_of
from ..feedback.agreement import agreement, annotators
from ..feedback.annotators import Annotator, judged, simulated, work_through
from ..feedback.constitution import DEFAULT_CONSTITUTION, load_constitution
from ..feedback.exchange import export_rows, to_pairs
from ..feedback.judge import AIJudge
from ..feedback.simulated import SimulatedLabeller
from ..feedback.store import Candidate, LabelStore, NewComparison, open_store
from ..functional.pairs import pair_credits
from ..models.build import load_policy
from .loop_run import ROWS_FILE, LoopRun, as_completion, write_jsonl


class LabelsMissing(Exception):
    """People have not labelled enough yet, and the run was asked not to wait."""


def write_labels(run: LoopRun, round_: int, folder: Path) -> dict[str, Any]:
    """Ask about what was selected, wait for the answers, and keep them; `rows.jsonl`."""
    pool = run.pool(round_)
    with run.open_store() as store:
        add_comparisons(run, store, pool, run.rows_of(round_, "selection"))
        if run.args.labels == "people":
            wait_for_people(run, store, pool)
        else:
            for name, annotator in annotators_of(run):
                work_through(store, annotator, name, pool=pool, progress=f"labels of {name}")
        rows = labelled_rows(store, pool)
        write_jsonl(folder / ROWS_FILE, rows)
        return {**label_facts(run, rows), **agreement_facts(store, pool)}


def check_store(run: LoopRun) -> None:
    """
    Open the label store, which the run would else first do after its samples.

    Raises:
        ValueError: it cannot be opened; `store`, its value (without a password) and why.
    """
    if run.args.store is None:
        run.folder.mkdir(parents=True, exist_ok=True)  # where `labels.db` will stand
    open_store(run.store_location).close()


def labelled_rows(store: LabelStore, pool: str) -> list[dict[str, Any]]:
    """Merged rows of a pool; `split` says that annotators who chose differently came to equal shares, which is no tie
    that anybody gave."""
    ties: dict[int, bool] = {}
    for single in export_rows(store, pool=pool, votes="single"):
        ties[single["comparison_id"]] = ties.get(single["comparison_id"], True) and _is_tie(single)
    rows = list(export_rows(store, pool=pool))
    return [{**row, "split": _is_tie(row) and not ties[row["comparison_id"]]} for row in rows]


def _is_tie(row: dict[str, Any]) -> bool:
    return row["target"] is not None and len(set(row["target"])) == 1


def add_comparisons(run: LoopRun, store: LabelStore, pool: str, rows: list[dict[str, Any]]) -> list[int]:
    """Put rows of samples into the store; what is there already is not asked twice."""
    sampling = {"temperature": run.temperature, "max_new_tokens": run.max_completion_length}
    return store.add(
        (
            NewComparison(
                row["prompt"],
                [
                    # Of an empty text nothing is left that was cut, and the store refuses it.
                    Candidate(text, policy, sampling, truncated=cut and bool(text))
                    for text, policy, cut in zip(row["completions"], row["policies"], row["truncated"], strict=True)
                ],
                overlap=run.args.overlap,
                extra=row.get("extra"),
            )
            for row in rows
        ),
        pool=pool,
    )


def annotators_of(run: LoopRun) -> list[tuple[str, Annotator]]:
    """The programs that label, by name; none for people."""
    args = run.args
    if args.labels == "simulated":
        labeller = SimulatedLabeller(
            import_function(args.gold_func),
            temperature=args.label_temperature,
            tie_band=args.label_tie_band,
            error_rate=args.label_error_rate,
            incomparable_rate=args.incomparable_rate,
            seed=args.seed,
        )
        return [(f"simulated-{vote}", simulated(labeller, vote)) for vote in range(args.overlap)]
    if args.labels == "judge":
        return [("judge", judged(judge_of(run)))]
    return []


def judge_of(run: LoopRun) -> AIJudge:
    """The judge of a run that labels by one."""
    args, source = run.args, run.args.judge_model_path
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=args.trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return AIJudge(
        load_policy(source, trust_remote_code=args.trust_remote_code).to(PartialState().device),
        tokenizer,
        load_constitution(args.constitution or DEFAULT_CONSTITUTION),
        principles_per_pair=args.principles_per_pair,
        chain_of_thought=args.chain_of_thought,
        seed=args.seed,
    )


def check_labeller(run: LoopRun) -> None:
    """
    Ask gold once, and measure the longest questions to a judge, before the first samples.

    Raises:
        ValueError: `gold_func` cannot score these prompts, or a question does not fit into the judge's context.
    """
    args, rows = run.args, run.train_prompts
    if args.gold_func is not None:
        prompt = rows[0]["prompt"]
        answer = rows[0].get("completion") or as_completion(prompt, "yes")
        try:
            [score] = import_function(args.gold_func)([prompt], [answer])
            float(score)
        except Exception as error:
            raise ValueError(
                f"`gold_func` {args.gold_func!r} cannot score the first prompt with the answer {answer!r}: "
                f"{type(error).__name__}: {error}. It is called with lists of prompts and completions, as the data "
                "has them (texts, or messages), and gives one number each."
            ) from error
    if args.labels == "judge" and not run.step(1, "labels").exists():
        judge = judge_of(run)
        # Tokens follow characters well enough to look at the longest alone; every principle is tried with each.
        texts = sorted((text_of(row["prompt"]) for row in rows), key=len)[-16:]
        longest = max(judge.question_lengths(texts, [""] * len(texts), [""] * len(texts)))
        if judge.context is not None and longest + 2 * run.max_completion_length > judge.context:
            raise ValueError(
                f"The longest question to the judge (`judge_model_path`) has {longest} tokens without answers, and "
                f"two answers of `max_completion_length` {run.max_completion_length} are to fit beside it into a "
                f"context of {judge.context}. Drop long prompts, lower `max_completion_length` in `ppo`, or take a "
                "judge that reads more."
            )


def labels_wanted(comparisons: int, share: float) -> int:
    """The least number of comparisons that is `share` of them."""
    return math.ceil(share * comparisons - 1e-9)  # 0.9 of 10 is 9, also where 1 - 0.9 is a little below 0.1


def wait_for_people(run: LoopRun, store: LabelStore, pool: str, seconds: float = 2.0) -> None:
    """
    Wait until enough of a pool is labelled.

    Raises:
        LabelsMissing: there are too few, and `wait_for_labels` is off.
    """
    progress = store.progress(pool=pool)
    wanted = labels_wanted(progress.comparisons, run.args.label_share)
    how = f"Label them with `rlhf-ext label --store {store.database}`"
    if progress.complete < wanted and not run.args.wait_for_labels:
        stuck = left_to_nobody(store, pool)
        raise LabelsMissing(
            f"{progress.complete} of {wanted} comparisons of {pool!r} are labelled. {how}, and call again: what is "
            f"finished is not repeated. {_nobody_is_left(stuck, pool) if stuck else ''}".rstrip()
        )
    if progress.complete < wanted:
        print(f"{wanted - progress.complete} comparisons of {pool!r} wait for people. {how}.", flush=True)
    seen, said = 0, 0
    with tqdm(total=wanted, initial=progress.complete, desc="labels of people") as bar:
        while (progress := store.progress(pool=pool)).complete < wanted:
            bar.update(progress.complete - bar.n)
            if progress.last_label_id != seen:
                seen, stuck = progress.last_label_id, left_to_nobody(store, pool)
                if stuck not in (0, said) and stuck == progress.comparisons - progress.complete:
                    print(_nobody_is_left(stuck, pool), flush=True)
                    said = stuck
            time.sleep(seconds)
        bar.update(progress.complete - bar.n)


def left_to_nobody(store: LabelStore, pool: str) -> int:
    """Comparisons that miss a label, and that everybody who labels this pool has labelled or skipped."""
    open_, names = [], set()
    for comparison, labels in store.labelled(pool=pool):
        who = {label.annotator for label in labels}
        names |= who
        if comparison.missing > 0 and who:
            open_.append(who)
    return sum(who >= names for who in open_)


def _nobody_is_left(stuck: int, pool: str) -> str:
    return (
        f"{stuck} comparisons of {pool!r} miss a label, but everybody who labels here has labelled or skipped them: "
        "the loop would wait for ever. Let a second annotator label; or end the run, and call it again with a lower "
        "`label_share`; or ask for fewer labels (`LabelStore.set_overlap`)."
    )


def label_facts(run: LoopRun, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts, and where gold is known the share of pairs that were labelled as gold orders them (equal gold half): of
    a best of K with each other candidate, of a ranking all pairs."""
    facts: dict[str, Any] = {
        "labels": sum(row["num_labels"] for row in rows),
        "comparisons": len(rows),
        "split": sum(row["split"] for row in rows),
        "gold_agreement": None,
    }
    pairs, _ = to_pairs(rows)
    if run.args.gold_func is not None and pairs:
        gold = import_function(run.args.gold_func)
        texts = [pair[side] for pair in pairs for side in ("chosen", "rejected")]
        scores = gold([pair["prompt"] for pair in pairs for _ in range(2)], texts)
        credits = pair_credits(torch.tensor(scores, dtype=torch.float64).view(-1, 2), torch.ones(len(pairs)))
        facts["gold_agreement"] = credits.mean().item()
    return facts


def agreement_facts(store: LabelStore, pool: str) -> dict[str, Any]:
    """Agreement of the round's annotators, by the question that most units answer and by each; their counts, and what
    of their labels are ties and "cannot compare"."""
    found = {question: part._asdict() for question, part in agreement(store, pool=pool).items() if part.units}
    most = max(found, key=lambda question: found[question]["units"], default=None)
    by_name = annotators(store, pool=pool)
    return {
        "agreement": None
        if most is None
        else {"question": most, "percent": found[most]["percent"], "alpha": found[most]["alpha_nominal"]},
        "agreement_by_question": found,
        "ties": sum(part.ties for part in by_name.values()),
        "incomparable": sum(part.incomparable for part in by_name.values()),
        "annotators": {name: part._asdict() for name, part in by_name.items()},
    }
