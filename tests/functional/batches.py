"""Random ragged batches in float64, and what the tests of several files do with them."""

import torch


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


def ragged_mask(batch_size=5, length=7, seed=0, holes=False):
    """Right-padded rows: one empty, one full, the others in between; with holes, some interior tokens are masked."""
    lengths = torch.randint(1, length, (batch_size,), generator=generator(seed))
    lengths[0], lengths[1] = 0, length
    mask = torch.arange(length) < lengths.unsqueeze(1)
    if holes:
        mask = mask & (torch.rand(batch_size, length, generator=generator(seed + 100)) > 0.3)
    return mask


def dirty(x, mask, fill=float("nan")):
    """`x` with garbage at masked positions."""
    return torch.where(mask, x, fill)


def poison(x, mask):
    """`x` with NaN and +-inf by turns at masked positions."""
    garbage = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=x.dtype)
    garbage = garbage[torch.arange(x.numel()) % 3].view(x.shape)
    return torch.where(mask, x, garbage)


def widen(x, columns=3):
    """`x` with extra columns: NaN, or False for a mask."""
    value = False if x.dtype == torch.bool else float("nan")
    return torch.nn.functional.pad(x, (0, columns), value=value)


def log_probs(*shape, seed=0):
    return -normal(*shape, seed=seed).abs()


def preference_batch(n=8, k=4, seed=0, ragged=False, soft=True):
    rewards = normal(n, k, seed=seed) * 2
    mask = torch.ones(n, k, dtype=torch.bool)
    if ragged:
        mask = torch.arange(k) < torch.randint(2, k + 1, (n, 1), generator=generator(seed + 1))
    weights = torch.where(mask, normal(n, k, seed=seed + 2).exp(), 0.0)
    targets = weights / weights.sum(1, keepdim=True)
    if not soft:
        targets = torch.nn.functional.one_hot(targets.argmax(1), k).double()
    return rewards, targets, mask
