"""Returns and advantages of completions.

Shapes: B batch, T completion tokens, N completions. Mask: True = a real completion token. Time: the reward at column t
is paid for token t; the value at column t is V(prompt + tokens before t), read by the critic at position t - 1.
"""

import torch

from . import _checks as checks


@torch.no_grad()
def discounted_returns(rewards: torch.Tensor, mask: torch.Tensor, *, gamma: float) -> torch.Tensor:
    """Reward-to-go of every token.

    R_t = sum_{t' >= t} gamma^(t' - t) r_{t'}

    Williams 1992 with the rewards before t left out, which keeps the gradient unbiased (Sutton et al. 1999,
    where R_t is one sample of Q). It equals `compute_gae(...)[1]` at `gae_lambda=1`. The notes print t' > t and r_t.

    Args:
        rewards (`torch.Tensor`):
            Shape `(B, T)`, paid for token t. Masked positions may hold NaN.
        mask (`torch.Tensor`):
            Bool `(B, T)`. Masked positions are skipped: gamma counts real tokens only.
        gamma (`float`):
            Discount per token, in [0, 1].

    Returns:
        `torch.Tensor`: Shape `(B, T)`, float32 or better; 0 at masked positions. No gradient.

    Raises:
        ValueError: If shapes differ, a dtype is wrong or `gamma` leaves [0, 1].
    """
    checks.check_masked(mask, rewards=rewards)
    checks.check_scalar("gamma", gamma, minimum=0.0, maximum=1.0)
    rewards = checks.clear(rewards, mask)
    returns = torch.zeros_like(rewards)
    running = rewards.new_zeros(rewards.shape[0])
    for t in reversed(range(rewards.shape[1])):
        real = mask[:, t]
        running = torch.where(real, rewards[:, t] + gamma * running, running)
        returns[:, t] = torch.where(real, running, 0.0)
    return returns


@torch.no_grad()
def compute_gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    *,
    gamma: float,
    gae_lambda: float,
    bootstrap_values: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalized advantage estimates, and the returns the critic is fitted to.

    delta_t = r_t + gamma V_{t+1} - V_t
    A_t = sum_l (gamma lambda)^l delta_{t+l} = delta_t + gamma lambda A_{t+1}
    return_t = A_t + V_t

    Schulman et al. 2016, Eq. 16. `gae_lambda=0` is the TD error, `gae_lambda=1` is the
    reward-to-go minus V. Returns are fixed here, before any whitening of the advantages (Ziegler et al. 2019).

    Beyond the last real token V = 0, since a completion is one episode (Ziegler et al. 2019, Stiennon et al. 2020; the
    paper leaves ends out), unless `bootstrap_values` says what a completion that was cut by length is still worth. An
    episode that ends inside a row must be split into two rows.

    Args:
        rewards (`torch.Tensor`):
            Shape `(B, T)`, paid for token t. Masked positions may hold NaN.
        values (`torch.Tensor`):
            Shape `(B, T)`, V before token t. Masked positions may hold NaN.
        mask (`torch.Tensor`):
            Bool `(B, T)`. Rows are right-padded; a masked position inside a row (a tool's token) is skipped: the next
            real token is the successor, one discount step away.
        gamma (`float`):
            Discount per token, in [0, 1].
        gae_lambda (`float`):
            In [0, 1]; 0 leans on the critic (bias), 1 on the sampled rewards (variance).
        bootstrap_values (`torch.Tensor`, *optional*):
            Shape `(B,)`, V after the last real token. Give 0 for completions that ended by themselves.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: advantages and returns, `(B, T)`, float32 or better, 0 at masked
        positions. No gradient.

    Raises:
        ValueError: If shapes differ, a dtype is wrong or a scalar leaves [0, 1].
    """
    checks.check_masked(mask, rewards=rewards, values=values)
    checks.check_scalar("gamma", gamma, minimum=0.0, maximum=1.0)
    checks.check_scalar("gae_lambda", gae_lambda, minimum=0.0, maximum=1.0)
    batch_size, length = mask.shape
    if bootstrap_values is not None:
        checks.check_tensor("bootstrap_values", bootstrap_values, (batch_size,))
    dtype = torch.promote_types(checks.upcast(rewards).dtype, checks.upcast(values).dtype)
    rewards = checks.clear(rewards, mask).to(dtype)
    values = checks.clear(values, mask).to(dtype)

    advantages = torch.zeros_like(rewards)
    next_advantage = rewards.new_zeros(batch_size)
    next_value = next_advantage if bootstrap_values is None else bootstrap_values.to(dtype)
    for t in reversed(range(length)):
        real = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * gae_lambda * next_advantage
        # A masked column changes neither carry, so its neighbours meet each other.
        next_advantage = torch.where(real, advantage, next_advantage)
        next_value = torch.where(real, values[:, t], next_value)
        advantages[:, t] = torch.where(real, advantage, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


@torch.no_grad()
def leave_one_out_advantages(returns: torch.Tensor, *, group_size: int) -> torch.Tensor:
    """Each completion against the mean of the other completions of its prompt.

    A_i = G_i - 1/(k-1) sum_{j != i} G_j = k/(k-1) (G_i - mean_j G_j)

    Ahmadian et al. 2024 (RLOO); the baseline does not depend on completion i, so REINFORCE stays unbiased
    (Williams 1992).

    Args:
        returns (`torch.Tensor`):
            Shape `(N,)`: score minus `kl_coef` times the KL summed over the completion. The completions of one prompt
            stand next to each other.
        group_size (`int`):
            k, completions per prompt, at least 2: with one there is no other, and every advantage would be 0.

    Returns:
        `torch.Tensor`: Shape `(N,)`, float32 or better. No gradient.

    Raises:
        ValueError: If `returns` is not `(N,)` floating, `group_size` is below 2 or does not divide N.
    """
    checks.check_tensor("returns", returns)
    if returns.dim() != 1:
        raise ValueError(f"`returns` has shape {tuple(returns.shape)}, expected (N,): pass one number per completion.")
    checks.check_scalar("group_size", group_size, minimum=2)
    if returns.shape[0] % group_size != 0:
        raise ValueError(
            f"`group_size` is {group_size}, which does not divide the {returns.shape[0]} returns: pass whole groups."
        )
    groups = checks.upcast(returns).view(-1, group_size)
    baseline = (groups.sum(dim=1, keepdim=True) - groups) / (group_size - 1)
    return (groups - baseline).flatten()


@torch.no_grad()
def baseline_advantages(returns: torch.Tensor, baseline: torch.Tensor | None, mask: torch.Tensor) -> torch.Tensor:
    """Reward-to-go against a baseline: A_t = G_t - b_t.

    Williams 1992; with the critic's value as b_t it is actor-critic with Monte-Carlo returns (Sutton et al. 1999).

    Args:
        returns (`torch.Tensor`):
            Shape `(B, T)`, G_t from token t on. Masked positions may hold NaN.
        baseline (`torch.Tensor`, *optional*):
            Shape `(B, T)`, b_t known before token t is drawn, such as V(s_t). None: no baseline.
        mask (`torch.Tensor`):
            Bool `(B, T)`.

    Returns:
        `torch.Tensor`: Shape `(B, T)`, float32 or better; 0 at masked positions. No gradient.

    Raises:
        ValueError: If shapes differ or a dtype is wrong.
    """
    checks.check_masked(mask, returns=returns)
    if baseline is None:
        return checks.clear(returns, mask)
    checks.check_masked(mask, baseline=baseline)
    return checks.clear(returns, mask) - checks.clear(baseline, mask)
