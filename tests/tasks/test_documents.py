import contextlib
import itertools
import json
import re
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbind.tasks import sources
from kvbind.tasks.contents import Contents
from kvbind.tasks.documents import Lines, ParquetRows, TextFiles, Texts, TextStream, is_held_out, split_of
from kvbind.tasks.sources import TextSource
from kvbind.tasks.tables import Streamed


def open_documents(where, split, **options):
    return TextSource(str(where), **options).open(split)


WORDS = [f"document number {i} says {'x' * i}" for i in range(40)]


def read(source, count, seed=0, position=None, shard=(0, 1)):
    return list(itertools.islice(source.forever(seed, position, shard), count))


@pytest.fixture
def folder(tmp_path):
    for i, text in enumerate(WORDS):
        path = tmp_path / "texts" / f"part{i % 3}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "texts" / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "texts" / "empty.txt").write_text("")
    return tmp_path / "texts"


def test_an_installed_package_is_a_source_of_its_own_files():
    found = open_documents("package:json", None)
    assert set(found.names) == {"__init__.py", "decoder.py", "encoder.py", "scanner.py", "tool.py"}
    for name in ("package:no_such_package", "package:json.no_such_part", "package:re.no", "package:bisect"):
        with pytest.raises(ValueError, match=f"data.source must be 'package:' and the name .* got '{name}'"):
            open_documents(name, None)


def test_the_standard_library_is_split_into_disjoint_files_without_tests_or_installed_packages():
    train, held_out = (open_documents("stdlib", split) for split in ("train", "held_out"))
    assert isinstance(train, TextFiles)
    assert isinstance(held_out, TextFiles)
    assert train.root == Path(sysconfig.get_path("stdlib"))
    assert not set(train.names) & set(held_out.names)
    assert {"argparse.py", "json/decoder.py"} <= {*train.names, *held_out.names}
    assert not [name for name in (*train.names, *held_out.names) if re.search(r"site-packages|(^|/)tests?/", name)]
    assert 0.05 < len(held_out) / (len(train) + len(held_out)) < 0.15
    assert train.fingerprint() == open_documents("stdlib", "train").fingerprint()


def test_a_file_stays_in_its_split_whatever_joins_it(folder):
    before = open_documents(str(folder), "held_out", held_out=0.3)
    for i in range(100, 140):
        (folder / f"{i}.txt").write_text("new")
    after = open_documents(str(folder), "held_out", held_out=0.3)
    assert 0 < len(before.names) < len(after.names)
    assert set(before.names) < set(after.names)
    assert before.fingerprint() != after.fingerprint()


def test_a_folder_gives_every_text_once_and_no_other_file(folder):
    parts = [sorted(open_documents(str(folder), split, held_out=0.3).once()) for split in ("train", "held_out")]
    assert all(parts)
    assert sorted(parts[0] + parts[1]) == sorted(WORDS) == sorted(open_documents(str(folder), None).once())


def test_the_held_out_fraction_is_about_what_it_says():
    assert sum(is_held_out(str(i), 0.2) for i in range(5000)) == pytest.approx(1000, rel=0.1)


def test_a_lone_text_file_holds_out_its_end(tmp_path):
    (tmp_path / "book.txt").write_text("a" * 90 + "b" * 10)
    assert list(open_documents(str(tmp_path / "book.txt"), "train").once()) == ["a" * 90]
    assert list(open_documents(str(tmp_path / "book.txt"), "held_out").once()) == ["b" * 10]


def test_every_epoch_has_every_document_once_in_a_new_order():
    source = Texts(WORDS)
    texts = [text for text, _ in read(source, 80)]
    assert sorted(texts[:40]) == sorted(texts[40:]) == sorted(WORDS)
    assert texts[:40] != texts[40:]
    assert texts == [text for text, _ in read(source, 80)]
    assert texts != [text for text, _ in read(source, 80, seed=1)]


