"""Names of models, before anything is loaded."""

import pytest

from rlhf_ext.models.hub import check_model_name


def test_a_name_that_is_no_model_is_refused(tmp_path):
    for name in ("/no/such/folder", "owner/name", "a/b/c", str(tmp_path)):
        with pytest.raises(ValueError, match=f"model_name_or_path='{name}'"):
            check_model_name(name, "model_name_or_path")
    with pytest.raises(ValueError, match="model_name_or_path is empty"):
        check_model_name(None, "model_name_or_path")
    (tmp_path / "adapter_config.json").write_text("{}")
    check_model_name(str(tmp_path), "model_name_or_path")
