"""What PPO would refuse after the steps before it, refused before the first one."""

from transformers import AutoConfig
from trl import ModelConfig


def check_policy_dtype(model_args: ModelConfig, trust_remote_code: bool = False) -> None:
    """
    Refuse a policy that PPO would refuse after the steps before it.

    Raises:
        ValueError: `dtype` has 16 bits, and the whole policy is to train.
    """
    dtype = model_args.dtype or "float32"
    if dtype == "auto":
        path, revision = model_args.model_name_or_path, model_args.model_revision
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
        dtype = str(config.dtype or "float32").removeprefix("torch.")
    if dtype in ("bfloat16", "float16") and not model_args.use_peft:
        raise ValueError(
            f"`dtype` is {model_args.dtype!r} ({dtype}), and without `use_peft` the whole policy trains in it: "
            "updates at the learning rates of RLHF round to nothing. Set it to float32, or use adapters."
        )
