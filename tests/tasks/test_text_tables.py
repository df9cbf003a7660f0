"""Tables of text: what is no text is refused by name, whichever way it is read."""

import json
import re

import pytest

from kvbind.tasks.sources import TextSource
from kvbind.tasks.tables import JsonLines, block


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def texts(where, stream, **options):
    return list(TextSource(str(where), stream=stream, **options).open(None).once())


def jsonl(path, *rows):
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


EITHER_WAY = pytest.mark.parametrize("stream", [False, True])


@EITHER_WAY
@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (7, "a number"),
        (0.5, "a number"),
        (True, "a boolean"),
        (None, "null"),
        (["a"], "a list"),
        ([{"role": "user", "content": "hi"}], "a list"),
        ({"a": 1}, "an object"),
        ("a\ud800b", "half a surrogate pair, \\ud800"),
    ],
)
def test_a_row_that_holds_no_text_is_named(tmp_path, stream, value, kind):
    jsonl(tmp_path / "a.jsonl", "one", "two")
    jsonl(tmp_path / "b.jsonl", "three", value)
    message = re.escape(f"data.column must hold text; 'text' of {tmp_path / 'b.jsonl'}, line 2, holds {kind}")
    with pytest.raises(ValueError, match=message):
        texts(tmp_path, stream)


@EITHER_WAY
def test_texts_that_look_like_something_else_stay_texts(tmp_path, stream):
    rows = ["2020-01-01", "7", "null", "true", '["a"]', "a\u2028b\x85c", "x\r\ny"]
    jsonl(tmp_path / "a.jsonl", *rows)
    assert texts(tmp_path, stream) == rows


@EITHER_WAY
def test_lines_may_end_in_any_way_and_be_empty(tmp_path, stream):
    (tmp_path / "a.jsonl").write_bytes(
        b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"other": 1, "text": "\xc3\xa4"}\n{"text": ""}\n{"text": "c"}'
    )
    assert texts(tmp_path, stream) == ["a", "ä", "c"]


@EITHER_WAY
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "b', "a.jsonl, line 2, must be a JSON object; Unterminated string starting at character 10"),
        (b'{"text": "b"} {"text": "c"}', "a.jsonl, line 2, must be a JSON object; Extra data at character 15"),
        (b'{"text": "\xe9"}', "a.jsonl, line 2, must be UTF-8; byte 11 is 0xe9"),
        (b'["b"]', "a.jsonl, line 2, must be a JSON object; it is a list"),
        (b'"b"', "a.jsonl, line 2, must be a JSON object; it is a text"),
        (b"[" * 100_000, "a.jsonl, line 2, must be a JSON object; it is nested too deeply"),
        (b'{"text": ' + b"7" * 5000 + b"}", "a.jsonl, line 2, must be a JSON object; Exceeds the limit"),
        (b'{"body": "b", "id": 1}', "a.jsonl, line 2: body, id; got 'text'"),
    ],
)
def test_a_broken_line_is_named(tmp_path, stream, line, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "c"}\n')
    with pytest.raises(ValueError, match=re.escape(message)):
        texts(tmp_path, stream)


@EITHER_WAY
def test_a_compressed_file_under_a_table_s_name_is_not_expanded(tmp_path, stream):
    import gzip

    for name in ("a.jsonl", "a.parquet"):
        (tmp_path / name).write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000))
        with pytest.raises(ValueError, match=rf"{re.escape(name)}(, line 1,)? must be"):
            texts(tmp_path / name, stream)


@EITHER_WAY
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([7, 8], "'text' of .*b.parquet holds int64"),
        ([["a"], ["b"]], "'text' of .*b.parquet holds list<.*: string>"),
        ([None, None], "'text' of .*b.parquet holds null"),
        ([b"a", b"b"], "'text' of .*b.parquet holds binary"),
        (["three", None], "'text' of .*b.parquet, row 2, holds null"),
    ],
)
def test_a_parquet_file_that_holds_no_text_is_named(tmp_path, stream, rows, message):
    import datasets

    datasets.Dataset.from_dict({"text": ["one", "two"]}).to_parquet(tmp_path / "a.parquet")
    datasets.Dataset.from_dict({"text": rows}).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=f"data.column must hold text; {message}"):
        texts(tmp_path, stream)


@EITHER_WAY
def test_parquet_files_may_differ_in_other_columns(tmp_path, stream):
    import datasets

    datasets.Dataset.from_dict({"text": ["one"], "id": [1]}).to_parquet(tmp_path / "a.parquet")
    datasets.Dataset.from_dict({"id": ["two"], "text": ["two"], "more": [2]}).to_parquet(tmp_path / "b.parquet")
    assert texts(tmp_path, stream) == ["one", "two"]


def test_a_file_that_is_no_parquet_or_lacks_the_column_is_named(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": ["one"], "id": [1]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"data\.column must be a column of .*a\.parquet: text, id; got 'body'"):
        texts(tmp_path, False, column="body")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(ValueError, match=r"b\.parquet must be a parquet file"):
        texts(tmp_path, False)


@EITHER_WAY
@pytest.mark.parametrize("content", ["", "\n", '{"text": ""}\n'])
def test_tables_without_any_text_say_so(tmp_path, stream, content):
    (tmp_path / "a.jsonl").write_text(content)
    if stream and "text" in content:
        return  # known when the split is asked for, as a stream is not gone through beforehand
    with pytest.raises(ValueError, match=r"data\.source .* holds no text"):
        TextSource(str(tmp_path), stream=stream).open("train")


def test_a_reading_that_goes_on_in_an_edited_file_starts_with_a_whole_line(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", "one", "two", "three", "four")
    table = JsonLines([path], "text")
    read = table.texts()
    behind = [next(read)[1] for _ in range(2)][-1]
    assert next(table.texts(state=behind))[0] == "three"
    jsonl(path, "a longer one", "a longer two", "three", "four")
    assert [text for text, _ in table.texts(state=behind)] == ["three", "four"]
    jsonl(path, "short")
    assert list(table.texts(state=behind)) == []


def test_blocks_share_items_out_in_their_order():
    for items in range(9):
        for count in range(1, items + 1):
            parts = [block(items, i, count) for i in range(count)]
            assert [x for part in parts for x in part] == list(range(items))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
