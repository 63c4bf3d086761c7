"""Reading line by line is reading whole: the same rows, the same errors, and less to hold."""

import json
import sys

import pytest

from clva_lens.benchmarks.base import Answer, Sample, match
from clva_lens.benchmarks.files import each_row, read_rows
from clva_lens.benchmarks.lines import value_of
from clva_lens.benchmarks.parsers import judge_rows
from clva_lens.ground.errors import BenchmarkError

LINES = [
    b'{"a": 1}\n',
    b'{"a": 1}',
    b'  {"a": 1} \r\n',
    b'{"a": 1} {"a": 2}\n',
    b'{"a": 1',
    b"[1]\n",
    b"3\n",
    b"\n",
    b"",
    '\ufeff{"a": "ä"}\n'.encode(),
    '{"a": "ä"}\n'.encode(),
    '{"a": 1}'.encode("utf-16"),
    b'{"a": "\xff"}\n',
    b'{"a": NaN}x',
]


def outcome(read, *args):
    """What a function returns, or that it raises."""
    try:
        return repr(read(*args))
    except ValueError:
        return "no JSON"


@pytest.mark.parametrize("line", LINES)
def test_a_line_says_what_json_says(line):
    assert outcome(value_of, line) == outcome(json.loads, line)


FILES = [
    b'{"a": 1}\n{"a": 2}\n',
    b'{"a": 1}\n\n \n{"a": 2}',
    b'[{"a": 1}, {"a": 2}]',
    b'\n[{"a": 1},\n {"a": 2}]\n',
    '\ufeff{"a": 1}\n{"a": 2}\n'.encode(),
    b'{"a": 1}\n{"a": \n',
    b'{"a": 1}\n{"b": 2}\n',
    b'{"a": 1}\n[2]\n',
    b'{"a": 1}\n{"a": 2}\n{"a": "\xff"}\n',
    b"",
    None,
]


@pytest.mark.parametrize("content", FILES)
def test_rows_one_by_one_are_the_rows(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content)

    def said(read):
        try:
            return list(read(path, {"a"}))
        except BenchmarkError as error:
            return str(error)

    assert said(each_row) == said(read_rows)


@pytest.mark.parametrize(
    ("asked", "answered"), [("aa", "ab"), ("ab", "aa"), ("ab", "a"), ("a", "ab"), ("ab", "ac")]
)
def test_samples_and_answers_that_do_not_match_are_refused(asked, answered):
    samples = [Sample(name, None, "", "yes") for name in asked]
    answers = [Answer(name, "") for name in answered]
    with pytest.raises(BenchmarkError, match=r"occurs more than once|are missing from"):
        match(samples, answers)


def test_rows_are_dicts_that_share_their_keys():
    samples = [Sample(str(i), None, "", "yes") for i in range(3)]
    rows = judge_rows(samples, [Answer(s.id, "yes") for s in samples], "strict")
    assert all(type(row) is dict and sys.getsizeof(row) < sys.getsizeof({**row}) for row in rows)
    assert list(rows[0]) == [
        "id",
        "group",
        "category",
        "question",
        "label",
        "answer",
        "prediction",
        "right",
        "strict",
        "margin",
        "parser",
        "error",
    ]
