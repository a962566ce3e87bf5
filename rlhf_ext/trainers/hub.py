"""What a trainer brings to the Hub: a card that says what was trained from what, and every role's folder."""

import os
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from transformers.utils import logging

from ..models.base_quantization import QUANTIZATION_FILE, quantization_of, save_base_quantization
from ..models.reward_checkpoints import REWARD_FILE
from ..models.roles import CRITIC, REFERENCE, REWARD
from .card import CURVES_FILE, hyperparameters, metrics_table, plot_curves, public_name, rewrite_card, table


logger = logging.get_logger(__name__)


def refuse_stored_token(hub_token: str | None) -> None:
    """Refuse a token among the arguments of a run.

    Raises:
        ValueError: always when one is given; its value is not shown.
    """
    if hub_token is not None:
        raise ValueError(
            "hub_token is set, but arguments are pickled into training_args.bin, which is pushed with the model, the "
            "token in it. Leave it out; set the environment variable HF_TOKEN or log in, or pass `token=` to "
            "`push_to_hub`."
        )


class HubMixin:
    """The part of a trainer that writes its card and pushes. Its trainer says what is in the card, by `_card_facts`.

    Attributes:
        base_revision (`str` or `None`):
            Commit of the base, where it was loaded from the Hub by name.
    """

    base_revision: str | None = None
    _curves: tuple[str, ...] = ()

    def create_model_card(self, model_name=None, dataset_name=None, tags=None) -> None:
        # A path is no name on the Hub, which refuses a card with one.
        super().create_model_card(
            model_name=model_name, dataset_name=dataset_name if is_repo_id(dataset_name) else None, tags=tags
        )
        if not self.is_world_process_zero():
            return
        folder = self.args.output_dir
        logged = self.state.log_history
        drawn = plot_curves(logged, self._curves, os.path.join(folder, CURVES_FILE))
        curves = f"![{', '.join(drawn)} over optimizer steps]({CURVES_FILE})" if drawn else "Fewer than two points."
        repo = self.hub_model_id or Path(folder).name
        sections = [
            *self._card_facts(repo, dataset_name),
            ("Hyperparameters", "Arguments that differ from their defaults.\n\n" + _two_columns(self.args)),
            ("Metrics", metrics_table(logged)),
            ("Training curves", curves),
        ]
        metadata = {"library_name": "peft"} if isinstance(self._policy_or_classifier(), PeftModel) else {}
        rewrite_card(os.path.join(folder, "README.md"), model_name or Path(folder).name, sections, metadata)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        base = self._base_name()
        if isinstance(self._policy_or_classifier(), PeftModel) and not is_repo_id(base):
            logger.warning(
                f"The adapters that are pushed name their base as {base!r}, which is no id on the Hub: nobody else "
                "can load them. Push the base too and train on its id, or push what `rlhf-ext merge` writes."
            )
        return super().push_to_hub(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        model = self._policy_or_classifier()
        if self.args.should_save and isinstance(model, PeftModel):
            save_base_quantization(model.get_base_model(), output_dir or self.args.output_dir)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The parent copies the policy's files alone from the checkpoint to the folder it uploads.
        if self.is_world_process_zero():
            for name in (CRITIC, REWARD, REFERENCE):
                if os.path.isdir(os.path.join(checkpoint_folder, name)):
                    target = os.path.join(self.args.output_dir, name)
                    shutil.copytree(os.path.join(checkpoint_folder, name), target, dirs_exist_ok=True)
            for name in (REWARD_FILE, QUANTIZATION_FILE):
                if os.path.isfile(os.path.join(checkpoint_folder, name)):
                    shutil.copy(os.path.join(checkpoint_folder, name), self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    def _policy_or_classifier(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    def _base_name(self) -> str:
        model = self._policy_or_classifier()
        return (model.get_base_model() if isinstance(model, PeftModel) else model).config._name_or_path

    def _base_rows(self) -> list[tuple[str, str]]:
        """What every card says of the base: name, commit, quantisation, adapters."""
        model = self._policy_or_classifier()
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        name = base.config._name_or_path
        commit = self.base_revision
        if commit is None and isinstance(model, PeftModel):
            commit = model.peft_config["default"].revision
        rows = [("base model", public_name(name))]
        rows.append(("revision of the base", commit or ("not known" if is_repo_id(name) else "none, it is local")))
        settings = quantization_of(base.config)
        if settings is not None:
            shown = {k: v for k, v in settings.items() if k.startswith(("bnb_4bit_", "load_in_"))}
            rows.append(("quantisation of the base", ", ".join(f"{k}={v}" for k, v in sorted(shown.items()))))
        return rows

    def _data_rows(self, dataset_name: str | None) -> list[tuple[str, str]]:
        rows = [("data", public_name(dataset_name) if dataset_name else "not named")]
        for what, dataset in (("train", self.train_dataset), ("eval", self.eval_dataset)):
            if hasattr(dataset, "__len__") and not isinstance(dataset, dict):
                rows.append((f"{what} rows", str(len(dataset))))
        rows += [("optimizer steps", str(self.state.global_step)), ("seed", str(self.args.seed))]
        return rows


def describe_adapter(model: Any, name: str) -> str:
    """One line for an adapter: rank, alpha, where it sits."""
    config = model.peft_config[name]
    targets = config.target_modules
    # PEFT writes `all-linear` out layer by layer; the kinds of layers say the same.
    where = targets if isinstance(targets, str) else ", ".join(sorted({t.split(".")[-1] for t in targets or ()}))
    sizes = [f"{key} {getattr(config, key)}" for key in ("r", "lora_alpha") if hasattr(config, key)]
    return ", ".join([config.peft_type.value, *sizes, f"on {where}"])


def _two_columns(args: Any) -> str:
    return table(["argument", "value"], [(f"`{name}`", value) for name, value in hyperparameters(args).items()])


def is_repo_id(name: str | None) -> bool:
    """Whether a name may be one on the Hub, and is no path of this machine."""
    if not name or os.path.exists(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
