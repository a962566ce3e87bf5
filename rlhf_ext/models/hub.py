"""One name for a folder on disk, a repository on the Hub, and a folder inside such a repository."""

import copy
import os
import re

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import PeftConfig
from transformers.utils import cached_file


# What a model, an adapter or a tokenizer is made of. No pickles: only safetensors files are read.
_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_PICKLES, _ADAPTER_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json"), ("adapter_model.bin",)


def is_inside_repo(name: str) -> bool:
    """Whether `name` has the form `owner/name/folder`, which no id of a repository has, and is no folder here."""
    parts = name.split("/")
    return len(parts) > 2 and all(parts) and parts[0] not in (".", "..", "~") and not os.path.isdir(name)


def local_folder(name: str | os.PathLike, subfolder: str | None = None, revision: str | None = None) -> str:
    """The folder on disk that `name` means, fetched from the Hub if it has to be.

    Args:
        name (`str` or `os.PathLike`):
            A folder, the id of a repository, or `owner/name/folder` for a folder in one.
        subfolder (`str`, *optional*):
            Folder inside `name`, such as `"critic"`.
        revision (`str`, *optional*):
            Branch, tag or commit of the repository.

    Raises:
        ValueError: there is no such folder, here or on the Hub.
    """
    path = str(name)
    if os.path.isdir(path):
        folder = os.path.join(path, subfolder) if subfolder else path
        if not os.path.isdir(folder):
            raise ValueError(f"{path!r} has no folder {subfolder!r}. It holds {sorted(os.listdir(path))[:20]}.")
        return folder
    if os.path.isabs(path) or path.startswith((".", "~")):
        raise ValueError(f"{path!r} is no folder. Give a folder or an id on the Hub.")
    parts = path.split("/") if is_inside_repo(path) else [path]
    repo_id = "/".join(parts[:2])
    inside = "/".join(part for part in (*parts[2:], subfolder) if part)
    wanted = [f"{inside}/{pattern}" for pattern in _FILES] if inside else list(_FILES)
    try:
        root = snapshot_download(
            repo_id, revision=revision, allow_patterns=wanted, ignore_patterns=None if inside else ["*/*"]
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        what = f"{path!r} is no folder here, and {repo_id!r} could not be read from the Hub"
        raise ValueError(f"{what} ({type(error).__name__}: {error}). Give a folder or an id that exists.") from error
    folder = os.path.join(root, inside)
    if not os.path.isdir(folder):
        raise ValueError(f"The repository {repo_id!r} has no folder {inside!r} with {', '.join(_FILES[:2])} in it.")
    return folder


def find_file(path: str, name: str, revision: str | None = None) -> str | None:
    """A file of a folder or of a repository on the Hub; `None` where it is not."""
    return cached_file(
        path,
        name,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def has_safetensors(path: str, revision: str | None = None) -> bool:
    """Whether a checkpoint has weights in a safetensors file, or an index of such files."""
    return any(find_file(path, name, revision) is not None for name in _WEIGHTS)


def check_safetensors(path: str, field: str, revision: str | None = None) -> None:
    """Refuse a full model, or an adapter, whose weights are in no safetensors file.

    Args:
        path (`str`): Folder, or id on the Hub.
        field (`str`): The argument that gave it, for the message.

    Raises:
        ValueError: naming the file of another format that holds them, and how to convert it.
    """
    adapter = find_file(path, "adapter_config.json", revision) is not None
    if has_safetensors(path, revision) and not adapter:
        return
    if adapter and find_file(path, "adapter_model.safetensors", revision) is not None:
        return
    found = [name for name in (_ADAPTER_PICKLES if adapter else _PICKLES) if find_file(path, name, revision)]
    if not found:
        wanted = "adapter_model.safetensors" if adapter else f"{_WEIGHTS[0]} (or {_WEIGHTS[1]})"
        raise ValueError(f"{field}={path!r} has no weights, no {wanted}. Save it again.")
    loader = "peft.AutoPeftModel" if adapter else "transformers.AutoModel"
    raise ValueError(
        f"{field}={path!r} has its weights in {found[0]}, a pickle, which may run code when it is loaded; only "
        f"safetensors files are read. If you trust it, convert it: `{loader}ForCausalLM.from_pretrained({path!r})"
        ".save_pretrained(FOLDER)` (another class for another kind of model), save its tokenizer there too, and give "
        "FOLDER."
    )


def check_model_name(name: str | None, field: str, revision: str | None = None) -> None:
    """Refuse a name that is no model, before anything else is loaded.

    Args:
        name (`str`): Folder, or id on the Hub.
        field (`str`): The argument that gave it, for the message.

    Raises:
        ValueError: there is no `config.json` and no `adapter_config.json` under that name.
    """
    if not name:
        raise ValueError(f"{field} is empty. Give the folder of a model, or its id on the Hub.")
    try:
        if any(find_file(name, file, revision) is not None for file in ("config.json", "adapter_config.json")):
            return
    except OSError:  # neither a folder nor of the form of an id
        pass
    where = "is no folder, and no such id was found"
    if os.path.isdir(name):
        where = f"holds {sorted(os.listdir(name))[:8]}"
    raise ValueError(
        f"{field}={name!r} {where}: no config.json and no adapter_config.json. Give the folder of a model, or the id "
        "of one on the Hub that this machine can reach or has in its cache."
    )


def known_commit(name: str | None, revision: str | None = None) -> str | None:
    """The commit of a repository that was loaded from the Hub; `None` for a folder. Looks into the cache only."""
    if not name or os.path.isdir(name):
        return None
    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    found = re.search(r"[\\/]snapshots[\\/]([0-9a-f]{40})[\\/]", cached) if isinstance(cached, str) else None
    return found.group(1) if found else None


def with_base_revision(config: PeftConfig | None, name: str, revision: str | None = None) -> PeftConfig | None:
    """A copy of an adapter's config that names the commit of its base, so that it loads on the weights it grew on."""
    commit = known_commit(name, revision)
    if config is None or commit is None:
        return config
    config = copy.copy(config)
    config.revision = commit
    return config
