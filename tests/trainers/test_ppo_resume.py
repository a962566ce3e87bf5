"""A resumed run is the uninterrupted one, bit by bit, wherever it was cut; a checkpoint is whole or absent."""

import os
import resource
import signal

import pytest
import torch

from rlhf_ext.models.checkpoints import ASIDE, SEAL, _is_of_disk, check_checkpoint
from tests.trainers.resume_run import (
    assert_same_end,
    build,
    end_of,
    in_a_process,
    prepare,
    train_and_die,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    prepare(folder)
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    """Runs without interruption, by kind."""
    done = {}

    def get(kind):
        if kind not in done:
            trainer = build(folder, kind, folder / kind)
            trainer.train()
            done[kind] = end_of(trainer)
        return done[kind]

    return get


def resumed(folder, kind, checkpoint, output_dir, **config):
    trainer = build(folder, kind, output_dir, **config)
    torch.manual_seed(99)  # nothing may lean on the random numbers of a fresh process
    trainer.train(resume_from_checkpoint=checkpoint)
    return end_of(trainer)


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        ("one_base", 6),
        ("one_base", 12),
        ("one_base", 15),
        ("full", 15),
        ("from_adapter", 9),
        ("shared", 15),
        ("stream", 9),
        *[
            pytest.param(kind, step, marks=pytest.mark.slow)
            for kind in ("one_base", "full")
            for step in (3, 9, 18, 21)
        ],
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(folder, whole, kind, step, tmp_path):
    expected = whole(kind)
    assert_same_end(expected, resumed(folder, kind, str(folder / kind / f"checkpoint-{step}"), tmp_path))


def test_the_runs_do_move(folder, whole):
    weights, logs = whole("one_base")
    before = build(folder, "one_base", folder / "fresh").model.state_dict()
    moved = {name for name in weights if not torch.equal(weights[name], before[name])}
    assert any(".lora_B.default" in name for name in moved) and any("critic_head" in name for name in moved)
    coefs = [entry["kl_coef"] for entry in logs if "kl_coef" in entry]
    assert len(set(coefs)) > 3  # the controller is at work, so losing it would show


@pytest.mark.parametrize(("when", "step"), [("generation", 8), ("update", 10), ("saving", 12)])
def test_a_killed_run_resumes_to_the_same_end(folder, whole, when, step, tmp_path):
    code = in_a_process(train_and_die, folder, "one_base", tmp_path, when, step)
    assert code == -signal.SIGKILL
    if when == "saving":
        assert (tmp_path / ASIDE / "checkpoint-12").is_dir()
    assert not (tmp_path / "checkpoint-12").exists()
    assert_same_end(whole("one_base"), resumed(folder, "one_base", True, tmp_path))
    assert not (tmp_path / ASIDE).exists()


def test_a_full_disk_leaves_the_last_checkpoint_whole(folder, tmp_path):
    def run():
        trainer = build(folder, "full", tmp_path / "run")
        save = trainer._save_optimizer_and_scheduler

        def filled(output_dir):
            # The kernel's own limit on file sizes stands for a disk that has no room for the optimizer's file.
            if trainer.state.global_step == 6:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
            save(output_dir)

        trainer._save_optimizer_and_scheduler = filled
        try:
            trainer.train()
        except RuntimeError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            (tmp_path / "reason").write_text(str(error))
            return
        raise AssertionError("the run went on")

    assert in_a_process(run) == 0
    reason = (tmp_path / "reason").read_text()
    for part in ("checkpoint-6 could not be written", "the last one, checkpoint-3, is whole", "Free space"):
        assert part in reason, reason
    assert not [n for n in os.listdir(tmp_path / "run") if n in ("checkpoint-6", ASIDE)]
    check_checkpoint(tmp_path / "run" / "checkpoint-3")


def test_a_reward_that_raises_half_way_leaves_the_last_checkpoint_whole(folder, tmp_path):
    trainer = build(folder, "full", tmp_path)
    stock, calls = trainer.reward_funcs[0], []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise ConnectionError("the reward server is gone")
        return stock(*args, **kwargs)

    trainer.reward_funcs[0] = failing
    with pytest.raises(ConnectionError, match="the reward server is gone"):
        trainer.train()
    assert trainer.state.global_step == 8
    check_checkpoint(tmp_path / "checkpoint-6")


@pytest.fixture
def two(folder, tmp_path):
    """A run with two checkpoints to be damaged."""
    build(folder, "full", tmp_path, max_steps=6).train()
    return tmp_path


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("optimizer.pt", cut, "is damaged: optimizer.pt has .* bytes instead of"),
        ("critic/model.safetensors", flip, "is damaged: the content of critic/model.safetensors has changed"),
        ("ppo_state_0.pt", os.remove, "is damaged: ppo_state_0.pt is missing"),
        (SEAL, os.remove, f"has no readable {SEAL}"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_an_older_one_used_only_when_asked(folder, two, file, damage, message):
    damage(two / "checkpoint-6" / file)
    for request in (True, str(two / "checkpoint-6")):
        with pytest.raises(ValueError, match=message) as raised:
            build(folder, "full", two).train(resume_from_checkpoint=request)
        assert "checkpoint-6" in str(raised.value)
        assert f"resume_from_checkpoint={str(two / 'checkpoint-3')!r}" in str(raised.value)
    trainer = build(folder, "full", two, max_steps=4)
    trainer.train(resume_from_checkpoint=str(two / "checkpoint-3"))
    assert trainer.state.global_step == 4


def test_a_full_disk_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as raised:
        torch.save(torch.zeros(100_000), "/dev/full")
    assert _is_of_disk(raised.value)
    assert _is_of_disk(OSError(28, "No space left on device")) and not _is_of_disk(KeyError("penalty"))


def test_nothing_to_resume(folder, tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint"):
        build(folder, "full", tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="is no folder.*No older checkpoint"):
        build(folder, "full", tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_iterations", 4),
        ("seed", 1),
        ("per_device_train_batch_size", 4),
        ("temperature", 0.5),
        ("weight_decay", 0.5),
    ],
)
def test_another_shape_of_run_is_refused(folder, two, name, value):
    with pytest.raises(ValueError, match=f"{name}={value}, but .*checkpoint-6.* was written with"):
        build(folder, "full", two, **{name: value}).train(resume_from_checkpoint=True)


def test_another_reward_adapter_is_refused(folder, whole, tmp_path):
    whole("from_adapter")
    trainer = build(folder, "from_adapter", tmp_path)
    with torch.no_grad():
        trainer.roles.base.reward_head.weight.add_(1.0)
    with pytest.raises(ValueError, match="'reward' is not the one in"):
        trainer.train(resume_from_checkpoint=str(folder / "from_adapter" / "checkpoint-6"))


def test_a_later_pass_over_a_stream_is_refused(folder, whole, tmp_path):
    whole("stream")
    with pytest.raises(ValueError, match="later pass over streamed rows"):
        resumed(folder, "stream", str(folder / "stream" / "checkpoint-15"), tmp_path)


def test_another_reference_or_reward_model_is_refused(folder, two):
    """The policy's weights come from the checkpoint, so nothing else would look wrong."""
    for change, message in (
        (lambda t: t.reference.lm_head.weight, "weights of reference="),
        (lambda t: t.reward_funcs[0].reward.model.score.weight, r"weights of reward_funcs\[0\]="),
    ):
        trainer = build(folder, "full", two)
        with torch.no_grad():
            change(trainer).add_(1.0)
        with pytest.raises(ValueError, match=message):
            trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("name", "value"), [("adaptive_kl_target", None), ("critic", "shared"), ("reward_weights", [2.0])]
)
def test_another_kind_of_run_is_refused(folder, whole, tmp_path, name, value):
    whole("one_base")
    changed = {name: value, **({"kl_horizon": 10_000} if name == "adaptive_kl_target" else {})}
    with pytest.raises(ValueError, match=f"{name}=.* was written with"):
        resumed(folder, "one_base", str(folder / "one_base" / "checkpoint-6"), tmp_path, **changed)


def test_two_runs_in_one_folder_are_told_apart(folder, tmp_path):
    build(folder, "full", tmp_path, max_steps=6).train()
    build(folder, "full", tmp_path, max_steps=3).train()
    with pytest.raises(ValueError, match="checkpoint-6 is older than checkpoint-3: two runs"):
        build(folder, "full", tmp_path).train(resume_from_checkpoint=True)


def test_a_checkpoint_that_lacked_its_name_only_is_taken(folder, two):
    """Killed between the two renames: the new one is sealed, the old one of the same step is aside."""
    os.makedirs(two / ASIDE)
    os.rename(two / "checkpoint-6", two / ASIDE / "checkpoint-6")
    trainer = build(folder, "full", two, max_steps=7)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 7
    check_checkpoint(two / "checkpoint-6")
    assert not (two / ASIDE).exists()


def test_a_second_run_starts_on_a_rollout_of_its_own(folder, tmp_path):
    trainer = build(folder, "full", tmp_path, max_steps=2, save_strategy="no")
    trainer.train()
    calls, stock = [], trainer.reward_funcs[0]
    trainer.reward_funcs[0] = lambda *args, **kwargs: calls.append(1) or stock(*args, **kwargs)
    trainer.reward_funcs[0].__name__ = "counted"
    trainer.train()
    assert len(calls) == 1


def test_checkpoints_without_what_resuming_needs_say_so(folder, tmp_path):
    build(folder, "full", tmp_path, max_steps=3, save_only_model=True).train()
    with pytest.raises(ValueError, match="save_only_model"):
        build(folder, "full", tmp_path).train(resume_from_checkpoint=True)


def test_old_checkpoints_are_deleted_in_order(folder, tmp_path):
    build(folder, "full", tmp_path, max_steps=9, save_total_limit=2).train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-9"]
