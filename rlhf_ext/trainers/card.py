"""The text and the curves of a model card, from plain values: no trainer is known here."""

import dataclasses
import enum
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

from huggingface_hub import ModelCard


CURVES_FILE = "training_curves.png"

# Arguments that say where, how loud and by whom, and not what was trained.
_NO_HYPERPARAMETER = re.compile(
    r"(?<!eos_)(?<!pad_)token$|^token|secret|password|api_key"
    r"|^(output_dir|logging_dir|run_name|project|report_to|disable_tqdm|log_level|accelerator_config|remove_unused)"
    r"|^(hub_|push_to_hub|save_|logging_|log_|eval_|dataloader_|trackio_|dataset_num_proc|num_completions_to_print)"
    r"|^(resume_from_checkpoint|ignore_data_skip|overwrite_output_dir|per_device_eval_batch_size|num_generations_eval|use_cpu)"
)
# The frame of TRL's card that stays: the method, versions and citations.
_KEPT_FROM = "## Training procedure"


def public_name(name: Any) -> str:
    """A Hub id as it is; of a path its last part, since a card is read by strangers."""
    text = str(name or "").rstrip("/")
    if not text:
        return "a model built in memory"
    if os.path.exists(text) or os.path.isabs(text) or text.startswith((".", "~")):
        return f"{os.path.basename(os.path.realpath(os.path.expanduser(text)))} (local)"
    return text


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; numbers with four significant digits."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def hyperparameters(args: Any) -> dict[str, Any]:
    """Arguments of a run that differ from their defaults, without paths' folders, secrets and house-keeping."""
    shown = {}
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if value == default or value is None or _NO_HYPERPARAMETER.search(field.name):
            continue
        value = _plain(value)
        if value not in (None, [], {}):
            shown[field.name] = value
    return shown


def metrics_table(log_history: list[dict[str, Any]]) -> str:
    """First and last value of every logged number, with the step of the last."""
    values: dict[str, list[tuple[int, float]]] = {}
    for entry in log_history:
        for name, value in entry.items():
            if isinstance(value, (int, float)) and name not in ("step", "epoch") and "runtime" not in name:
                if not name.endswith("_per_second"):
                    values.setdefault(name, []).append((entry.get("step", 0), value))
    rows = [(f"`{name}`", found[0][1], found[-1][1], found[-1][0]) for name, found in sorted(values.items())]
    return table(["metric", "first", "last", "at step"], rows) if rows else "Nothing was logged."


def plot_curves(log_history: list[dict[str, Any]], names: Sequence[str], path: str) -> list[str]:
    """Draw logged numbers over optimizer steps into a PNG; names those that were drawn.

    Args:
        names (`Sequence[str]`):
            Keys of the logs, at most eight of which are drawn; what was not logged at least twice is left out.
    """
    curves = {name: [(e["step"], e[name]) for e in log_history if name in e and "step" in e] for name in names}
    curves = {name: points for name, points in list(curves.items()) if len(points) > 1}
    curves = dict(list(curves.items())[:8])
    if not curves:
        return []
    # Imported here: it takes a second, and only processes that write a card need it.
    from matplotlib.figure import Figure

    columns = min(4, len(curves))
    lines = -(-len(curves) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.4 * lines), layout="constrained")
    for number, (name, points) in enumerate(curves.items()):
        axes = figure.add_subplot(lines, columns, number + 1)
        axes.plot(*zip(*points, strict=True), linewidth=1)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
    figure.supxlabel("optimizer step", fontsize=9)
    figure.savefig(path, dpi=100)
    return list(curves)


def rewrite_card(path: str, title: str, sections: Sequence[tuple[str, str]], metadata: dict[str, Any]) -> None:
    """Put `sections` (heading, text) in the place of what TRL's card says before its training procedure.

    TRL's sentence about the base and its quick start name a chat model on the Hub, which a run need not have. Its
    metadata, the method, the versions and the citations stay.
    """
    card = ModelCard.load(path)
    _, heading, rest = card.text.partition(_KEPT_FROM)
    body = "\n\n".join(f"## {name}\n\n{text}" for name, text in sections)
    card.text = f"\n# Model Card for {title}\n\n{body}\n\n{heading}{rest}"
    for name, value in metadata.items():
        setattr(card.data, name, value)
    card.save(path)


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _plain(value: Any) -> Any:
    """Values as they stand in a table; `None` for objects, which say nothing there."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, str):
        return public_name(value) if os.path.isabs(value) else value
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        kept = {name: _plain(item) for name, item in value.items() if not _NO_HYPERPARAMETER.search(str(name))}
        return {name: item for name, item in kept.items() if item is not None}
    return None
