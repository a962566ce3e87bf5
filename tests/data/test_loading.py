"""Rows from every kind of place, refusals in clear words, and splits that share no prompt."""

import gzip
import json

import pytest
from datasets import Dataset, DatasetDict

from rlhf_ext.data.arguments import DataArguments, load_splits
from rlhf_ext.data.loading import (
    holdout_by_prompt,
    implicit_prompt,
    load_rows,
    prompt_key,
    require_columns,
    shared_start,
)
from rlhf_ext.data.prompts import set_up_tokenizer
from tests.tiny import tiny_tokenizer


ROWS = [{"prompt": f"question {i} ?", "completions": [f" a {i}", f" b {i}"], "target": [1.0, 0.0]} for i in range(6)]


def write_jsonl(path, rows):
    text = "\n".join(json.dumps(row) for row in rows) + "\n"
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return str(path)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "json", "csv", "tsv", "parquet"])
def test_every_file_format_gives_the_same_rows(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    if suffix.startswith("jsonl"):
        write_jsonl(path, ROWS)
    elif suffix == "json":
        path.write_text(json.dumps(ROWS))
    elif suffix == "parquet":
        Dataset.from_list(ROWS).to_parquet(path)
    else:
        separator = "," if suffix == "csv" else "\t"
        quoted = lambda value: '"' + json.dumps(value).replace('"', '""') + '"'  # noqa: E731
        lines = [separator.join(["prompt", "completions", "target"])]
        lines += [separator.join([r["prompt"], quoted(r["completions"]), quoted(r["target"])]) for r in ROWS]
        path.write_text("\n".join(lines))
    assert load_rows(str(path)).to_list() == ROWS


def test_csv_cells_stay_text(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,chosen,rejected\n12,NA,"[1, 2]"\n13,null,"a, b"\n')
    expected = [
        {"prompt": "12", "chosen": "NA", "rejected": "[1, 2]"},
        {"prompt": "13", "chosen": "null", "rejected": "a, b"},
    ]
    assert load_rows(str(path)).to_list() == expected


def test_messages_stand_in_a_csv_cell_as_json(tmp_path):
    turns = [{"role": "user", "content": "hello"}]
    path = tmp_path / "rows.csv"
    path.write_text('prompt\n"' + json.dumps(turns).replace('"', '""') + '"\n')
    assert load_rows(str(path))[0]["prompt"] == turns


def test_folder_splits_by_the_words_of_a_name(tmp_path):
    write_jsonl(tmp_path / "pairs_train-00000.jsonl", ROWS[:2])
    write_jsonl(tmp_path / "pairs_train-00001.jsonl", ROWS[2:4])
    write_jsonl(tmp_path / "test.jsonl", ROWS[4:])
    (tmp_path / "README.md").write_text("not data")
    assert load_rows(str(tmp_path)).to_list() == ROWS[:4]
    assert load_rows(str(tmp_path), split="test").to_list() == ROWS[4:]
    with pytest.raises(ValueError, match="split 'validation' by its name.*test.jsonl"):
        load_rows(str(tmp_path), split="validation")


def test_folder_without_split_names_is_train(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS[:3])
    write_jsonl(tmp_path / "b.jsonl", ROWS[3:])
    assert load_rows(str(tmp_path)).to_list() == ROWS


def test_saved_to_disk(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    DatasetDict(train=Dataset.from_list(ROWS[:4]), test=Dataset.from_list(ROWS[4:])).save_to_disk(tmp_path / "two")
    assert load_rows(str(tmp_path / "one")).to_list() == ROWS
    assert load_rows(str(tmp_path / "two"), split="test").to_list() == ROWS[4:]
    with pytest.raises(ValueError, match="'dev' is not in .* 'train', 'test'"):
        load_rows(str(tmp_path / "two"), split="dev")


@pytest.mark.parametrize("name", ["./nowhere.jsonl", "/no/such/folder", "rows.csv", "a/b/c"])
def test_a_path_that_is_not_there(name):
    with pytest.raises(ValueError, match=f"`dataset_name` is '{name}'.*no such file"):
        load_rows(name)


def test_a_hub_id_that_cannot_be_reached_says_what_else_would_do():
    with pytest.raises(ValueError, match="split 'train' of `dataset_name` 'nobody/nothing:main'.*jsonl"):
        load_rows("nobody/nothing:main")


def test_broken_files(tmp_path):
    blank = tmp_path / "blank.jsonl"
    blank.write_text("\n")
    with pytest.raises(ValueError, match="'blank.jsonl' is empty"):
        load_rows(str(blank))
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(ValueError, match="line 2 of broken.jsonl is no JSON object"):
        load_rows(str(broken))
    header = tmp_path / "header.csv"
    header.write_text("prompt,chosen\n")
    with pytest.raises(ValueError, match="no rows in split 'train'"):
        load_rows(str(header))
    other = tmp_path / "rows.txt"
    other.write_text("prompt")
    with pytest.raises(ValueError, match="Cannot read 'rows.txt'.*jsonl"):
        load_rows(str(other))


def test_flags_that_do_not_apply(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ValueError, match="`dataset_config` is 'main'.*local"):
        load_rows(path, config="main")
    with pytest.raises(ValueError, match="split 'test' was asked.*eval_fraction"):
        load_rows(path, split="test")
    with pytest.raises(ValueError, match="`dataset_name` is empty"):
        load_rows("")
    with pytest.raises(ValueError, match="`eval_fraction` is 1.5"):
        DataArguments(eval_fraction=1.5)
    with pytest.raises(ValueError, match="`max_rows` is 0"):
        DataArguments(max_rows=0)


def test_require_columns():
    dataset = Dataset.from_list([{"prompt": "a"}, {"prompt": " "}, {"prompt": None}])
    with pytest.raises(ValueError, match="'chosen' is missing in the train rows; it has 'prompt'"):
        require_columns(dataset, ["prompt", "chosen"], what="the train rows")
    with pytest.raises(ValueError, match=r"'prompt' is empty in 2 of 3 rows .*\(row 1, 2\)"):
        require_columns(dataset, ["prompt"])


def test_the_prompt_of_a_pair_leaves_each_side_an_answer():
    ask, yes, no = (
        {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "y"), ("user", "n"))
    )
    system = {"role": "system", "content": "s"}
    assert implicit_prompt([ask, yes], [ask, {**yes, "content": "z"}]) == [ask]
    assert implicit_prompt([ask, yes], [ask, yes, no, yes]) == [ask], "one goes on where the other ends"
    assert implicit_prompt([system, ask, yes], [system, no, yes]) is None, "no template renders a system turn alone"
    assert implicit_prompt("Human: q Assistant: a", "Human: q Assistant: b c") == "Human: q Assistant:"
    assert implicit_prompt("one", "one two") is None and implicit_prompt("x", "y") is None


def test_a_call_of_a_tool_is_content():
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    require_columns(Dataset.from_list([{"completion": turns}]), ["completion"])


def test_the_tokenizer_of_a_recipe_has_the_template_and_the_end_of_its_flags(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template, tokenizer.eos_token = None, None
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    with pytest.raises(ValueError, match="eos_token=None"):
        set_up_tokenizer(tokenizer)
    set_up_tokenizer(tokenizer, "<eos>", str(tmp_path / "own.jinja"))
    turns = [{"role": "user", "content": "w1 w2"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "w1 w2 " and tokenizer.eos_token == "<eos>"


def test_holdout_shares_no_prompt_and_forgets_nothing():
    rows = Dataset.from_list([{"prompt": f"p {i // 3}", "id": i} for i in range(300)])
    kept, held = holdout_by_prompt(rows, 0.3, seed=1)
    assert not set(kept["prompt"]) & set(held["prompt"])
    assert sorted([*kept["id"], *held["id"]]) == list(range(300))
    # 100 prompts, each held out with probability .3: 4 standard deviations
    assert abs(len(set(held["prompt"])) - 30) < 4 * (100 * 0.3 * 0.7) ** 0.5


def test_holdout_hangs_on_prompt_and_seed_alone():
    rows = [{"prompt": f"p {i}", "id": i} for i in range(50)]
    held = holdout_by_prompt(Dataset.from_list(rows), 0.3, seed=0)[1]["prompt"]
    fewer = holdout_by_prompt(Dataset.from_list(rows[::-2]), 0.3, seed=0)[1]["prompt"]
    assert set(fewer) == set(held) & {row["prompt"] for row in rows[::-2]}
    assert set(holdout_by_prompt(Dataset.from_list(rows), 0.3, seed=1)[1]["prompt"]) != set(held)


def test_holdout_that_leaves_a_side_empty():
    with pytest.raises(ValueError, match="`eval_fraction` is 0.5, which leaves .* out of 1 different prompts"):
        holdout_by_prompt(Dataset.from_list([{"prompt": "a"}, {"prompt": "a"}]), 0.5)


def test_prompt_key_of_rows_without_a_prompt_column():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    other = [turns[0], {"role": "assistant", "content": "b"}]
    assert prompt_key({"messages": turns}) == prompt_key({"messages": other})
    assert prompt_key({"chosen": turns, "rejected": other}) == prompt_key({"prompt": turns[:1]})
    assert prompt_key({"text": " a "}) == "a"
    with pytest.raises(ValueError, match="No prompt in a row with columns 'answer'"):
        prompt_key({"answer": "a"})


def test_load_splits(tmp_path):
    rows = [{"prompt": f"p {i}", "source": "even" if i % 2 == 0 else "odd"} for i in range(40)]
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "test.jsonl", rows[:3])

    arguments = DataArguments(dataset_name=path, dataset_source=["odd"], max_rows=10)
    train, evaluation = load_splits(arguments, wants_eval=False, seed=0)
    assert train.to_list() == rows[1:20:2] and evaluation is None

    arguments = DataArguments(dataset_name=str(tmp_path))
    train, evaluation = load_splits(arguments, wants_eval=True, seed=0)
    assert (len(train), len(evaluation)) == (40, 3)

    train, evaluation = load_splits(DataArguments(dataset_name=path, eval_fraction=0.25), wants_eval=False, seed=0)
    assert len(train) + len(evaluation) == 40 and len(evaluation) > 0

    with pytest.raises(ValueError, match=r"names \['prime'\].*has \['even', 'odd'\]"):
        load_splits(DataArguments(dataset_name=path, dataset_source=["prime"]), wants_eval=False, seed=0)


def test_a_text_field_of_another_name_is_held_out_by(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"content": f"w{i}", "text": "no"}) for i in range(40)))
    arguments = DataArguments(dataset_name=str(tmp_path / "rows.jsonl"), eval_fraction=0.3)
    train, held_out = load_splits(arguments, wants_eval=False, seed=0, text_field="content")
    assert sorted([*train["text"], *held_out["text"]]) == sorted(f"w{i}" for i in range(40))
    with pytest.raises(ValueError, match="'contents' is missing in the rows, of which `dataset_text_field`"):
        load_splits(arguments, wants_eval=False, seed=0, text_field="contents")


def test_pairs_without_a_prompt_column_have_one_key_per_prompt():
    first = {"chosen": "\n\nHuman: hi\n\nAssistant: yes", "rejected": "\n\nHuman: hi\n\nAssistant: yet"}
    second = {"chosen": "\n\nHuman: hi\n\nAssistant: no", "rejected": "\n\nHuman: hi\n\nAssistant: maybe"}
    assert prompt_key(first) == prompt_key(second)
    assert prompt_key({**first, "chosen": "\n\nHuman: ho\n\nAssistant: yes"}) != prompt_key(first)
    assert shared_start("say: good", "say: gone") == "say: "
    turns = [{"role": "user", "content": "hi"}]
    assert shared_start([*turns, {"a": 1}], [*turns, {"a": 2}]) == turns
