"""What counts as a file of a data set, and what is refused of files that are not what they look like."""

import gzip
import json
import os
import re

import numpy as np
import pytest
from image_files import class_folders, colour_image, idx_folder

from kvbind.tasks.files import files_below, files_named, folders_in, hidden, inside, load_json, read_bytes, read_text
from kvbind.tasks.images.sources import ImageSource as Images
from kvbind.tasks.images.sources import idx_array
from kvbind.tasks.sources import TextSource as Text

UNSEEN = (".a.txt", "._a.txt", ".git/a.txt", "b/.ipynb_checkpoints/a-checkpoint.txt", "__MACOSX/a.txt", "a.txt~", "~$a.txt",
          "#a.txt#", "a.txt.swp", "a.txt.bak", "~b/a.txt")  # fmt: skip


def write(root, names, content=b"x"):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def test_hidden_files_and_what_editors_keep_are_none_of_a_data_set(tmp_path):
    write(tmp_path, [*UNSEEN, "a.txt", "b/B.TXT", "b/c/d.txt", "e.png"])
    assert files_below(tmp_path, (".txt",)) == ["a.txt", "b/B.TXT", "b/c/d.txt"]
    assert files_below(tmp_path, (".txt",), lambda name: name == "c") == ["a.txt", "b/B.TXT"]
    assert [path.name for path in files_named(tmp_path, "*.txt")] == ["a.txt"]
    assert folders_in(tmp_path) == ["b"]
    assert not hidden("a#b.txt")


def test_a_data_set_in_a_hidden_folder_is_one_all_the_same(tmp_path):
    root = write(tmp_path / ".cache" / "texts", ["a.txt"])
    assert list(Text(str(root)).open(None).once()) == ["x"]


def test_hidden_files_are_read_by_no_source(tmp_path):
    texts = write(tmp_path / "texts", [*UNSEEN, "a.txt"], b"seen")
    assert Text(str(texts)).open(None).names == ("a.txt",)
    tables = write(tmp_path / "tables", ["._a.jsonl", ".b/a.jsonl", "._c.parquet"], b"\0\5\x16\7")
    write(tables, ["a.jsonl"], json.dumps({"text": "seen"}).encode())
    assert list(Text(str(tables)).open(None).once()) == ["seen"]
    pictures = class_folders(tmp_path / "pictures", {"train": {"red": 1}, "val": {"red": 1}})
    write(
        pictures, ["train/red/._000.png", "train/red/.thumbs/0.png", "train/.old/0.png", "val/__MACOSX/0.png"], b"\0\5\x16\7"
    )
    opened = Images(str(pictures)).open()
    assert (opened.names, opened.train.names, opened.held_out.names) == (("red",), ("red/000.png",), ("red/000.png",))
    arrays = idx_folder(tmp_path / "idx")
    write(arrays, ["._train-images-idx3-ubyte.gz", "._train-labels-idx1-ubyte.gz"])
    assert len(Images(str(arrays)).open().train.labels) == 64


def test_a_linked_file_is_read_and_a_link_to_nowhere_is_named(tmp_path):
    write(tmp_path, ["elsewhere/a.txt", "texts/b.txt"])
    (tmp_path / "texts" / "a.txt").symlink_to(tmp_path / "elsewhere" / "a.txt")
    assert Text(str(tmp_path / "texts")).open(None).names == ("a.txt", "b.txt")
    (tmp_path / "texts" / "c.txt").symlink_to(tmp_path / "nowhere.txt")
    with pytest.raises(OSError, match=r"c\.txt"):
        Text(str(tmp_path / "texts")).open(None)


@pytest.mark.parametrize("name", ["/etc/passwd", "../a.png", "b/../../a.png", "..\\a.png", "link/a.png", "out.png"])
def test_paths_that_leave_their_folder_are_refused_by_name(tmp_path, name):
    write(tmp_path, ["a.png", "root/b/a.png"])
    (tmp_path / "root" / "link").symlink_to(tmp_path)
    (tmp_path / "root" / "out.png").symlink_to(tmp_path / "a.png")
    with pytest.raises(ValueError, match=f"the list must stay inside .*root; got {re.escape(repr(name))}"):
        inside(tmp_path / "root", name, "the list")
    assert inside(tmp_path / "root", "b/a.png", "the list").is_file()


