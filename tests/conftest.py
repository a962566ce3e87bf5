"""Environment and fixtures that every test shares; it runs before any test imports transformers or trl."""

import os


# Outside of this file CI=true means a machine where nothing may be left out; a worker has it from the first process.
os.environ.setdefault("RLHF_EXT_IN_CI", str(os.environ.get("CI") == "true"))

# Read at import time by torch, the hub client and TRL (which otherwise reports its use from a trainer's `__init__`).
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TRL_EXPERIMENTAL_SILENCE="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    CI="1",
)
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest  # noqa: E402
import torch  # noqa: E402


torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same random numbers for a test, whichever tests ran before it on its worker."""
    torch.manual_seed(0)
