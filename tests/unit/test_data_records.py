"""Records without text: refused with advice that fits, or skipped and counted."""

from __future__ import annotations

import json
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest

from picotron_core.data import token_cache
from picotron_core.data.corpus import open_corpus
from picotron_core.errors import DataError

GOOD = [json.dumps({"text": f"sentence {n} has words in it " * 6}) for n in range(40)]

BAD = {
    '{"text": null}': "'text' is null",
    '{"id": 7}': "no 'text'",
    "{}": "no 'text'",
    '{"text": 7}': "'text' is not a string",
    '{"text": ["a", "b"]}': "'text' is not a string",
    '{"text": {"a": "b"}}': "'text' is not a string",
    '{"text": "cut': "not JSON",
    "{oops}": "not JSON",
    '{"text": "a"} trailing': "not JSON",
    '"just a string"': None,  # which is text
    "null": "not an object",
    "17": "not an object",
    '["a"]': "not an object",
    r'{"text": "a\ud800"}': "half of a surrogate pair",
    '{"text": ' + "[" * 50_000 + "}": "not JSON",
    '{"text": ' + "9" * 5000 + "}": "not JSON",
}


def read(path, **options):
    return list(open_corpus([str(path)], **options).documents())


@pytest.mark.parametrize("line", BAD, ids=lambda line: line[:20])
@pytest.mark.parametrize("at", [0, 17, 39])
def test_one_record_of_many(tmp_path, line, at):
    path = tmp_path / "a.jsonl"
    lines = [*GOOD]
    lines[at] = line
    path.write_text("\n".join(lines))
    reason = BAD[line]
    if reason is None:
        assert len(read(path)) == len(GOOD)
        return
    with pytest.raises(DataError, match=rf"a\.jsonl:{at + 1} .*|a\.jsonl:{at + 1}: .*") as caught:
        read(path)
    assert "--data.on_bad skip" in str(caught.value)
    assert "--data.text_field" not in str(caught.value)
    assert len(str(caught.value)) < 600
    rest = GOOD[:at] + GOOD[at + 1 :]
    assert read(path, on_bad="skip") == [json.loads(good)["text"] for good in rest]


def test_what_is_skipped_is_counted_also_from_the_cache(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([*GOOD, '{"text": null}', "{}", "oops", "{}"]))
    for _ in range(2):
        corpus = open_corpus([str(path)], on_bad="skip")
        tokens = token_cache.prepare(
            corpus, tokenizer="", vocab_size=300, val_fraction=0.2, cache_dir=tmp_path / "cache"
        )
        counts = "1 'text' is null; 2 no 'text'; 1 not JSON"
        assert f", 4 records skipped ({counts}): " in tokens.label


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"content": "a", "id": 1}, r"found: content, id\. .*--data\.text_field"),
        ({"Text": "a"}, r"found: Text\. Did you mean 'Text'\?.*--data\.text_field"),
        ({"text": 7}, "'text' is a number, not text.*--data.text_field"),
        ({"text": ["a"]}, "'text' is an array, not text"),
        ({"messages": [{"role": "user", "content": "a"}]}, r"chat or instruction .*'messages'"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "chat or instruction records"),
        ({"prompt": "a", "completion": "b"}, "chat or instruction .*'prompt' and 'completion'"),
        ({"instruction": "a", "input": "", "output": "b"}, "chat or instruction records"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "chat or instruction records"),
        ({}, "found: nothing"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
@pytest.mark.parametrize("on_bad", ["error", "skip"])
def test_all_records_are_without_text(tmp_path, record, message, name, on_bad):
    path = tmp_path / name
    if name.endswith("parquet"):
        if not record:
            return
        table = pyarrow.table({key: [value] * 3 for key, value in record.items()})
        pyarrow.parquet.write_table(table, path)
    else:
        path.write_text(
            json.dumps([record] * 3) if name == "a.json" else f"{json.dumps(record)}\n" * 3
        )
    with pytest.raises(DataError, match=message) as caught:
        read(path, on_bad=on_bad)
    assert "on_bad" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_of_bad_records_among_others_is_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n' * 3)
    (tmp_path / "b.jsonl").write_text("\n".join(GOOD))
    with pytest.raises(DataError, match=r"a\.jsonl:1: 'text' is null"):
        read(tmp_path)
    corpus, skipped = open_corpus([str(tmp_path)], on_bad="skip"), Counter()
    assert len(list(corpus.fragments(skipped=skipped))) == len(GOOD)
    assert skipped == {"'text' is null": 3}


def test_columns_of_a_table_with_like_names(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text.id": ["x"], "text": ["a"]}), path)
    assert read(path) == ["a"]
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(twice, path)
    with pytest.raises(DataError, match="has 2 columns 'text': rename"):
        read(path)


def test_null_rows_of_a_table(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [None, "a", None, "b"]}), path)
    with pytest.raises(DataError, match=r"row 0: 'text' is null.*--data\.on_bad skip"):
        read(path)
    assert read(path, on_bad="skip") == ["a", "b"]
