"""What is asked of a label, and what a source measures."""

import pytest
from datasets import Dataset

from rlhf_ext.data.evaluation_arguments import EvaluationArguments, load_evaluation_rows
from rlhf_ext.data.evaluation_rows import (
    Pair,
    evaluation_rows,
    h_of,
    pairs_of_row,
    parse_source_map,
    sources_of,
    unique_prompts,
)


def test_labels_as_pairs():
    assert pairs_of_row(3, 2, [0.5, 0.5], None) == [Pair(3, 0, 1, 0.5)]
    # Best of three: the best against each other one; nobody said which of the others is better
    assert pairs_of_row(0, 3, [0.0, 1.0, 0.0], None) == [Pair(0, 0, 1, 0.0), Pair(0, 1, 2, 1.0)]
    shared = pairs_of_row(0, 3, [0.6, 0.2, 0.2], None)
    assert [pair.target for pair in shared] == [pytest.approx(0.75), pytest.approx(0.75), 0.5]
    # 2 before 0 before 1
    assert pairs_of_row(0, 3, None, [2, 0, 1]) == [Pair(0, 0, 1, 1.0), Pair(0, 0, 2, 0.0), Pair(0, 1, 2, 0.0)]


def test_sources_of_the_data_and_of_others():
    expected = {
        "allenai/FineGrainedRLHF qa_feedback dev": "honest",
        "anthropics/hh-rlhf harmless-base test": "harmless",
        "anthropics/hh-rlhf helpful-base": "helpful",
        "OASST1 zh (LLaMA-Factory oaast_rm_zh)": "helpful",
        "WeOpenML/PandaLM testset-v1": "helpful",
        "LAION-AI/Open-Assistant en_100_tree": "helpful",
        "princeton-nlp/LLMBar Natural": "trap",
        "honest": "honest",
        "math-prm": None,
    }
    assert {name: h_of(name) for name in expected} == expected
    own = parse_source_map(["math=honest", "a=b=helpful"])
    assert own == {"math": "honest", "a=b": "helpful"}
    assert h_of("math-prm", own) == "honest" and h_of("PandaLM", {"pandalm": "trap"}) == "trap"
    for wrong in ("math", "=honest", "math=good"):
        with pytest.raises(ValueError, match="source_map"):
            parse_source_map([wrong])


def test_columns_of_rewardbench():
    rows = Dataset.from_list([{"prompt": "p", "chosen": "a", "rejected": "b", "subset": "hep-go", "id": 1}])
    found, report = evaluation_rows(rows)
    assert found[0]["completions"] == ["a", "b"] and found[0]["target"] == [1.0, 0.0] and report.num_rows == 1
    assert sources_of(found) == ["hep-go"] and sources_of(found, "id") == ["1"]
    assert sources_of(rows.remove_columns("subset")) is None
    with pytest.raises(ValueError, match="area"):
        sources_of(found, "area")
    turns, _ = evaluation_rows(rows, as_messages=True)
    assert turns[0]["prompt"] == [{"role": "user", "content": "p"}]
    assert turns[0]["completions"][1] == [{"role": "assistant", "content": "b"}]
    with pytest.raises(ValueError, match="as_messages"):
        evaluation_rows(turns.remove_columns(["ranking", "row"]), as_messages=True)


@pytest.mark.parametrize(
    "given, words",
    [
        ({}, "Nothing to evaluate"),
        ({"reward_model_path": "r", "output_dir": ""}, "output_dir"),
        ({"reward_model_path": "r", "baseline_model_path": "b"}, "baseline_model_path.*policy_model_path"),
        ({"policy_model_path": "p", "source_map": ["a=honest"]}, "source_map.*preference rows"),
        ({"policy_model_path": "p", "judge_model_path": "j"}, "baseline_model_path"),
        ({"policy_model_path": "p", "num_samples": 0}, "num_samples.*0"),
        ({"policy_model_path": "p", "temperature": -1.0}, "temperature.*-1"),
        ({"reward_model_path": "r", "dtype": "int8"}, "dtype.*int8"),
    ],
)
def test_flags_that_do_not_go_together(given, words):
    with pytest.raises(ValueError, match=words):
        EvaluationArguments(**{"output_dir": "out", **given})


def test_rows_of_either_split(tmp_path):
    lines = "\n".join(f'{{"prompt": "p{i}"}}' for i in range(50))
    (tmp_path / "rows.jsonl").write_text(lines)
    given = {"output_dir": "out", "policy_model_path": "p", "dataset_name": str(tmp_path / "rows.jsonl")}
    assert len(load_evaluation_rows(EvaluationArguments(**given))) == 50
    held = load_evaluation_rows(EvaluationArguments(**given, eval_fraction=0.3))
    assert 5 < len(held) < 30


def test_a_prompt_counts_once():
    rows = Dataset.from_list([{"prompt": p, "n": n} for n, p in enumerate(["a", "b", "a", "c", "b"])])
    assert unique_prompts(rows)["n"][:] == [0, 1, 3]
    with pytest.raises(ValueError, match="prompt"):
        unique_prompts(Dataset.from_list([{"text": "a"}]))
