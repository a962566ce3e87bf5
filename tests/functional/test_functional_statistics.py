"""Logged numbers do not see padding (pitfall S24)."""

import torch

from rlhf_ext.functional.statistics import explained_variance, ratio_statistics, rollout_statistics


def padded(x):
    return torch.cat([x, torch.full((len(x), 3), float("nan"))], dim=1)


def test_ratio_extremes_are_those_of_real_tokens():
    logps, old = torch.tensor([[0.2, 0.4], [0.1, 0.3]]), torch.zeros(2, 2)
    mask = torch.tensor([[True, True], [True, False]])
    found = ratio_statistics(logps, old, mask)
    torch.testing.assert_close(found["policy/ratio_min"], torch.tensor(0.1).exp())
    torch.testing.assert_close(found["policy/ratio_max"], torch.tensor(0.4).exp())
    wide = torch.cat([mask, torch.zeros(2, 3, dtype=torch.bool)], dim=1)
    for name, value in ratio_statistics(padded(logps), padded(old), wide).items():
        torch.testing.assert_close(value, found[name])
    assert ratio_statistics(logps, old, torch.zeros_like(mask))["policy/ratio_max"] == 1


def test_rollout_statistics_by_hand():
    mask = torch.tensor([[True, True], [True, False]])
    kl, rewards = torch.tensor([[0.5, 0.1], [0.2, 9.0]]), torch.tensor([[1.0, 2.0], [4.0, 9.0]])
    values, returns = torch.tensor([[1.0, 2.0], [3.0, 9.0]]), torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    found = rollout_statistics(torch.tensor([1.0, 2.0]), kl, rewards, rewards, mask, values, returns)
    torch.testing.assert_close(found["kl"], torch.tensor(0.4))
    torch.testing.assert_close(found["rlhf_reward"], torch.tensor(3.5))
    assert found["value/explained_variance"] == 1
    assert explained_variance(values, torch.ones(2, 2), mask) == 0
