"""A process that works on a label store until it is done or killed; a line of its output is an acknowledged row.

`label` claims and labels, `import` adds labelled comparisons. It waits for a line on its input, so that several start
together.
"""

import json
import random
import sys
import time

from rlhf_ext.feedback.store import Candidate, LabelRefused, LabelStore, NewComparison, NewLabel


def say(*values):
    print(json.dumps(values), flush=True)


def label(store, name):
    rng = random.Random(name)
    while True:
        task = store.claim(name)
        if task is None:
            return
        key = f"{task.comparison_id}-{rng.random()}"
        value = rng.randrange(len(task.completions))
        time.sleep(rng.uniform(0.0, 0.02))  # people think; and SQLite's queue of processes is not fair to who hurries
        # An answer that was lost is sent again, by chance before anything else and by chance never.
        for _ in range(rng.choice([1, 1, 2])):
            row = store.submit(name, task.comparison_id, "best", value, comment=key * 20, key=key)
        say("label", row.id, task.comparison_id, value, key)
        if rng.random() < 0.1:
            say("label", store.undo(name, row.id).id, task.comparison_id, None, None)


def add(store, name):
    for index in range(10_000):
        new = [
            NewComparison(
                f"{name} {index} {part}",
                [Candidate("a" * 500), Candidate("b" * 500), Candidate("c" * 500)],
                labels=[NewLabel(name, "ranking", [2, 0, 1])],
            )
            for part in range(5)
        ]
        say("import", *store.add(new, pool=name))


if __name__ == "__main__":
    _, location, mode, name = sys.argv
    say("ready")
    sys.stdin.readline()
    with LabelStore(location) as opened:
        try:
            {"label": label, "import": add}[mode](opened, name)
        except LabelRefused as error:
            say("refused", error.reason)
    say("done")
