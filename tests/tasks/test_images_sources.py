import sys

import numpy as np
import pytest
import torch
from image_files import class_folders, colour_image, idx_arrays, idx_folder, parquet_folder, write_idx

from kvbind.tasks.images.idx import idx_array
from kvbind.tasks.images.sources import ImageSource


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("compress", [True, False])
def test_idx_files_are_read_as_they_were_written(tmp_path, compress):
    splits = ImageSource(str(idx_folder(tmp_path / "idx", compress=compress))).open()
    for split, count, seed in ((splits.train, 64, 0), (splits.held_out, 24, 1)):
        pixels, labels = idx_arrays(count, seed)
        assert np.array_equal(split.images[:, 0].numpy(), pixels)
        assert np.array_equal(split.labels, labels)
    assert splits.names == ("0", "1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:-1], "must hold 3 x 5 bytes; it holds 14"),
        (lambda x: x + b"\0", "must hold 3 x 5 bytes; it holds 16"),
        (lambda x: b"\0\0\x0d" + x[3:], "must be an IDX file of unsigned bytes; it starts with '00000d02'"),
        (lambda x: x[:7], "must be an IDX file"),
        (lambda x: b"", "must be an IDX file"),
    ],
)
def test_idx_files_that_are_broken_are_refused(tmp_path, change, message):
    write_idx(tmp_path / "x", np.zeros((3, 5), np.uint8), compress=False)
    (tmp_path / "x").write_bytes(change((tmp_path / "x").read_bytes()))
    with pytest.raises(ValueError, match=message):
        idx_array(tmp_path / "x")


def test_idx_files_that_are_missing_or_disagree_are_named(tmp_path):
    folder = idx_folder(tmp_path / "idx", compress=False)
    write_idx(folder / "t10k-labels-idx1-ubyte", np.zeros(7, np.uint8), compress=False)
    with pytest.raises(ValueError, match=r"as many labels; .*t10k-\* hold arrays of shapes \[24, 8, 8\] and \[7\]"):
        ImageSource(str(folder)).open()
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match=r"must hold a file t10k-labels\*ubyte\*"):
        ImageSource(str(folder)).open()


def test_class_folders_give_files_and_classes_in_the_order_of_names(tmp_path):
    root = class_folders(tmp_path / "x", {"train": {"red": 3, "blue": 2}, "val": {"blue": 1, "red": 1}})
    splits = ImageSource(str(root)).open()
    assert splits.names == ("blue", "red")
    assert splits.train.names == ("blue/000.png", "blue/001.PNG", "red/000.png", "red/001.PNG", "red/002.png")
    assert splits.train.labels.tolist() == [0, 0, 1, 1, 1]
    assert splits.held_out.names == ("blue/000.png", "red/000.png")
    assert np.asarray(splits.train.read(3)).mean((0, 1)).argmax() == 0
    assert np.asarray(splits.train.read(0)).mean((0, 1)).argmax() == 2


def test_class_folders_without_a_split_are_divided_class_by_class(tmp_path):
    root = class_folders(tmp_path / "x", {"": {"red": 10, "blue": 5, "green": 5}})
    splits = ImageSource(str(root), held_out=0.2).open()
    assert np.bincount(splits.held_out.labels).tolist() == [1, 1, 2]
    assert np.bincount(splits.train.labels).tolist() == [4, 4, 8]
    assert set(splits.train.names).isdisjoint(splits.held_out.names)
    assert ImageSource(str(root), held_out=0.2).open().held_out.names == splits.held_out.names


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"train": {"red": 1, "green": 1}, "val": {"blue": 1}}, "blue must be a class that training has: green, red"),
        ({"train": {"red": 2}, "val": {"red": 1}}, r"two class folders or more, .*x/train' there is 'red' alone"),
        ({"": {"red": 2, "blue": 2, "green": 0}}, r"two class folders or more, .*'green' has none"),
        ({"train": {"red": 0}}, r"must hold images \(.bmp, .jpeg, .jpg, .png, .tif, .tiff, .webp\)"),
        ({"val": {"red": 1, "blue": 1}}, r"data\.source must hold the folder train/ beside val/"),
        ({}, "must hold IDX files, parquet files, or a folder of images per class"),
        ({"": {"red": 1, "blue": 1}}, r"data\.held_out must leave images for training and evaluation; got 0\.2 of 2"),
    ],
)
def test_folders_that_do_not_fit_are_refused(tmp_path, counts, message):
    (tmp_path / "x").mkdir()
    with pytest.raises(ValueError, match=message):
        ImageSource(str(class_folders(tmp_path / "x", counts))).open()