def test_compressed_files_expand_as_far_as_an_option_says(tmp_path):
    bomb = write(tmp_path, ["train.gz"], gzip.compress(bytes(5 * 2**20))) / "train.gz"
    assert bomb.stat().st_size < 2**14
    assert len(read_bytes(bomb, 5 / 1024)) == 5 * 2**20
    with pytest.raises(
        ValueError, match=r"train\.gz must expand to at most 0\.00390625 GiB, which data\.expanded_gib raises"
    ):
        read_bytes(bomb, 4 / 1024)
    folder = idx_folder(tmp_path / "idx")
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz must expand .* data\.expanded_gib"):
        Images(str(folder), expanded_gib=1e-6).open()


@pytest.mark.parametrize("change", [lambda x: x[:-9], lambda x: x[:20] + b"\xff" * 9 + x[29:], lambda x: x + b"more"])
def test_compressed_files_that_are_broken_are_named(tmp_path, change):
    content = gzip.compress(np.random.default_rng(0).bytes(200))
    (tmp_path / "x.gz").write_bytes(change(content))
    with pytest.raises(ValueError, match=r"x\.gz must be a whole gzip file"):
        idx_array(tmp_path / "x.gz")


def test_text_in_another_encoding_is_named_with_the_option_that_reads_it(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("Käse", encoding="latin-1")
    for where in (tmp_path / "texts", tmp_path / "texts" / "a.txt"):
        with pytest.raises(
            ValueError, match=r"a\.txt must be text in utf-8; byte 2 is not \(data\.encoding names another, such as"
        ):
            Text(str(where)).open(None)
        assert list(Text(str(where), encoding="latin-1").open(None).once()) == ["Käse"]
    (tmp_path / "texts" / "a.txt").write_text("ABC", encoding="utf-16-le")
    with pytest.raises(
        ValueError, match=r"a\.txt must be text in utf-8; it holds the byte 0 \(data\.encoding=utf-16-le reads it"
    ):
        Text(str(tmp_path / "texts")).open(None)
    assert list(Text(str(tmp_path / "texts"), encoding="utf-16-le").open(None).once()) == ["ABC"]
    with pytest.raises(ValueError, match=r"data\.encoding must be an encoding that Python knows; got 'utf8000'"):
        Text("stdlib", encoding="utf8000")


def test_one_encoding_is_not_taken_for_another(tmp_path):
    (tmp_path / "a.txt").write_text("Käse", encoding="latin-1")
    one, other = (Text(str(tmp_path), encoding=name).open(None) for name in ("latin-1", "cp437"))
    assert one.fingerprint() != other.fingerprint()
    assert one.contents().others != other.contents().others
    assert read_text(tmp_path / "a.txt", errors="replace") == "K�se"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b'{"a": ' * 100_000])
def test_a_file_that_is_no_json_is_named(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.json must be a JSON file"):
        load_json(tmp_path / "x.json")


def test_image_files_that_a_table_names_stay_in_its_folder(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "x"
    folder.mkdir()
    for home in (tmp_path, folder):
        colour_image("red", 0).save(home / "a.png")
    named = [{"bytes": None, "path": path} for path in ("a.png", str(tmp_path / "a.png"), os.path.join("..", "a.png"))]
    for split in ("train", "validation"):
        table = datasets.Dataset.from_dict({"image": named, "label": [0, 0, 0]})
        table.to_parquet(folder / f"{split}.parquet")
    images = Images(str(folder)).open().train
    assert images.read(0).size == (12, 10)
    for row in (1, 2):
        with pytest.raises(ValueError, match=rf"row {row + 1} of .*x must stay inside"):
            images.read(row)
