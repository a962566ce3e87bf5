"""Covering arrays: a few rows in which every pair of values that may stand together does."""

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any


Values = Mapping[str, Any]
Pair = tuple[tuple[str, Any], tuple[str, Any]]


class Refusal:
    """Values that must not stand together: `Refusal({"critic": ["none"], "estimator": ["gae"]}, ...)`.

    Args:
        values (`dict[str, list]`): per factor the values that take part; the refusal holds if all factors do.
        message (`str`): pattern of the error, which names the field.
        reason (`str`): why it is refused.
    """

    def __init__(self, values: Mapping[str, Sequence[Any]], message: str, reason: str):
        self.values, self.message, self.reason = values, message, reason

    def holds(self, row: Values) -> bool:
        return all(name in row and row[name] in values for name, values in self.values.items())


def pairs_of(row: Values) -> set[Pair]:
    """All pairs of values in a row, or in the lists of a table of factors."""
    lists = {name: value if isinstance(value, list) else [value] for name, value in row.items()}
    return {
        ((one, a), (two, b))
        for one, two in itertools.combinations(sorted(lists), 2)
        for a in lists[one]
        for b in lists[two]
    }


def complete(factors: Mapping[str, list], refusals: Sequence[Refusal], row: Values) -> dict[str, Any] | None:
    """A whole row that holds `row` and that nothing refuses; `None` if there is none."""
    if any(refusal.holds(row) for refusal in refusals):
        return None
    concerned = {name for refusal in refusals for name in refusal.values}
    return _complete(factors, refusals, dict(row), [name for name in factors if name in concerned])


def _complete(factors, refusals, row, names):
    names = [name for name in names if name not in row]
    if not names:
        return {name: row.get(name, values[0]) for name, values in factors.items()}
    # The factor that has fewest values left first, so that a dead end shows early.
    left = {name: [v for v in factors[name] if not _refused(refusals, row, name, v)] for name in names}
    name = min(names, key=lambda name: len(left[name]))
    for value in left[name]:
        whole = _complete(factors, refusals, {**row, name: value}, names)
        if whole is not None:
            return whole
    return None


def _refused(refusals, row, name, value):
    return any(
        name in refusal.values
        and value in refusal.values[name]
        and all(other == name or (other in row and row[other] in held) for other, held in refusal.values.items())
        for refusal in refusals
    )


def allowed_pairs(factors: Mapping[str, list], refusals: Sequence[Refusal]) -> set[Pair]:
    """The pairs that some whole row holds."""
    allowed: set[Pair] = set()
    for pair in sorted(pairs_of(factors), key=repr):
        if pair not in allowed:
            whole = complete(factors, refusals, dict(pair))
            if whole is not None:
                allowed |= pairs_of(whole)
    return allowed


def covering_array(
    factors: Mapping[str, list], refusals: Sequence[Refusal], allowed: set[Pair], *, seed: int, tries: int = 5
) -> list[dict[str, Any]]:
    """Rows, none of them refused, that together hold every allowed pair; greedy, the same for the same seed."""
    chance = random.Random(seed)
    missing, rows = set(allowed), []
    while missing:
        start = sorted(missing, key=repr)
        found = [_row(factors, refusals, allowed, missing, dict(chance.choice(start)), chance) for _ in range(tries)]
        whole = [row for row in found if row is not None]
        if whole:
            rows.append(max(whole, key=lambda row: len(pairs_of(row) & missing)))
            missing -= pairs_of(rows[-1])
    return rows


def _row(factors, refusals, allowed, missing, row, chance):
    """A whole row that holds many missing pairs, or `None` where the choices lead nowhere."""
    for name in chance.sample(sorted(factors), len(factors)):
        best = None
        for value in [] if name in row else factors[name]:
            pairs = {tuple(sorted(((name, value), other), key=lambda item: item[0])) for other in row.items()}
            if pairs <= allowed and not _refused(refusals, row, name, value):
                gain = (len(pairs & missing), chance.random(), value)
                best = gain if best is None or gain[:2] > best[:2] else best
        if name not in row:
            if best is None:
                return None
            row[name] = best[2]
    return {name: row[name] for name in factors}
