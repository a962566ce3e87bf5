"""What trains is what is proved, for every pair of config values: compared with plain logits, or refused."""

import pytest
import torch

from tests.pairwise import allowed_pairs, complete, covering_array, pairs_of
from tests.trainers.ppo_case import Case, arguments, build
from tests.trainers.ppo_pairs import FACTORS, REFUSED
from tests.trainers.test_ppo_saving import make_reward_adapter


PAIRS, ALLOWED = pairs_of(FACTORS), allowed_pairs(FACTORS, REFUSED)
REFUSED_PAIRS = sorted(PAIRS - ALLOWED, key=repr)
ROWS = covering_array(FACTORS, REFUSED, ALLOWED, seed=2)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """The folder of a reward adapter, per kind of model."""
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = make_reward_adapter(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return folder


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_rollout_loss_and_gradient_are_those_of_plain_logits(tmp_path, adapters, number):
    """In float64 on both sides; what differs by up to 1e-7 is TRL's head, which gives float32."""
    Case(ROWS[number], build(ROWS[number], tmp_path, adapters), tolerance=1e-6).check()


@pytest.mark.parametrize("objective", FACTORS["policy_objective"])
def test_and_in_float32(tmp_path, adapters, objective):
    """Rounding alone is 3e-6 of a gradient here, so the tolerance is wider."""
    row = next(row for row in ROWS if row["policy_objective"] == objective and row["critic"] != "none")
    Case(row, build(row, tmp_path, adapters, torch.float32), tolerance=1e-5).check()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_the_same_for_other_rows(tmp_path, adapters, seed):
    """Other choices of the rows hold other triples of values."""
    rows = covering_array(FACTORS, REFUSED, ALLOWED, seed=100 + seed)
    assert set().union(*(pairs_of(row) for row in rows)) == ALLOWED
    for number, row in enumerate(rows):
        Case(row, build(row, tmp_path / str(number), adapters), tolerance=1e-6).check()


def test_every_pair_is_compared_or_refused():
    compared = set().union(*(pairs_of(row) for row in ROWS))
    assert compared | set(REFUSED_PAIRS) == PAIRS and not compared & set(REFUSED_PAIRS)
    assert not any(refusal.holds(row) for refusal in REFUSED for row in ROWS)


def one_refusal(refusal, values):
    """A whole row with `values` that nothing but this refusal's check forbids; `None` if there is none."""
    return complete(FACTORS, [other for other in REFUSED if other.message != refusal.message], values)


def is_refused(row, message, folder, adapters):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        build(row, folder, adapters)


@pytest.mark.parametrize("pair", REFUSED_PAIRS, ids=lambda pair: "-".join(f"{n}={v}" for n, v in pair))
def test_refused_pairs_raise(tmp_path, adapters, pair):
    """Whatever stands beside them: the row is completed so that one rule alone is broken, and that rule speaks."""
    tried = 0
    for refusal in REFUSED:
        row = one_refusal(refusal, dict(pair))
        if row is not None:
            tried += 1
            is_refused(row, refusal.message, tmp_path, adapters)
    assert tried, "no row shows which rule forbids the pair"


@pytest.mark.parametrize("refusal", REFUSED, ids=lambda refusal: "-".join(refusal.values))
def test_each_rule_refuses_each_of_its_combinations(tmp_path, adapters, refusal):
    for value in pairs_of({name: list(values) for name, values in refusal.values.items()}):
        rest = {name: values[0] for name, values in refusal.values.items()}
        is_refused(one_refusal(refusal, {**rest, **dict(value)}), refusal.message, tmp_path, adapters)


def test_what_a_rule_spares_is_accepted(tmp_path):
    """The rules are no wider than they say: every compared row builds its arguments."""
    for row in ROWS:
        arguments(row, tmp_path)
