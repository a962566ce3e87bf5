"""Configuration of [`PreferenceRewardTrainer`]."""

import math
from dataclasses import dataclass, field

from trl import RewardConfig

from ..models.pooling import AGGREGATIONS
from .hub import refuse_stored_token


@dataclass
class PreferenceRewardConfig(RewardConfig):
    r"""
    Configuration class for the [`PreferenceRewardTrainer`].

    Only the parameters that [`~trl.RewardConfig`] does not have are listed; the others keep their meaning and their
    defaults, but for `ddp_find_unused_parameters=False`. `center_rewards_coefficient` and a `margin` column work with
    two completions per row, as in TRL, and are refused with more.

    Parameters:
        > Parameters that control the reward

        reward_aggregation (`str`, *optional*, defaults to `"last"`):
            How a completion gets its number. `"last"`: the score at the last real token (Ziegler et al. 2019).
            `"sum"`: the sum of the scores over the completion's tokens (Christiano et al. 2017).

        > Parameters that control the loss

        preference_coef (`float`, *optional*, defaults to `1.0`):
            Weight of the preference loss (gamma in Askell et al. 2021).
        lm_coef (`float`, *optional*, defaults to `0.0`):
            Weight of the language-modelling term (beta in Askell et al. 2021): the negative log-likelihood of the
            preferred completion under the language-modelling head of the checkpoint, which shares the whole trunk.
            Rows with ties or soft targets have no preferred completion and add 0. Needs a checkpoint with such a head
            (the SFT model, by its name), or tied embeddings. Saved with the model: the same folder loads as a causal
            language model; with adapters, the folder `lm` inside.
        lm_reduction (`str`, *optional*, defaults to `"sum"`):
            How the language-modelling term adds up a completion's tokens, `"sum"` or `"mean"`; the mean over rows is
            taken of that. Anything but the default is refused while `lm_coef` is 0.
        prediction_noise (`float`, *optional*, defaults to `0.0`):
            Chance that the labeller answers at random; Christiano et al. 2017 use 0.1.

        > Parameters that control the data preprocessing

        overlong (`str`, *optional*, defaults to `"raise"`):
            What to do with rows longer than `max_length`. They are dropped and counted; `"raise"` refuses a dataset in
            which they are more than 1%% of the rows, `"drop"` does not.
    """

    # Parameters with another default than the parent's
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every parameter takes part, so DDP need not search for those that do not."}
    )

    # Parameters that control the reward
    reward_aggregation: str = field(
        default="last",
        metadata={
            "help": "How a completion gets its number. 'last': the score at the last real token (Ziegler et al. "
            "2019). 'sum': the sum of the scores over the completion's tokens (Christiano et al. 2017).",
            "choices": list(AGGREGATIONS),
        },
    )

    # Parameters that control the loss
    preference_coef: float = field(
        default=1.0,
        metadata={"help": "Weight of the preference loss (gamma in Askell et al. 2021)."},
    )
    lm_coef: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the language-modelling term (beta in Askell et al. 2021): the negative "
            "log-likelihood of the preferred completion under the kept language-modelling head."
        },
    )
    lm_reduction: str = field(
        default="sum",
        metadata={
            "help": "How the language-modelling term adds up a completion's tokens, 'sum' or 'mean'. Anything but "
            "the default is refused while `lm_coef` is 0.",
            "choices": ["sum", "mean"],
        },
    )
    prediction_noise: float = field(
        default=0.0,
        metadata={"help": "Chance that the labeller answers at random; Christiano et al. 2017 use 0.1."},
    )

    # Parameters that control the data preprocessing
    overlong: str = field(
        default="raise",
        metadata={
            "help": "What to do with rows longer than `max_length`. They are dropped and counted; 'raise' refuses a "
            "dataset in which they are more than 1%% of the rows, 'drop' does not.",
            "choices": ["raise", "drop"],
        },
    )

    def __post_init__(self):
        super().__post_init__()
        refuse_stored_token(self.hub_token)
        if self.reward_aggregation not in AGGREGATIONS:
            raise ValueError(
                f"`reward_aggregation` is {self.reward_aggregation!r}; choose one of {list(AGGREGATIONS)}."
            )
        if self.overlong not in ("raise", "drop"):
            raise ValueError(f"`overlong` is {self.overlong!r}; choose 'raise' or 'drop'.")
        if not self.preference_coef > 0.0:
            raise ValueError(f"`preference_coef` is {self.preference_coef}; choose a number above 0.")
        if not 0.0 <= self.prediction_noise < 1.0:
            raise ValueError(f"`prediction_noise` is {self.prediction_noise}; choose a number from 0 to below 1.")
        if not 0.0 <= self.lm_coef < math.inf:
            raise ValueError(f"`lm_coef` is {self.lm_coef}; choose a number from 0 up: below 0 it would unlearn.")
        if self.lm_reduction not in ("sum", "mean"):
            raise ValueError(f"`lm_reduction` is {self.lm_reduction!r}; choose 'sum' or 'mean'.")
        if self.lm_coef == 0.0 and self.lm_reduction != "sum":
            raise ValueError(
                f"`lm_reduction` is {self.lm_reduction!r}, but `lm_coef` is 0.0, so nothing reads it. Set `lm_coef`."
            )
        for name in ("bf16_full_eval", "fp16_full_eval"):
            if getattr(self, name):
                raise ValueError(
                    f"`{name}` is True, but an evaluation would round what trains, for good. Leave it out."
                )
        if self.label_smoothing_factor != 0.0:
            raise ValueError(
                f"`label_smoothing_factor` is {self.label_smoothing_factor}, but the loss does not read it. Use "
                "`prediction_noise`, or soft labels in `target`."
            )