def test_tables_are_read_with_the_columns_and_splits_named(tmp_path):
    counts = {"train": {"red": 3, "blue": 2}, "test": {"green": 1, "red": 1}}
    root = parquet_folder(tmp_path / "x", counts, image="picture", label="kind")
    source = ImageSource(str(root), held_out_part="test", image_column="picture", label_column="kind")
    splits = source.open()
    assert splits.names == ("blue", "green", "red")
    assert splits.train.labels.tolist() == [2, 0, 2, 0, 2]
    assert splits.held_out.labels.tolist() == [1, 2]
    assert np.asarray(splits.held_out.read(0)).mean((0, 1)).argmax() == 1
    by_hub = ImageSource(f"hub:{root}", held_out_part="test", image_column="picture", label_column="kind").open()
    assert by_hub.train.labels.tolist() == [2, 0, 2, 0, 2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"part": "trian"}, r"data\.part must be a split of .*: .*train.*; got 'trian'"),
        ({"held_out_part": "dev"}, r"data\.held_out_part must be a split of .*; got 'dev'"),
        ({"label_column": "class"}, r"data\.label_column must be a column of .*: image, label; got 'class'"),
    ],
)
def test_columns_and_splits_that_a_table_has_not_are_refused(tmp_path, fields, message):
    root = parquet_folder(tmp_path / "x", {"train": {"red": 1}, "validation": {"red": 1}})
    with pytest.raises(ValueError, match=message):
        ImageSource(str(root), **fields).open()


def test_labels_that_are_no_classes_are_refused(tmp_path):
    folder = idx_folder(tmp_path / "idx", compress=False)
    write_idx(folder / "t10k-labels-idx1-ubyte", np.full(24, 2, np.uint8), compress=False)
    with pytest.raises(ValueError, match=r"labels from 0 to 1, the classes of training; its held-out images have .* 0 to 2"):
        ImageSource(str(folder)).open()
    names = datasets_of(tmp_path / "names", ["cat", "dog"])
    with pytest.raises(ValueError, match=r"data\.label_column must hold the classes as integers; 'label' holds string"):
        ImageSource(str(names)).open()
    hidden = datasets_of(tmp_path / "hidden", [0, -1])
    with pytest.raises(ValueError, match="its training images have labels from -1 to 0"):
        ImageSource(str(hidden)).open()


def datasets_of(folder, labels):
    import datasets

    folder.mkdir()
    for split in ("train", "validation"):
        table = datasets.Dataset.from_dict({"image": [colour_image("red", 0)] * len(labels), "label": labels})
        table.cast_column("image", datasets.Image()).to_parquet(folder / f"{split}.parquet")
    return folder


def test_a_table_of_one_split_is_divided(tmp_path):
    splits = ImageSource(str(parquet_folder(tmp_path / "x", {"train": {"red": 5, "blue": 5}})), held_out=0.4).open()
    assert (len(splits.train.labels), len(splits.held_out.labels)) == (6, 4)


def test_digits_are_all_there():
    pytest.importorskip("sklearn")
    splits = ImageSource("digits").open()
    assert len(splits.train.labels) + len(splits.held_out.labels) == 1797
    assert splits.train.images.shape[1:] == (1, 8, 8)
    assert (splits.train.images.dtype, int(splits.train.images.max())) == (torch.uint8, 255)
    assert np.bincount(splits.held_out.labels).min() >= 34


def test_what_a_source_needs_and_has_not_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="needs the package 'scikit-learn'"):
        ImageSource("digits").open()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="library 'datasets'"):
        ImageSource("hub:someone/something").open()
    with pytest.raises(ValueError, match=r"data\.source must be 'digits', .*; got 'digit', which does not exist"):
        ImageSource("digit").open()
    with pytest.raises(ValueError, match=r"data\.source must be 'digits', .*; got 'hub:', which does not exist"):
        ImageSource("hub:").open()


def test_fingerprints_differ_where_images_or_classes_do(tmp_path):
    one = ImageSource(str(idx_folder(tmp_path / "a"))).open()
    same = ImageSource(str(idx_folder(tmp_path / "b", compress=False))).open()
    assert one.train.fingerprint() == same.train.fingerprint() != one.held_out.fingerprint()
    more = class_folders(tmp_path / "c", {"train": {"red": 2, "blue": 1}, "val": {"red": 1}})
    before = ImageSource(str(more)).open()
    (more / "train" / "red" / "001.PNG").unlink()
    assert ImageSource(str(more)).open().train.fingerprint() != before.train.fingerprint()


def test_tables_that_are_broken_or_differ_are_named(tmp_path):
    import datasets

    root = parquet_folder(tmp_path / "x", {"train": {"red": 2}, "validation": {"red": 1}})
    path = root / "train-00000-of-00001.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"train-00000-of-00001\.parquet must be a parquet file"):
        ImageSource(str(root)).open()
    datasets.Dataset.from_dict({"image": [1, 2], "label": [0, 0]}).to_parquet(path)
    with pytest.raises(ValueError, match=r"data\.source must hold tables of the same columns; .*x' does not: "):
        ImageSource(str(root)).open()
