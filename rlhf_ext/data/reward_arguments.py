"""The flags by which the reward recipe says what is done around one training."""

from dataclasses import dataclass, field

from .arguments import DataArguments


@dataclass
class RewardArguments(DataArguments):
    """
    Which rows the reward recipe trains on, how many models, and in which unit they score.

    Parameters:
        num_members (`int`, *optional*, defaults to 1):
            Members of an ensemble (Christiano et al. 2017), each on its own bootstrap of the prompts. 1: no ensemble.
        num_seeds (`int`, *optional*, defaults to 1):
            Seeds to train with; the best on the validation rows is kept (Stiennon et al. 2020).
        keep_seeds (`bool`, *optional*, defaults to `False`):
            Keep the weights of the other seeds too.
        normalize_prompts (`str`, *optional*):
            Data set of `prompt`, on which the reference is sampled, or of `prompt` and `completion`, which are
            reference answers. Scores are put in their unit.
        reference_model_path (`str`, *optional*):
            The fixed reference (SFT) policy; not read where `normalize_prompts` has answers.
        normalize_shift_only (`bool`, *optional*, defaults to `False`):
            Put the mean at 0 and leave the spread as it is (Stiennon et al. 2020); else the deviation becomes 1 too
            (Ziegler et al. 2019).
        normalize_max_length (`int`, *optional*, defaults to 64):
            Longest sample of the reference, in tokens; take the one of PPO.
        normalize_temperature (`float`, *optional*, defaults to 1.0):
            Temperature of the samples; take the one of PPO.
    """

    num_members: int = field(
        default=1,
        metadata={"help": "Members of an ensemble, each on its own bootstrap of the prompts. 1: no ensemble."},
    )
    num_seeds: int = field(
        default=1, metadata={"help": "Seeds to train with; the best on the validation rows is kept."}
    )
    keep_seeds: bool = field(default=False, metadata={"help": "Keep the weights of the other seeds too."})
    normalize_prompts: str | None = field(
        default=None,
        metadata={
            "help": "Data set of `prompt`, on which the reference is sampled, or of `prompt` and `completion`, which "
            "are reference answers. Scores are put in their unit."
        },
    )
    reference_model_path: str | None = field(
        default=None,
        metadata={"help": "The fixed reference (SFT) policy; not read where `normalize_prompts` has answers."},
    )
    normalize_shift_only: bool = field(
        default=False, metadata={"help": "Put the mean at 0 and leave the spread as it is."}
    )
    normalize_max_length: int = field(
        default=64, metadata={"help": "Longest sample of the reference, in tokens; take the one of PPO."}
    )
    normalize_temperature: float = field(
        default=1.0, metadata={"help": "Temperature of the samples; take the one of PPO."}
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_members", "num_seeds", "normalize_max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; give 1 or more.")
        if self.num_members > 1 and self.num_seeds > 1:
            raise ValueError(
                f"`num_members` is {self.num_members} and `num_seeds` is {self.num_seeds}, but members of an ensemble "
                "are validated each on other rows, so that none is the best. Set one of them to 1."
            )
        if self.normalize_prompts is None:
            idle = {"reference_model_path": None, "normalize_shift_only": False, "normalize_max_length": 64}
            idle["normalize_temperature"] = 1.0
            if self.num_members > 1:  # its members are normalised over their validation rows
                del idle["normalize_shift_only"]
            for name, default in idle.items():
                if getattr(self, name) != default:
                    raise ValueError(
                        f"`{name}` is {getattr(self, name)!r}, but `normalize_prompts` is empty, so nothing reads it. "
                        "Give the prompts, or leave it out."
                    )
        if self.keep_seeds and self.num_seeds == 1:
            raise ValueError("`keep_seeds` is set, but `num_seeds` is 1. Leave it out.")
