"""The shape of the code itself: imports only point down the rooms, formulas stand alone, wraps call their parent."""

import ast
import importlib
import inspect
import textwrap
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "rlhf_ext"
ROOMS = [
    "recipes",
    "cli",
    "pipelines",
    "trainers",
    "feedback",
    "metrics",
    "models",
    "data",
    "toyworld",
    "functional",
]  # from the top down
FUNCTIONAL_IMPORTS = {"__future__", "collections", "dataclasses", "math", "torch", "typing"}

# Overrides of TRL that do not call their parent, with the reason.
WITHOUT_SUPER = {
    "PreferenceRewardTrainer.compute_loss": "replaces the loss; for two hard-labelled completions it is the parent's",
}

SOURCES = sorted([*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "recipes").glob("*.py")])


def module_of(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str | None:
    """The room of a module of ours; None for the package itself, which imports its public classes on first use."""
    parts = module.split(".")
    if parts[0] == "recipes":
        return "recipes"
    return parts[1] if len(parts) > 1 else None


def imports_of(path: Path) -> list[str]:
    """Every imported module by its full name, those inside functions too."""
    module = module_of(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            # `from .. import trainers` and `from rlhf_ext import PPOTrainer` name their target last.
            names += [f"{base}.{alias.name}" for alias in node.names] if base == PACKAGE else [base]
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    room = room_of(module_of(path))
    if room is None:
        return
    assert room in ROOMS, f"{path} stands in no room of {ROOMS}"
    for name in imports_of(path):
        if name.split(".")[0] not in (PACKAGE, "recipes"):
            continue
        target = room_of(name)
        if target is None or target == "__version__" or target[:1].isupper():
            # A public class, of a trainer: allowed from where trainers are allowed.
            target = "functional" if target in (None, "__version__") else "trainers"
        assert ROOMS.index(target) >= ROOMS.index(room), f"{path.relative_to(ROOT)} ({room}) imports {name} ({target})"


@pytest.mark.parametrize("path", sorted((ROOT / PACKAGE / "functional").glob("*.py")), ids=lambda path: path.name)
def test_formulas_import_torch_and_nothing_else(path):
    foreign = {name.split(".")[0] for name in imports_of(path)} - FUNCTIONAL_IMPORTS
    ours = {name for name in imports_of(path) if name.startswith(f"{PACKAGE}.functional")}
    assert foreign <= ({PACKAGE} if ours else set()), f"{path.name} imports {foreign}"


def trainer_classes() -> list[type]:
    classes = []
    for path in sorted((ROOT / PACKAGE / "trainers").glob("*_trainer.py")):
        module = importlib.import_module(module_of(path))
        classes += [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
    return classes


def super_calls(cls: type) -> set[str]:
    """Names that occur in the class as `super().name`."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    calls = [node for node in attributes if isinstance(node.value, ast.Call)]
    return {node.attr for node in calls if getattr(node.value.func, "id", None) == "super"}


def test_overrides_call_their_parent():
    """TRL's own subclasses that copied bodies drifted and were taken out (huggingface/trl#6402)."""
    overrides, without = set(), set()
    trainers = trainer_classes()
    own = {base for cls in trainers for base in cls.__mro__ if base.__module__.split(".")[0] == PACKAGE}
    for cls in sorted(own, key=lambda cls: cls.__qualname__):  # a part of a trainer counts like the trainer
        users = [trainer for trainer in trainers if issubclass(trainer, cls)]
        foreign = [
            base for t in users for base in t.__mro__ if base.__module__.split(".")[0] in ("trl", "transformers")
        ]
        methods = {name for name, value in vars(cls).items() if inspect.isfunction(value)}
        overridden = {name for name in methods if any(name in vars(base) for base in foreign)}
        overrides |= overridden
        without |= {f"{cls.__qualname__}.{name}" for name in overridden - super_calls(cls)}
    assert {"_calculate_rewards", "_generate_and_score_completions", "_compute_loss"} <= overrides
    assert without <= set(WITHOUT_SUPER), f"these overrides never call super(): {without - set(WITHOUT_SUPER)}"


def test_files_stay_readable():
    """House style: a file above 500 lines is split."""
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: lines for name, lines in long.items() if lines > 500} == {}
