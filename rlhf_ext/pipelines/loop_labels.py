"""The third step of a round: comparisons go into the store, labels come out, from whoever gives them."""

import sqlite3
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from sqlalchemy.exc import SQLAlchemyError
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from ..data.functions import import_function
from ..data.texts import text_of, without_passwords
from ..feedback.agreement import agreement, annotators
from ..feedback.annotators import Annotator, judged, simulated, work_through
from ..feedback.constitution import DEFAULT_CONSTITUTION, load_constitution
from ..feedback.exchange import export_rows
from ..feedback.judge import AIJudge
from ..feedback.simulated import SimulatedLabeller
from ..feedback.store import Candidate, LabelStore, NewComparison
from ..functional.pairs import pair_credits
from ..models.build import load_policy
from .loop_run import ROWS_FILE, LoopRun, write_jsonl


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
        rows = list(export_rows(store, pool=pool))
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
    try:
        with run.open_store() as store:
            store.progress()
    except (ValueError, ImportError, OSError, SQLAlchemyError, sqlite3.Error) as error:
        location = without_passwords(str(run.args.store or run.folder / "labels.db"))
        why = without_passwords(" ".join(str(error).split())[:400])
        raise ValueError(
            f"`store` is {location!r}, which cannot be opened ({type(error).__name__}: {why}). Give a file in a "
            "folder that exists, or postgresql://user@host/database of a server that runs and lets this user in."
        ) from error


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
        source = args.judge_model_path
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=run.args.trust_remote_code)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        judge = AIJudge(
            load_policy(source, trust_remote_code=run.args.trust_remote_code).to(PartialState().device),
            tokenizer,
            load_constitution(args.constitution or DEFAULT_CONSTITUTION),
            principles_per_pair=args.principles_per_pair,
            chain_of_thought=args.chain_of_thought,
            seed=args.seed,
        )
        return [("judge", judged(judge))]
    return []


def wait_for_people(run: LoopRun, store: LabelStore, pool: str, seconds: float = 2.0) -> None:
    """
    Wait until enough of a pool is labelled.

    Raises:
        LabelsMissing: there are too few, and `wait_for_labels` is off.
    """
    progress = store.progress(pool=pool)
    wanted = progress.comparisons - int((1 - run.args.label_share) * progress.comparisons)
    how = f"Label them with `rlhf-ext label --store {store.database}`"
    if progress.complete < wanted and not run.args.wait_for_labels:
        raise LabelsMissing(
            f"{progress.complete} of {wanted} comparisons of {pool!r} are labelled. {how}, and call again: what is "
            "finished is not repeated."
        )
    if progress.complete < wanted:
        print(f"{wanted - progress.complete} comparisons of {pool!r} wait for people. {how}.", flush=True)
    with tqdm(total=wanted, initial=progress.complete, desc="labels of people") as bar:
        while (done := store.progress(pool=pool).complete) < wanted:
            bar.update(done - bar.n)
            time.sleep(seconds)
        bar.update(done - bar.n)


def label_facts(run: LoopRun, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts, and where gold is known the share of pairs that were labelled as gold orders them (ties half)."""
    facts: dict[str, Any] = {
        "labels": sum(row["num_labels"] for row in rows),
        "comparisons": len(rows),
        "ties": sum(row["target"] is not None and len(set(row["target"])) == 1 for row in rows),
        "incomparable": sum(row["incomparable"] for row in rows),
        "gold_agreement": None,
    }
    if run.args.gold_func is not None:
        gold, scores, wanted = import_function(run.args.gold_func), [], []
        for row in rows:
            target = row["target"] or _one_hot(row["best"], len(row["completions"]))
            if target is None or len(target) != 2 or target[0] == target[1]:
                continue
            scores.append(gold([text_of(row["prompt"])] * 2, [text_of(text) for text in row["completions"]]))
            wanted.append(target[0])
        if wanted:
            credits = pair_credits(
                torch.tensor(scores, dtype=torch.float64), torch.tensor(wanted, dtype=torch.float64)
            )
            facts["gold_agreement"] = credits.mean().item()
    return facts


def agreement_facts(store: LabelStore, pool: str) -> dict[str, Any]:
    """Agreement of the round's annotators, and counts of each."""
    found = {question: part._asdict() for question, part in agreement(store, pool=pool).items() if part.units}
    first = next(iter(found.values()), None)
    return {
        "agreement": None if first is None else {"percent": first["percent"], "alpha": first["alpha_nominal"]},
        "agreement_by_question": found,
        "annotators": {name: part._asdict() for name, part in annotators(store, pool=pool).items()},
    }


def _one_hot(best: int | None, size: int) -> list[float] | None:
    return None if best is None else [float(place == best) for place in range(size)]