def test_shards_share_the_documents_out():
    parts = [[text for text, _ in read(Texts(WORDS), n, shard=(i, 3))] for i, n in enumerate((14, 13, 13))]
    assert sorted(itertools.chain(*parts)) == sorted(WORDS)


def test_more_readers_than_documents_are_refused():
    with pytest.raises(ValueError, match=r"data\.streams must be at most the 40 documents"):
        next(Texts(WORDS).forever(0, None, (0, 41)))


def tables(tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in WORDS))
    datasets.Dataset.from_dict({"text": WORDS}).to_parquet(str(tmp_path / "rows.parquet"))
    return datasets, [tmp_path / "rows.jsonl", tmp_path / "rows.parquet"]


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    with contextlib.suppress(ImportError):
        import datasets.config

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_tables_give_every_row_to_one_split(tmp_path):
    _, files = tables(tmp_path)
    for path in files:
        train, held_out = (list(open_documents(str(path), split, held_out=0.3).once()) for split in ("train", "held_out"))
        assert train
        assert held_out
        assert sorted(train + held_out) == sorted(WORDS)


def test_the_same_rows_split_alike_in_either_format(tmp_path):
    _, (jsonl, parquet) = tables(tmp_path)
    assert list(open_documents(str(jsonl), "held_out").once()) == list(open_documents(str(parquet), "held_out").once())


def test_a_column_that_is_not_there_is_named(tmp_path):
    _, (jsonl, _) = tables(tmp_path)
    with pytest.raises(ValueError, match=r"data\.column must be a column of .*: text; got 'body'"):
        open_documents(str(jsonl), "train", column="body")


def stream(tmp_path, split="train", shards=1):
    datasets, _ = tables(tmp_path)
    table = datasets.Dataset.from_dict({"text": WORDS}).to_iterable_dataset(num_shards=shards)
    return TextStream(Streamed(table, "text", "hub:words"), split, 0.3, "hub:words", Contents())


@pytest.mark.parametrize("kind", ["memory", "jsonl", "parquet"])
def test_a_stream_resumes_behind_any_document_in_another_epoch_too(tmp_path, kind):
    def opened():
        if kind == "memory":
            return stream(tmp_path)
        tables(tmp_path)
        return open_documents(tmp_path / f"rows.{kind}", "train", held_out=0.3, stream=True)

    kept = [text for text in WORDS if not is_held_out(text, 0.3)]
    whole = read(opened(), 2 * len(kept) + 3)
    assert [text for text, _ in whole] == (kept * 3)[: len(whole)]
    for stop in (1, 5, len(kept) - 1, len(kept), len(kept) + 4):
        position = json.loads(json.dumps(whole[stop - 1][1]))
        assert [t for t, _ in read(opened(), 6, position=position)] == [t for t, _ in whole[stop : stop + 6]]


def test_tables_are_streamed_on_demand_alone(tmp_path):
    _, files = tables(tmp_path)
    for path, kind in zip(files, (Lines, ParquetRows), strict=True):
        assert isinstance(open_documents(path, "train", stream=True), TextStream)
        assert isinstance(open_documents(path, "train"), kind)
        with pytest.raises(ValueError, match=r"data\.column must be a column of"):
            open_documents(path, "train", stream=True, column="body")


def test_a_stream_is_shared_out_by_files(tmp_path):
    kept = [text for text in WORDS if not is_held_out(text, 0.3)]
    parts = [[text for text, _ in read(stream(tmp_path, shards=4), 60, shard=(i, 2))] for i in range(2)]
    assert set(parts[0]) | set(parts[1]) == set(kept)
    assert not set(parts[0]) & set(parts[1])
    with pytest.raises(ValueError, match=r"data\.streams must be at most the 4 files"):
        next(stream(tmp_path, shards=4).forever(0, None, (0, 5)))


