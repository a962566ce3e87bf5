"""What the benchmarks of speed are made of: counted products, timers, fitted exponents, the crossing of a target."""

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from rlhf_ext.models.fused_lora import fuse_lora_updates


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import floors  # noqa: E402
import growth  # noqa: E402
import learning  # noqa: E402
import learning_clock  # noqa: E402
from matmul_work import Product, Rates, Work, flops, phases, trunk  # noqa: E402
from phase_timer import ROLLOUT_REST, PhaseTimer, logps_phase  # noqa: E402
from ppo_shape import W1, make_policy  # noqa: E402


SMALL = replace(
    W1, layers=2, hidden=64, intermediate=96, head_size=32, vocabulary=128, episodes=4, prompt=5, completion=7,
    epochs=3, micro_batch=2,
)  # fmt: skip


def linear_flops(work: Work) -> int:
    return flops(Work({product: count for product, count in work.items() if product.kind != "attention"}))


def in_place(into: torch.Size, left: torch.Size, right: torch.Size, **kwargs) -> int:
    """The counter does not know `addmm_`."""
    return 2 * left[0] * left[1] * right[1]


def counted(run) -> int:
    """FLOP of the matrix products that torch sees, attention's own left out."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        run()
    found = counter.get_flop_counts()["Global"]
    return sum(n for op, n in found.items() if str(op).split(".")[-1] in ("mm", "addmm", "addmm_"))


def test_the_counted_work_is_what_torch_multiplies():
    model = make_policy(SMALL)
    ids = torch.randint(3, SMALL.vocabulary, (SMALL.episodes, SMALL.length))

    def logps():
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return model.lm_head(hidden[:, -SMALL.completion :].flatten(0, 1)).logsumexp(-1).sum()

    work = phases(SMALL)
    with torch.no_grad():
        assert counted(logps) == linear_flops(work["old log-probabilities"]) == linear_flops(work["reference"])
        assert counted(lambda: model.base_model(input_ids=ids, use_cache=False)) == linear_flops(work["values"])
        no_end = {"do_sample": False, "min_new_tokens": SMALL.completion, "max_new_tokens": SMALL.completion}
        prompts = ids[:, : SMALL.prompt]
        found = counted(lambda: model.generate(prompts, attention_mask=torch.ones_like(prompts), **no_end))
        assert found == linear_flops(work["rollout"])
    forward = counted(logps)
    assert SMALL.epochs * forward == linear_flops(work["policy forward"])
    step = counted(lambda: logps().backward())
    policy = phases(replace(SMALL, roles=1))
    assert SMALL.epochs * (step - forward) == linear_flops(policy["backward"])


@pytest.mark.parametrize("adapted", [1, 2])
def test_the_counted_work_of_adapters_is_what_torch_multiplies(adapted):
    config = LoraConfig(
        r=floors.RANK,
        target_modules=[f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")],
        layers_to_transform=list(range(SMALL.layers - adapted, SMALL.layers)),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(make_policy(SMALL), config)
    fuse_lora_updates(model)
    ids = torch.randint(3, SMALL.vocabulary, (SMALL.micro_batch, SMALL.length))
    kept = []
    forward = counted(lambda: kept.append(model.get_base_model().model(ids, use_cache=False).last_hidden_state))
    backward = counted(lambda: kept[0].sum().backward())
    above = replace(SMALL, layers=adapted)
    tokens = SMALL.micro_batch * SMALL.length
    whole = trunk(SMALL, SMALL.micro_batch, SMALL.length) + floors.updates(above, tokens)
    assert forward == linear_flops(whole)
    assert backward == linear_flops(floors.adapted_backward(above, SMALL.micro_batch))


def test_attention_counts_each_query_with_the_keys_that_it_sees():
    work = phases(replace(SMALL, prompt=1, completion=2, episodes=1, micro_batch=1, layers=1))
    pairs = [p.m * count for p, count in work["values"].items() if p.kind == "attention"]
    assert pairs == [6 * 2]  # 1 + 2 + 3 keys; once for the scores, once for the values


def test_roles_that_are_not_there_have_no_work():
    assert set(phases(replace(SMALL, roles=1))) == {"rollout", "old log-probabilities", "policy forward", "backward"}
    assert "reward" not in phases(replace(SMALL, roles=3))


def test_floor_takes_each_product_at_its_own_rate_and_attention_at_the_best():
    rates = Rates()
    fast, slow = Product("forward", 4, 8, 16), Product("weight_grad", 16, 4, 8)
    rates.measured = {fast: 1024.0, slow: 512.0}
    attention = Product("attention", 64, 8, 1)
    assert rates.floor(Work({fast: 2, slow: 1, attention: 1})) == pytest.approx(2 * 1.0 + 2.0 + 1.0)


def test_a_second_belongs_to_the_innermost_phase():
    now = [0.0]

    class Trainer:
        def outer(self):
            now[0] += 1
            self.inner()
            now[0] += 2

        def inner(self):
            now[0] += 4

    timer, trainer = PhaseTimer(lambda: now[0]), Trainer()
    timer.wrap(trainer, "outer", "a")
    timer.wrap(trainer, "inner", lambda stack: f"inside {stack[-1]}")
    timer.wrap(trainer, "not_there", "b")
    trainer.outer()
    now[0] += 8
    assert timer.take() == {"rest": 8.0, "a": 3.0, "inside a": 4.0}
    assert timer.take() == {"rest": 0.0}
    assert [logps_phase(s) for s in ([ROLLOUT_REST], [ROLLOUT_REST, "reference"], ["critic forward"])] == [
        "old log-probabilities",
        "reference",
        "policy forward",
    ]


def test_exponent_of_a_power_and_its_interval():
    slope, low, high = growth.exponent([(x, 3 * x**1.5) for x in (1, 2, 4, 8)])
    assert slope == pytest.approx(1.5) and high - low == pytest.approx(0, abs=1e-6)
    # y = 1, 4, 4 at log x = 0, 1, 2 (base 2): slope 1, residuals -1/3, 2/3, -1/3, one degree of freedom
    slope, low, high = growth.exponent([(1, 1), (2, 4), (4, 4)])
    assert slope == pytest.approx(1.0) and high == pytest.approx(1 + 12.7062 * (2 / 3 / 2) ** 0.5, rel=1e-4)
    assert growth.verdict((1.0, 0.8, 1.2), 1.1) == "within its interval"
    assert growth.verdict((1.0, 0.9, 1.05), 1.1) == "slower" and growth.verdict((1.3, 1.2, 1.4), 1.1) == "FASTER"


def test_the_last_step_is_held_against_the_work_of_its_own():
    points = {n: [{"seconds": s * n} for s in (1.0, 2.0, 4.0)] for n in (1, 2)}
    points[4] = [{"seconds": s} for s in (6.0, 8.0, 20.0)]  # 3, 2 and 2.5 times those of 2
    assert growth.last_step(points, {1: 1.0, 2: 3.0, 4: 6.0}) == "1.25 [1.00, 1.50]"


def test_crossing_lies_straight_between_two_snapshots():
    world = {"target": 0.6, "max_seconds": 90}
    golds = [(0, 0.2), (10, 0.5), (30, 0.7), (40, 0.5)]
    rows = [{"episodes": 10 * s, "seconds": s, "cpu_seconds": s / 2, "held_out": g} for s, g in golds]
    assert learning.crossing(rows, world, "wall") == {"reached": True, "seconds": 20.0, "episodes": 200}
    assert learning.crossing(rows, world, "cpu")["seconds"] == 10.0
    assert learning.crossing(rows[:2], world, "wall") == {"reached": False, "seconds": 90.0, "episodes": 100}


def test_a_run_that_training_gold_ended_before_the_crossing_is_no_failure():
    world = {"target": 0.6, "max_seconds": 90, "episodes": 640}

    def updates(*golds, seconds=50, episodes=320):
        return [{"held_out": gold, "cpu_seconds": seconds, "episodes": episodes} for gold in golds]

    assert learning.ended_early(updates(0.2, 0.59), world)
    assert not learning.ended_early(updates(0.2, 0.61, 0.5), world)
    assert not learning.ended_early(updates(0.2, seconds=91), world)
    assert not learning.ended_early(updates(0.2, episodes=640), world)


@pytest.mark.parametrize(("margin", "ends"), [(0.0, True), (0.2, False), (None, False)])
def test_snapshots_end_at_the_margin_if_there_is_one(tmp_path, margin, ends):
    world = {"target": 0.6, "margin": margin, "max_seconds": 90, "snapshot_episodes": 64}
    job = {"world": world, "setting": {"rollout_size": 128}, "folder": str(tmp_path)}
    snapshots = learning_clock.Snapshots(job, torch.nn.Linear(1, 1), 1, lambda: [0.7] * 3)
    snapshots.on_train_begin(None, None, None)
    snapshots.on_step_end(None, None, None)  # 128 episodes: too few to tell
    with pytest.raises(learning_clock.Enough) if ends else contextlib.nullcontext():
        snapshots.on_step_end(None, None, None)
    assert len(snapshots.updates) == 2


def test_the_setting_of_the_least_geometric_mean_is_taken():
    program = {"name": "a", "grid": {"rate": [1, 2]}}
    seconds = {(1, 100): 2.0, (1, 101): 20.0, (2, 100): 8.0, (2, 101): 7.0}  # means 11 and 7.5, geometric 6.3 and 7.5
    runs = {("a", seed, json.dumps({"rate": rate})): {"seconds": s} for (rate, seed), s in seconds.items()}
    runs["b", 100, json.dumps({"rate": 1})] = {"seconds": 0.1}
    found = learning.fastest(program, runs)
    assert found["setting"] == {"rate": 1} and found["seconds"][json.dumps({"rate": 1})] == [2.0, 20.0]


def test_programs_have_grids_of_one_size(tmp_path):
    spec = learning.read_programs(learning.ROOT / "benchmarks" / "learning.yaml")
    assert {len(learning.grid(program)) for program in spec["programs"]} == {6}
    text = (learning.ROOT / "benchmarks" / "learning.yaml").read_text()
    assert "grid: {learning_rate: [" in text
    uneven = tmp_path / "uneven.yaml"
    uneven.write_text(text.replace("grid: {learning_rate: [", "grid: {learning_rate: [1.0, ", 1))
    with pytest.raises(ValueError, match="as many"):
        learning.read_programs(uneven)
