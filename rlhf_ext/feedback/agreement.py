"""Do the annotators agree? Over comparisons that more than one of them labelled."""

import statistics
from collections import defaultdict
from typing import Any, NamedTuple

import torch

from ..functional.agreement import krippendorff_alpha, percent_agreement
from .answers import COUNTING, answer_weights
from .records import Comparison, Label
from .store import LabelStore


class Agreement(NamedTuple):
    """
    Agreement over one kind of question.

    Attributes:
        units (`int`): comparisons (of rankings: pairs of candidates) with two labels or more.
        percent (`float` or `None`): share of pairs of people who said the same, mean over units.
        alpha_nominal (`float` or `None`): Krippendorff's alpha; "cannot compare" is a value like the others.
        alpha_ordinal (`float` or `None`): of pairs alone: first better, tie, second better, in this order; without
            "cannot compare", which stands nowhere in it.
    """

    units: int
    percent: float | None
    alpha_nominal: float | None
    alpha_ordinal: float | None


class AnnotatorReport(NamedTuple):
    """
    One annotator.

    Attributes:
        labels, skips, incomparable, ties (`int`): current labels (skips apart), and how many of them are such.
        shared (`int`): labels on comparisons to which somebody else answered the same question.
        agreement (`float` or `None`): share of the others' answers to it that say the same (rankings: whole ones),
            mean over comparisons. With three candidates or more a ranking and a best one answer different questions,
            as in [`agreement`], and are not held against each other.
        median_seconds (`float` or `None`): time a label took, of those with a time.
    """

    labels: int
    skips: int
    incomparable: int
    ties: int
    shared: int
    agreement: float | None
    median_seconds: float | None


def agreement(store: LabelStore, *, pool: str | None = None) -> dict[str, Agreement]:
    """
    Agreement by question: `pair` (two candidates), `best of K` for each K above 2, and `ranking`.

    With two candidates, best, ranking and a target above one half say the same. With more, labels that are no ranking
    are compared by their set of best candidates, and rankings of three or more by their pairs of candidates, each of
    which is one unit. Candidates are told apart by their checksums, not by their place: what was put first (a pair's
    `chosen`, say) would make all labels one value, and chance agreement perfect.
    """
    units: dict[str, list[list[Any]]] = defaultdict(list)
    for comparison, labels in store.labelled(pool=pool):
        counting = [label for label in labels if label.kind in COUNTING]
        for question, values in _units(comparison, counting).items():
            units[question] += values
    return {question: _measure(question, units[question]) for question in sorted(units)}


def annotators(store: LabelStore, *, pool: str | None = None) -> dict[str, AnnotatorReport]:
    """Counts, agreement with the others, and speed, by annotator."""
    by_name: dict[str, list[Label]] = defaultdict(list)
    shares: dict[str, list[float]] = defaultdict(list)
    for comparison, labels in store.labelled(pool=pool):
        for label in labels:
            by_name[label.annotator].append(label)
        said = [
            (label.annotator, _is_order(comparison, label), _saying(comparison, label))
            for label in labels
            if label.kind in COUNTING
        ]
        for place, (name, question, value) in enumerate(said):
            others = [other for spot, (_, asked, other) in enumerate(said) if spot != place and asked == question]
            if others:
                shares[name].append(others.count(value) / len(others))
    reports = {}
    for name, labels in sorted(by_name.items()):
        kinds = [label.kind for label in labels]
        times = [label.seconds for label in labels if label.seconds is not None]
        reports[name] = AnnotatorReport(
            labels=sum(kind in COUNTING for kind in kinds),
            skips=kinds.count("skip"),
            incomparable=kinds.count("incomparable"),
            ties=kinds.count("tie"),
            shared=len(shares[name]),
            agreement=statistics.fmean(shares[name]) if shares[name] else None,
            median_seconds=statistics.median(times) if times else None,
        )
    return reports


def _units(comparison: Comparison, labels: list[Label]) -> dict[str, list[list[Any]]]:
    size = len(comparison.candidates)
    if size == 2:
        return {"pair": [[_saying(comparison, label) for label in labels]]}
    rankings = [_saying(comparison, label) for label in labels if _is_order(comparison, label)]
    rest = [_saying(comparison, label) for label in labels if not _is_order(comparison, label)]
    found = {}
    if rest:
        found[f"best of {size}"] = [rest]
    if rankings:
        pairs = [(a, b) for a in range(size) for b in range(a + 1, size)]
        found["ranking"] = [[order.index(a) < order.index(b) for order in rankings] for a, b in pairs]
    return found


def _is_order(comparison: Comparison, label: Label) -> bool:
    """Whether a label says an order, which is another question than which are best; of two candidates it is none."""
    return label.kind == "ranking" and len(comparison.candidates) > 2


def _saying(comparison: Comparison, label: Label) -> Any:
    """What a label says, so that equal sayings are equal values: positions in the order of checksums."""
    size = len(comparison.candidates)
    order = sorted(range(size), key=lambda position: (comparison.candidates[position].checksum, position))
    place = {position: spot for spot, position in enumerate(order)}
    if label.kind == "incomparable":
        return "incomparable"
    if _is_order(comparison, label):
        return tuple(place[position] for position in label.value)
    weights = answer_weights(label.kind, label.value, size) or []
    return tuple(sorted(place[position] for position in range(size) if weights[position] == max(weights)))


def _measure(question: str, units: list[list[Any]]) -> Agreement:
    # The order of a pair: first better, tie, second better; of anything else it does not matter.
    values = [(0,), (0, 1), (1,)] if question == "pair" else []
    values += sorted({value for unit in units for value in unit} - set(values), key=repr)
    counts = torch.tensor([[unit.count(value) for value in values] for unit in units])
    ordinal = krippendorff_alpha(counts[:, :3], metric="ordinal") if question == "pair" else torch.tensor(torch.nan)
    return Agreement(
        units=int((counts.sum(dim=1) >= 2).sum()),
        percent=_number(percent_agreement(counts)),
        alpha_nominal=_number(krippendorff_alpha(counts, metric="nominal")),
        alpha_ordinal=_number(ordinal),
    )


def _number(value: torch.Tensor) -> float | None:
    return None if bool(value.isnan()) else float(value)
