"""What the invariance tests share: a base, a LoRA reward model trained on it, and an SFT adapter."""

import pytest

from tests.trainers.test_ppo_roles import Adapters


@pytest.fixture(scope="session")
def adapters(tmp_path_factory):
    return Adapters(tmp_path_factory.mktemp)