def test_a_stream_without_documents_of_the_split_says_so(tmp_path):
    pytest.importorskip("datasets")
    empty = stream(tmp_path)
    empty.fraction = 1.0
    with pytest.raises(ValueError, match="no documents for the split 'train'"):
        next(empty.forever(0))


def test_hub_names_are_streamed(monkeypatch):
    asked = {}

    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": ["one"]}).to_iterable_dataset()

    class Library:
        @staticmethod
        def load_dataset_builder(name, configuration):
            return type("Builder", (), {"hash": f"revision of {name}, {configuration}"})

        @staticmethod
        def load_dataset(*args, **kwargs):
            asked.update(args=args, **kwargs)
            return table

    monkeypatch.setitem(sys.modules, "datasets", Library)
    found = open_documents("hub:HuggingFaceFW/fineweb-edu", None, name="sample-10BT")
    assert asked == {"args": ("HuggingFaceFW/fineweb-edu", "sample-10BT"), "split": "train", "streaming": True}
    assert list(found.once()) == ["one"]
    revision = "revision of HuggingFaceFW/fineweb-edu, sample-10BT"
    assert found.contents().others == {"hub:HuggingFaceFW/fineweb-edu": revision}


@pytest.mark.parametrize("source", ["hub:any/name", "rows.parquet"])
def test_a_missing_datasets_library_is_named(tmp_path, monkeypatch, source):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ImportError, match=r"library 'datasets', which is not installed; install kvbind with its extra 'data'"
    ):
        open_documents(source, "train")


def test_sources_that_do_not_exist_or_hold_nothing_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"data\.source must be 'stdlib', .*got 'stdlibb', which does not exist"):
        open_documents("stdlibb", "train")
    with pytest.raises(ValueError, match=r"data\.source must be 'stdlib', .*got 'hub:', which does not exist"):
        open_documents("hub:", "train")
    with pytest.raises(ValueError, match="holds no text"):
        open_documents(str(tmp_path), "train")
    with pytest.raises(ValueError, match=r"data\.held_out must lie between 0 and 1; got 1\.5"):
        open_documents("stdlib", "train", held_out=1.5)


def test_an_interpreter_without_sources_is_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(ValueError, match="holds no Python source"):
        open_documents("stdlib", "train")


@given(st.lists(st.text("abcdef", min_size=1, max_size=6), unique=True, min_size=2, max_size=12), st.floats(0.01, 0.99))
def test_names_are_divided_so_that_neither_split_is_empty(names, fraction):
    train, held_out = (split_of(names, split, fraction) for split in ("train", "held_out"))
    assert train
    assert held_out
    assert sorted([*train, *held_out]) == sorted(names)
    assert split_of(names, None, fraction) == names
    hashed = [name for name in names if is_held_out(name, fraction)]
    if 0 < len(hashed) < len(names):
        assert held_out == hashed


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_documents_too_few_to_be_divided_are_cut(tmp_path, kind):
    texts, fraction = ["a" * 70 + "b" * 30, "c" * 7 + "d" * 3], 0.3
    names = [name for name in map("{}.txt".format, range(9)) if not is_held_out(name, fraction)][:2]
    if kind == "jsonl":
        (tmp_path / "all.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        for name, text in zip(names, texts, strict=True):
            (tmp_path / name).write_text(text)
    # or this tests nothing
    assert len({is_held_out(name, fraction) for name in (texts if kind == "jsonl" else names)}) == 1
    source = TextSource(str(tmp_path), fraction)
    train, held_out, whole = (source.open(split) for split in ("train", "held_out", None))
    assert list(train.once()) == ["a" * 70, "c" * 7]
    assert list(held_out.once()) == ["b" * 30, "d" * 3]
    assert list(whole.once()) == texts
    assert len({documents.fingerprint() for documents in (train, held_out, whole)}) == 3
    assert train.contents().files == held_out.contents().files == whole.contents().files
    assert [text for text, _ in itertools.islice(train.forever(0), 4)].count("a" * 70) == 2
