"""A saved reward ensemble as rewards: mean as score, spread as doubt, on one base loaded once.

A folder with `ensemble.json` and one ordinary reward model or adapter per member (`rlhf_ext.pipelines.reward_ensemble`
writes it). Adapters share the base: the member of a forward is chosen by [`~rlhf_ext.models.roles.RoleSwitch`], which
touches no `requires_grad`.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..functional.scores import as_scores, preference_variance
from .base_quantization import QUANTIZATION_FILE, read_base_quantization
from .pooling import normalization_of, set_normalization
from .reward_checkpoints import load_reward_model, saved_aggregation, saved_noise, saved_normalization
from .reward_functions import ModelReward, Text
from .roles import POLICY, RoleSwitch
from .score_wrappers import EnsembleMean, EnsembleSpread


ENSEMBLE_FILE = "ensemble.json"
"""Names the members' folders, in order, and the unit in which each was trained."""


class MemberReward(ModelReward):
    """One member as a reward function: its adapter on the shared base, its own gain and bias.

    Args:
        model (`nn.Module`): the model that holds the member, and perhaps others.
        switch ([`~rlhf_ext.models.roles.RoleSwitch`]): the switch of `model`.
        adapter (`str`): adapter of the member; without effect on a model that has none.
        normalization (`tuple[float, float]`, *optional*): gain and bias of its scores.
        training_gain (`float`, *optional*, defaults to 1.0): gain of its scores in training.
        prediction_noise (`float`, *optional*, defaults to 0.0): share of random answers that its loss allowed for.
        args, kwargs: as for [`ModelReward`].
    """

    def __init__(
        self,
        model: nn.Module,
        *args: Any,
        switch: RoleSwitch,
        adapter: str,
        normalization: tuple[float, float] | None = None,
        training_gain: float = 1.0,
        prediction_noise: float = 0.0,
        **kwargs: Any,
    ):
        super().__init__(model, *args, **kwargs)
        self.switch, self.adapter = switch, adapter
        self.normalization, self.training_gain = normalization, training_gain
        self.prediction_noise = prediction_noise

    @property
    def is_normalized(self) -> bool:
        return self.normalization is not None

    @property
    def log_odds(self) -> tuple[float, float]:
        return self.training_gain / (self.normalization or (1.0, 0.0))[0], self.prediction_noise

    def _score(self, rows: list[list[int]], completion_lengths: list[int]) -> torch.Tensor:
        gain, bias = self.normalization or (1.0, 0.0)
        with self.switch.use(self.adapter):
            return super()._score(rows, completion_lengths) * gain + bias


class RewardEnsemble:
    """
    Members of an ensemble and what they say together.

    Args:
        members (`list[MemberReward]`): at least two.
        name (`str`, *optional*, defaults to `"ensemble"`): in reports.
        normalized_over (`str`, *optional*): on what the members got mean 0 and deviation 1, as `ensemble.json` says.

    Attributes:
        mean ([`EnsembleMean`]): the reward: `PPOTrainer(reward_funcs=ensemble.mean)`.
        spread ([`EnsembleSpread`]): the doubt: `PPOTrainer(probe_funcs=ensemble.spread)`. Runs every member again.
    """

    def __init__(self, members: Sequence[MemberReward], name: str = "ensemble", normalized_over: str | None = None):
        self.members, self.__name__, self.normalized_over = list(members), name, normalized_over
        self.mean, self.spread = EnsembleMean(self.members), EnsembleSpread(self.members)

    def disagreement(
        self,
        prompts: Sequence[Text],
        first: Sequence[Text],
        second: Sequence[Text],
        first_ids: Sequence[Sequence[int]],
        second_ids: Sequence[Sequence[int]],
        prompt_ids: Sequence[Sequence[int]] | None = None,
    ) -> list[float]:
        """
        Variance over the members of P(first is better), one number per prompt from 0 to at most 0.25: ask a labeller
        where it is largest (Christiano et al. 2017, Sec. 2.2.4).

        Args:
            prompts, first, second (`Sequence`):
                Prompts and both completions, text or messages.
            first_ids, second_ids (`Sequence[Sequence[int]]`):
                Ids of the completions, with the end-of-sequence token where they have one.
            prompt_ids (`Sequence[Sequence[int]]`, *optional*):
                Ids of the prompts; made from `prompts` if absent.

        Each member predicts the label as its loss did: in the unit it was trained in, and with its share of random
        answers (`prediction_noise`), which keeps the number below 0.25 and, shared by the members, its order.
        """
        columns = []
        for texts, ids in ((first, first_ids), (second, second_ids)):
            given = {"prompts": prompts, "completions": texts, "completion_ids": ids, "prompt_ids": prompt_ids}
            scores = [as_scores(member(**given)) * member.log_odds[0] for member in self.members]
            columns.append(torch.stack(scores, dim=1))
        noises = [member.log_odds[1] for member in self.members]
        return preference_variance(*columns, noises=noises).tolist()


