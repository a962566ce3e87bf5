"""Controllers that move a KL coefficient towards a target: Ziegler's proportional rule and the PPO paper's rule.

Plain Python numbers, so that a trainer can log and checkpoint them. The unit of the KL differs; each class states its
own.
"""

import math
from collections.abc import Mapping

import torch

from . import _checks as checks


def _measured(kl: float | torch.Tensor) -> float:
    value = float(kl)
    # A clip would turn NaN or inf into an ordinary step, and the run would go on with a meaningless coefficient.
    if not math.isfinite(value):
        raise ValueError(f"`kl` is {value}: look for NaN or inf in the log-probabilities of real tokens.")
    return value


def _restored(name: str, state: Mapping[str, float]) -> float:
    if name not in state:
        raise ValueError(f"`state` has the keys {sorted(state)}, not '{name}': load the state of the same controller.")
    checks.check_scalar(name, state[name], above=0.0)
    return float(state[name])


class AdaptiveKLController:
    """Move the weight of the KL in the reward so that the policy keeps a set distance from its reference.

    e = clip(KL / target - 1, -0.2, 0.2);   kl_coef <- kl_coef (1 + e num_sequences / horizon)

    Ziegler et al. 2019, Sec. 2.2, in the form of the released code; the paper's gain K = 0.1 is num_sequences /
    horizon. Also the controller of Ramamurthy et al. 2023, but they feed KL per token: choose the target to match.

    **Unit**: `kl` is the mean over sequences of the log-ratio *summed* over the sequence, in nats, from the rollout,
    always by k1, not multiplied by `kl_coef`. A target of 6 means 6 nats per completion.

    Args:
        kl_coef (`float`):
            Coefficient to start from, above 0: the rule multiplies, so 0 would stay 0.
        target (`float`):
            Wanted KL, in nats per sequence, above 0.
        horizon (`float`):
            Number of sequences after which an error at the clip has moved the coefficient by about 20%. Above 0
            (10,000 in the released code).

    Attributes:
        kl_coef (`float`): The coefficient of the next rollout.

    Raises:
        ValueError: If an argument is not finite and positive.
    """

    def __init__(self, kl_coef: float, *, target: float, horizon: float) -> None:
        checks.check_scalar("kl_coef", kl_coef, above=0.0)
        checks.check_scalar("target", target, above=0.0)
        checks.check_scalar("horizon", horizon, above=0.0)
        self.kl_coef = float(kl_coef)
        self.target = float(target)
        self.horizon = float(horizon)

    def update(self, kl: float | torch.Tensor, num_sequences: int) -> float:
        """Take the KL of one rollout into account.

        Args:
            kl (`float` or 0-d `torch.Tensor`):
                Nats summed per sequence, mean over sequences. A sampled mean may be negative.
            num_sequences (`int`):
                Sequences of the rollout, of all processes. Positive and below 5 `horizon`, where the factor would pass
                0.

        Returns:
            `float`: The new coefficient.

        Raises:
            ValueError: If `kl` is not finite or `num_sequences` leaves its range.
        """
        checks.check_scalar("num_sequences", num_sequences, above=0.0, below=5 * self.horizon)
        error = min(max(_measured(kl) / self.target - 1.0, -0.2), 0.2)
        self.kl_coef *= 1.0 + error * num_sequences / self.horizon
        return self.kl_coef

    def state_dict(self) -> dict[str, float]:
        """What must be saved to go on: the coefficient. Target and horizon belong to the configuration."""
        return {"kl_coef": self.kl_coef}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take up the coefficient of `state_dict()`; ValueError if it is missing or not positive."""
        self.kl_coef = _restored("kl_coef", state)


class AdaptivePenaltyController:
    """Halve or double the penalty of PPO-Penalty when an update moved the policy too little or too far.

    d < target / 1.5: penalty_coef <- penalty_coef / 2;   d > 1.5 target: penalty_coef <- 2 penalty_coef

    Schulman et al. 2017, Sec. 4. The new coefficient is for the next update.

    **Unit**: `kl` is KL(old || new) in nats per *token* (the mean of `exact_kl` over real tokens), measured after the
    update. The paper's targets are .003 to .03.

    Args:
        penalty_coef (`float`):
            Coefficient to start from, above 0.
        target (`float`):
            Wanted KL of one update, in nats per token, above 0.

    Attributes:
        penalty_coef (`float`): The coefficient of the next update.

    Raises:
        ValueError: If an argument is not finite and positive.
    """

    def __init__(self, penalty_coef: float, *, target: float) -> None:
        checks.check_scalar("penalty_coef", penalty_coef, above=0.0)
        checks.check_scalar("target", target, above=0.0)
        self.penalty_coef = float(penalty_coef)
        self.target = float(target)

    def update(self, kl: float | torch.Tensor) -> float:
        """Take the KL of one update, nats per token, into account and return the new coefficient.

        Raises:
            ValueError: If `kl` is not finite.
        """
        measured = _measured(kl)
        if measured < self.target / 1.5:
            self.penalty_coef /= 2.0
        elif measured > self.target * 1.5:
            self.penalty_coef *= 2.0
        return self.penalty_coef

    def state_dict(self) -> dict[str, float]:
        """What must be saved to go on: the coefficient. The target belongs to the configuration."""
        return {"penalty_coef": self.penalty_coef}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take up the coefficient of `state_dict()`; ValueError if it is missing or not positive."""
        self.penalty_coef = _restored("penalty_coef", state)
