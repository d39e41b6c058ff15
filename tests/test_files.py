"""Files of rows: read, appended to, replaced; and what a crash leaves of them."""

import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prime_lightning.rollout.files import (
    append_rows,
    dumps,
    read_rows,
    replace_file,
    replace_rows,
    replace_text,
    whole_rows,
)

VALUES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
ROWS = st.lists(st.dictionaries(st.text(), VALUES | st.lists(VALUES)), max_size=4)


@given(ROWS, ROWS)
def test_rows_come_back(tmp_path_factory, first, more):
    path = tmp_path_factory.mktemp("rows") / "deep" / "rows.jsonl"
    replace_rows(path, first)
    append_rows(path, more)
    assert [row for _, row in read_rows(path)] == list(whole_rows(path)) == first + more
    assert path.read_bytes().isascii()


@given(ROWS.filter(bool), st.integers(0, 200))
def test_whatever_a_crash_cuts_off_the_rows_before_it_and_after_it_are_whole(tmp_path_factory, rows, cut):
    path = tmp_path_factory.mktemp("torn") / "rows.jsonl"
    replace_rows(path, rows)
    text = path.read_bytes()
    path.write_bytes(text[: len(text) - min(cut, len(text))])
    left = list(whole_rows(path))
    assert left == rows[: len(left)]
    append_rows(path, [{"next": 1}])
    assert [row for _, row in read_rows(path)] == [*left, {"next": 1}]


@pytest.mark.parametrize("tail", ["7", "[]", '{"a": 1', "\x00\x00", '{"a": "\ud800'])
def test_a_last_line_that_is_no_row_goes_with_the_next_append(tmp_path, tail):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 0}\n' + tail.encode(errors="surrogatepass"))
    append_rows(path, [{"b": 1}])
    assert path.read_text() == '{"a": 0}\n{"b": 1}\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1}\n\n{"a": ', "Expected a JSON object in line 3 of '.*rows.jsonl', got '{\"a\":': "),
        ("{}\n[1]\n", "line 2 of .* got a list"),
        ("[" * 9000, "line 1 of "),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path, text, words):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        list(read_rows(path))
    with pytest.raises(ValueError, match="Expected a jsonl file, got 'nowhere', which does not exist"):
        list(read_rows("nowhere"))
    assert list(whole_rows(tmp_path / "nowhere")) == []


def test_a_byte_order_mark_and_long_numbers_are_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 0.12345678901234567890}\n')
    assert list(read_rows(path, parse_float=str)) == [(f"line 1 of {str(path)!r}", {"a": "0.12345678901234567890"})]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.txt"
    replace_text(path, "old")

    def fails(file):
        file.write(b"new")
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        replace_file(path, fails)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_several_writers_leave_one_whole_file(tmp_path):
    path, texts = tmp_path / "a.txt", [str(i) * 10_000 for i in range(8)]
    threads = [threading.Thread(target=replace_text, args=(path, text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts
    assert list(tmp_path.iterdir()) == [path]


def test_numbers_that_json_has_not_are_null():
    assert json.loads(dumps([float("nan"), float("inf"), {"a": (1.5, float("-inf"))}])) == [
        None,
        None,
        {"a": [1.5, None]},
    ]
