"""The policies of a run by their names: `sft`, `round_1`, `round_2`, ..."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import PartialState
from peft import PeftModel
from torch import nn
from transformers import AutoConfig
from trl import get_quantization_config

from ..models.build import load_policy
from ..models.hub import check_safetensors, find_file
from ..models.roles import POLICY, RoleSwitch
from .loop_run import SFT, LoopRun


class Policies:
    """
    Loads policies one at a time, or, where they are adapters, all on one base that is loaded once.

    Args:
        run ([`LoopRun`]): the run whose policies they are.
    """

    def __init__(self, run: LoopRun):
        self.run = run
        self._base: nn.Module | None = None
        self._first: str | None = None

    @contextmanager
    def use(self, name: str) -> Iterator[nn.Module]:
        """The policy in evaluation mode, for as long as the block lasts."""
        if not self.run.model_args.use_peft:
            yield self._load(self.folder(name)).eval()
            return
        if self._base is None:
            self._base = self._load(self.folder(SFT))
        if name == SFT and not isinstance(self._base, PeftModel):
            yield self._base.eval()
            return
        if name != SFT:
            self._add(name)
        with RoleSwitch(self._base).use(None if name == SFT else self._adapter(name)):
            yield self._base.eval()

    def reference(self) -> nn.Module:
        """The SFT policy beside the one in use: a model of its own, or the same base without adapters."""
        if not self.run.model_args.use_peft:
            return self._load(self.folder(SFT)).eval()
        assert self._base is not None
        return _Bare(self._base).eval()

    def folder(self, name: str) -> str:
        """Where a policy stands."""
        if name == SFT:
            return self.run.model_args.model_name_or_path
        return str(self.run.folder / name / "policy")

    def _adapter(self, name: str) -> str:
        return POLICY if name == self._first else name

    def _add(self, name: str) -> None:
        folder = self.folder(name)
        if not isinstance(self._base, PeftModel):
            self._base, self._first = PeftModel.from_pretrained(self._base, folder, adapter_name=POLICY), name
        elif self._adapter(name) not in self._base.peft_config:
            self._base.load_adapter(folder, adapter_name=name, is_trainable=False)

    def _load(self, folder: str) -> nn.Module:
        return load_policy(folder, **loading(self.run)).to(PartialState().device)


class _Bare(nn.Module):
    """A model with adapters as it is without them, whatever is switched on around the call."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.switch = model, RoleSwitch(model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.switch.use(None):
            return self.model(*args, **kwargs)


def loading(run: LoopRun) -> dict[str, Any]:
    """How the base of a run is loaded."""
    model_args = run.model_args
    options = {
        "dtype": model_args.dtype or "float32",
        "attn_implementation": model_args.attn_implementation,
        "trust_remote_code": run.args.trust_remote_code,
    }
    if (quantization := get_quantization_config(model_args)) is not None:
        options["quantization_config"] = quantization
    if model_args.model_revision not in (None, "main"):
        options["revision"] = model_args.model_revision
    return {name: value for name, value in options.items() if value is not None}


def check_base(run: LoopRun) -> int | None:
    """
    Refuse an SFT policy that the loop cannot start from.

    Returns:
        `int` or `None`: its context in tokens, where it says.

    Raises:
        ValueError: it is an adapter, cannot be read, or has its weights in no safetensors file.
    """
    name, revision = run.model_args.model_name_or_path, run.model_args.model_revision
    if not name:
        raise ValueError("`model_name_or_path` is empty. Name the SFT policy, a folder or Hub id.")
    if find_file(name, "adapter_config.json", revision) is not None:
        raise ValueError(
            f"`model_name_or_path` {name!r} is an adapter, and the loop puts its own on a base. Merge it first: "
            f"`rlhf-ext merge --adapter {name} --output_dir FOLDER`."
        )
    try:
        trust = run.args.trust_remote_code
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust)
    except OSError as error:
        raise ValueError(f"`model_name_or_path` is {name!r}, which cannot be read: {error}") from error
    check_safetensors(name, "model_name_or_path", revision)
    return getattr(config.get_text_config(), "max_position_embeddings", None)
