"""From a person to a policy: labels given through the page in a real browser, then a reward model and PPO."""

import pytest
from transformers import AutoModelForCausalLM

from rlhf_ext.data.jsonl import read_jsonl
from rlhf_ext.pipelines import loop
from rlhf_ext.pipelines.finished_runs import read_run
from rlhf_ext.pipelines.loop_labels import LabelsMissing
from tests.feedback.test_page_browser import (  # noqa: F401 (fixtures, and the skip without a browser)
    browser,
    page_of,
    press,
    pytestmark,
    shown,
    store,
)
from tests.pipelines.test_loop import arguments, prompts, sft  # noqa: F401 (fixtures)


def test_labels_through_the_page_train_a_policy(tmp_path, sft, prompts, store, page_of):  # noqa: F811
    folder = tmp_path / "run"
    args = arguments(
        folder,
        sft,
        prompts,
        labels="people",
        store=str(tmp_path / "labels.db"),
        num_rounds=1,
        wait_for_labels=False,
    )
    with pytest.raises(LabelsMissing, match="0 of 8"):
        loop.run_loop(*args)
    page, chosen = page_of("anna"), {}
    for _ in range(8):
        prompt, texts = shown(page)
        longer = max((0, 1), key=lambda place: len(texts[place]))
        chosen[prompt] = texts[longer]
        press(page, "12"[longer])
    assert page.faults == []
    loop.run_loop(*args)
    rows = read_jsonl(folder / "round_1" / "labels" / "rows.jsonl")
    assert {row["prompt"]: row["completions"][row["best"]].strip() for row in rows} == {
        prompt: text.strip() for prompt, text in chosen.items()
    }
    assert read_run(folder / "round_1" / "labels")["result"]["annotators"]["anna"]["labels"] == 8
    assert read_run(folder / "round_1" / "reward")["result"]["rows"] == 8
    assert read_run(folder / "round_1" / "policy")["result"]["updates"] == 2
    AutoModelForCausalLM.from_pretrained(folder / "round_1" / "policy")
