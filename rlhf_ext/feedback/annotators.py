"""Annotators that are programs: they claim tasks of the label store and answer them, as a person does on the page."""

from collections.abc import Callable, Sequence
from typing import Any

from tqdm.auto import tqdm

from ..data.texts import text_of
from .judge import AIJudge
from .records import LabelRefused, Task
from .simulated import SimulatedLabeller
from .store import LabelStore


Answer = tuple[str, Any]
Annotator = Callable[[Sequence[Task]], list[Answer]]
"""Answers tasks with `(kind, value)` each, as [`LabelStore.submit`] takes them."""


def work_through(
    store: LabelStore,
    annotator: Annotator,
    name: str,
    *,
    pool: str | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    progress: str | None = None,
) -> int:
    """
    Answer every open task of a pool.

    Args:
        store ([`LabelStore`]): where the tasks are.
        annotator (`Callable`): answers a batch of tasks.
        name (`str`): the annotator's name in the store.
        pool (`str`, *optional*): the pool; all of them if not given.
        limit (`int`, *optional*): answer at most so many.
        batch_size (`int`, *optional*, defaults to 64): tasks claimed at a time.
        progress (`str`, *optional*): title of a progress bar.

    Returns:
        `int`: how many were answered.
    """
    done = 0
    total = store.progress(pool=pool).missing
    with tqdm(total=total, desc=progress, disable=progress is None) as bar:
        while limit is None or done < limit:
            count = batch_size if limit is None else min(batch_size, limit - done)
            tasks = store.claim_many(name, count, pool=pool)
            if not tasks:
                break
            for task, (kind, value) in zip(tasks, annotator(tasks), strict=True):
                try:
                    # Without a key: an answer that was stored before a kill is not claimed again, and one that was
                    # taken back since is given anew.
                    store.submit(name, task.comparison_id, kind, value)
                except LabelRefused as refused:
                    if refused.reason not in ("taken", "labelled"):  # somebody else was faster: nothing is lost
                        raise
                done += 1
                bar.update()
    return done


def simulated(labeller: SimulatedLabeller, vote: int = 0) -> Annotator:
    """
    [`SimulatedLabeller`] as an annotator: pairs with ties, the best of more ("cannot compare" without a single best).

    Its score gets prompts and completions as they are stored: texts, or messages, as every other reward function.

    Args:
        vote (`int`, *optional*, defaults to 0): a second annotator of the same taste takes another number.
    """

    def answer(tasks: Sequence[Task]) -> list[Answer]:
        answers: list[Answer] = []
        for task in tasks:
            if len(task.completions) == 2:
                row = labeller.pair(task.prompt, task.completions, vote=vote)
                target = row["target"]
                answers.append(
                    ("incomparable", None)
                    if target is None
                    else ("tie", None)
                    if target[0] == target[1]
                    else ("best", int(target[1] > target[0]))
                )
            else:
                best = labeller.best_of(task.prompt, task.completions, vote=vote, skip_ties=True)["best"]
                answers.append(("incomparable", None) if best is None else ("best", best))
        return answers

    return answer


def judged(judge: AIJudge) -> Annotator:
    """An [`AIJudge`] as an annotator of pairs: soft labels, both orders averaged; "cannot compare" where a question is
    longer than its context."""

    def answer(tasks: Sequence[Task]) -> list[Answer]:
        pairs = [
            (text_of(task.prompt), *(text_of(completion).strip() for completion in task.completions)) for task in tasks
        ]
        lengths = judge.question_lengths(*(list(texts) for texts in zip(*pairs, strict=True)))
        fits = [judge.context is None or length <= judge.context for length in lengths]
        asked = [pair for pair, short in zip(pairs, fits, strict=True) if short]
        targets = iter(judge.compare(*(list(texts) for texts in zip(*asked, strict=True))).targets if asked else [])
        answers: list[Answer] = []
        for short in fits:
            p = next(targets) if short else None
            answers.append(("incomparable", None) if p is None else ("target", [p, 1.0 - p]))
        return answers

    return answer
