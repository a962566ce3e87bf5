"""Two processes on the CPU do what one does on the same batch: gloo DDP and ZeRO-3, started as users start them.

One launch runs several cases, because a process spends its time on imports. `test_matrix.py` has the rest.
"""

import pytest
import torch

from tests.distributed import worker
from tests.distributed.launcher import agree, compare, launch, read, reload


PINNED = ["ppo-lora", "ppo-lora-ckpt", "reward-full", "reward-full-lm"]
RESTING = "ppo-lora-rest-adamw"  # the critic, in the second epoch; DeepSpeed refuses it
UPPER = "ppo-lora-upper"  # the layers below the adapters run once per rollout; off where weights are in pieces
SAMPLED = ["ppo-lora-sampled", "ppo-lora-sampled-stop"]
KINDS = ["ddp", "zero3"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of what one process and two left, by kind of launch."""
    folder = tmp_path_factory.mktemp("runs")
    world = worker.build_world(folder / "world")
    worker.main(["--world", str(world), "--output", str(folder / "one"), "--cases", *PINNED, RESTING, UPPER])
    for kind in KINDS:
        launch(kind, world, folder / kind, [*PINNED, RESTING, UPPER, *SAMPLED] if kind == "ddp" else PINNED)
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", PINNED)
def test_gradients_and_weights_are_those_of_one_process(runs, kind, case):
    apart = compare(read(runs / "one", case), read(runs / kind, case))
    assert apart["moved"] > 1e-2, "weights that stand still prove nothing"
    assert apart["gradients"] < 1e-6
    assert apart["weights"] < 1e-5


def test_a_resting_critic_stands_still(runs):
    """DDP wants gradients of it, and AdamW would move it by what it remembers."""
    apart = compare(read(runs / "one", RESTING), read(runs / "ddp", RESTING))
    assert apart["moved"] > 1e-3
    assert apart["weights"] < 1e-5


def test_each_process_replays_its_share_of_the_frozen_layers(runs):
    one, two = (read(runs / kind, UPPER) for kind in ("one", "ddp"))
    assert one["replayed"] == 2 * two["replayed"] > 0
    apart = compare(one, two)
    assert apart["moved"] > 1e-2 and apart["gradients"] < 1e-6 and apart["weights"] < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", PINNED)
def test_both_processes_end_with_the_same_weights(runs, kind, case):
    first, second = (read(runs / kind, case, rank)["weights"] for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_zero3_cuts_every_tensor(runs):
    """By default it leaves small ones whole, and the models of these tests have no others."""
    result = read(runs / "zero3", "ppo-lora")
    assert result["pieces"] > len(result["weights"])


@pytest.mark.parametrize("kind", ["one", *KINDS])
def test_saved_roles_say_what_they_said(runs, kind):
    """ZeRO-3 leaves frozen weights out of what it saves; an empty adapter would load without a word."""
    result = read(runs / kind, "ppo-lora")
    saved = reload(runs / kind / "ppo-lora" / "saved")
    assert saved.keys() == {"policy", "critic", "reward"}
    for role, numbers in saved.items():
        torch.testing.assert_close(numbers, result[role], atol=1e-5, rtol=0, msg=role)
    torch.testing.assert_close(saved["reward"], reload(runs / "world")["reward"], atol=1e-5, rtol=0)


def test_sampled_rollouts_share_their_numbers_and_not_their_samples(runs):
    agree(*(read(runs / "ddp", "ppo-lora-sampled", rank)["seen"] for rank in (0, 1)))


def test_processes_stop_together_between_their_own_kls(runs):
    first, second = (read(runs / "ddp", "ppo-lora-sampled-stop", rank) for rank in (0, 1))
    assert first["seen"]["stopped"] == second["seen"]["stopped"] == [False, True, False]
    low, high = sorted(first["seen"]["own_kl"][1])
    assert high - low > 1e-3 * high > 0, "one KL on both would prove nothing"
    assert all(torch.equal(first["weights"][name], tensor) for name, tensor in second["weights"].items())
