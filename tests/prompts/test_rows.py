"""Files to rows: numbers keep their digits, and a file that is one mapping is read as what it means."""

import gzip
import json
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toys import write_jsonl

from prime_lightning.prompts.dataset import DatasetPrompts
from prime_lightning.prompts.rows import load_rows
from prime_lightning.prompts.template import Template

PLAIN = Template(user="{problem}", chat=False)
LONG = "123456789012345678901234567890"


def answers(path, **options):
    prompts = DatasetPrompts(str(path), template=PLAIN, shuffle=False, **options)
    return [prompts.answer_of(prompts.row(i)) for i in range(len(prompts))]


@pytest.mark.parametrize(
    "written",
    [
        [LONG, "5"],
        ["5", "0.10"],
        ["1e400", "0.10"],
        ["0.1", "12345678901234567.25"],
        ["-9223372036854775809", "9223372036854775808"],
    ],
)
def test_numbers_in_json_and_csv_keep_their_digits(tmp_path, written):
    plain = "".join(f'{{"problem": "p", "answer": {text}}}\n' for text in written)
    inside = "".join(f'{{"problem": "p", "truth": {{"value": [{text}]}}}}\n' for text in written)
    listed = "[" + ", ".join(f'{{"problem": "p", "answer": {text}}}' for text in written) + "]"
    (tmp_path / "plain.jsonl").write_text(plain)
    (tmp_path / "inside.jsonl").write_text(inside)
    (tmp_path / "list.json").write_text(listed)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(plain.encode()))
    (tmp_path / "table.csv").write_text("problem,answer\n" + "".join(f"p,{text}\n" for text in written))
    for name in ("plain.jsonl", "list.json", "packed.jsonl.gz", "table.csv"):
        assert answers(tmp_path / name) == written, name
    assert answers(tmp_path / "inside.jsonl", columns={"answer": "truth.value"}) == written


def test_numbers_and_texts_in_one_column_stay_what_they_are(tmp_path):
    rows = [{"problem": "p", "answer": answer} for answer in ("0.10", 7, "1e5", "[1,2]", ["5", "6"])]
    assert answers(write_jsonl(tmp_path / "mixed.jsonl", rows)) == ["0.10", "7", "1e5", "[1,2]", "5, 6"]


def test_exact_decimals_of_parquet_stay_exact(tmp_path):
    column = pa.array([Decimal(LONG), Decimal("5.10")], pa.decimal128(38, 2))
    pq.write_table(pa.table({"problem": ["p", "q"], "answer": column}), tmp_path / "table.parquet")
    assert answers(tmp_path / "table.parquet") == [f"{LONG}.00", "5.10"]


def test_missing_values_of_csv_are_missing(tmp_path):
    (tmp_path / "table.csv").write_text("problem,answer\np,5\nq,NULL\nr,\n")
    with pytest.raises(ValueError, match=r"none in 2 of 3 \(rows \[1, 2\]"):
        answers(tmp_path / "table.csv")


@pytest.mark.parametrize(
    "whole",
    [
        {"problem": ["1+1", "2+2"], "answer": ["2", "4"]},
        {"problem": {"0": "1+1", "1": "2+2"}, "answer": {"0": "2", "1": "4"}},
        {"data": [{"problem": "1+1", "answer": "2"}, {"problem": "2+2", "answer": "4"}]},
        {"problem": ["1+1", "2+2"], "answer": [2, 4.0]},
    ],
)
def test_a_mapping_of_columns_is_read_as_rows_with_a_word(tmp_path, whole):
    (tmp_path / "columns.json").write_text(json.dumps(whole, indent=1))
    with pytest.warns(UserWarning, match=r"one mapping; .* columns of 2 rows"):
        prompts = DatasetPrompts(str(tmp_path / "columns.json"), template=PLAIN, shuffle=False)
    assert [prompts.row(i)["problem"] for i in range(2)] == ["1+1", "2+2"]
    assert [prompts.answer_of(prompts.row(i)).removesuffix(".0") for i in range(2)] == ["2", "4"]


def test_one_row_stays_one_row(tmp_path):
    talk = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    rows = load_rows(write_jsonl(tmp_path / "one.jsonl", [{"messages": talk}]), split="", name=None, revision=None)
    assert rows[0]["messages"] == talk


def test_lists_as_rows_have_numbered_fields(tmp_path):
    row = [{"from": "human", "value": "1+1"}, {"from": "assistant", "ground_truth": {"value": "2"}}]
    for name, text in (("rows.json", json.dumps([row, row])), ("rows.jsonl", f"{json.dumps(row)}\n" * 2)):
        (tmp_path / name).write_text(text)
        template = Template(user="{0.value}", chat=False)
        prompts = DatasetPrompts(str(tmp_path / name), template=template, columns={"answer": "1.ground_truth.value"})
        assert (prompts.answer_of(prompts.row(0)), template.messages(prompts.row(0))[0]["content"]) == ("2", "1+1")