def is_reward_ensemble(path: Any) -> bool:
    """Whether `path` is the folder of a saved ensemble."""
    return isinstance(path, str | os.PathLike) and os.path.isfile(os.path.join(path, ENSEMBLE_FILE))


def load_reward_ensemble(
    path: str | os.PathLike,
    *,
    policy_processing_class: PreTrainedTokenizerBase | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    base_model: str | os.PathLike | None = None,
    batch_size: int = 16,
    trust_remote_code: bool = False,
) -> RewardEnsemble:
    """
    Load an ensemble. Adapters are put on one base, loaded once and quantised as it was in training.

    Args:
        path (`str` or `os.PathLike`):
            Folder that `train_reward_ensemble` wrote.
        policy_processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the policy that is scored, if it is not the ensemble's.
        batch_size (`int`, *optional*, defaults to 16):
            Rows per forward.
        dtype, device, base_model, trust_remote_code:
            As for [`load_reward_model`].

    Raises:
        ValueError: `path` is no ensemble or not whole, or its adapters stand on different bases.
    """
    path = Path(path)
    if not is_reward_ensemble(path):
        raise ValueError(f"{str(path)!r} has no {ENSEMBLE_FILE}. Pass the folder of a reward ensemble.")
    ensemble = json.loads((path / ENSEMBLE_FILE).read_text(encoding="utf-8"))
    saved = ensemble["members"]
    folders = [path / member["folder"] for member in saved]
    if missing := [str(folder) for folder in folders if not folder.is_dir()]:
        raise ValueError(f"{str(path / ENSEMBLE_FILE)!r} names {missing}, which are not there. Train them again.")
    options = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    if all((folder / "adapter_config.json").exists() for folder in folders):
        models = [_load_adapters(folders, base_model=base_model, **options)] * len(folders)
    else:
        models = [load_reward_model(folder, **options) for folder in folders]
    tokenizer = AutoTokenizer.from_pretrained(folders[0], trust_remote_code=trust_remote_code)
    members, switches = [], {id(model): RoleSwitch(model) for model in models}
    for folder, model, member in zip(folders, models, saved, strict=True):
        normalization = saved_normalization(str(folder))
        if normalization_of(model) != (1.0, 0.0):
            set_normalization(model, 1.0, 0.0)  # a base has one for all, so that of a member is applied outside
        members.append(
            MemberReward(
                model.requires_grad_(False),
                tokenizer,
                policy_processing_class or tokenizer,
                name=folder.name,
                batch_size=batch_size,
                switch=switches[id(model)],
                adapter=POLICY if folder == folders[0] else folder.name,
                normalization=normalization,
                training_gain=float(member.get("training_gain", 1.0)),
                prediction_noise=saved_noise(str(folder)),
            )
        )
    return RewardEnsemble(members, path.resolve().name, ensemble.get("normalized_over"))


def _load_adapters(folders: list[Path], *, device: Any, **options: Any) -> nn.Module:
    _check_one_base(folders)
    model = load_reward_model(folders[0], device=device, **options)  # brings the base, its adapter is `default`
    assert isinstance(model, PeftModel)
    place = str(next(model.parameters()).device)
    for folder in folders[1:]:  # their heads are copies of the first, in float32 like it, and get their own weights
        model.load_adapter(str(folder), adapter_name=folder.name, is_trainable=False, torch_device=place)
    return model.eval()


def _check_one_base(folders: list[Path]) -> None:
    def base_of(folder: Path) -> tuple:
        config = PeftConfig.from_pretrained(str(folder))
        quantization = read_base_quantization(str(folder / QUANTIZATION_FILE))
        return config.base_model_name_or_path, config.revision, quantization, saved_aggregation(str(folder))

    found = {folder.name: base_of(folder) for folder in folders}
    odd = {name: base for name, base in found.items() if base != found[folders[0].name]}
    if odd:
        raise ValueError(
            f"The members {list(odd)} have another base, quantisation or aggregation than {folders[0].name}: "
            f"{next(iter(odd.values()))} against {found[folders[0].name]}. Train all members on one base."
        )
