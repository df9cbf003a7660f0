"""Small image sources, written to disk: two or more classes that differ in colour or in where they are bright."""

import gzip

import numpy as np
from PIL import Image

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


def colour_image(name, number, size=(12, 10)):
    rng = np.random.default_rng([number, sum(map(ord, name))])
    noise = rng.integers(0, 40, (size[1], size[0], 3))
    return Image.fromarray((np.array(COLOURS[name]) * 0.8 + noise).astype(np.uint8))


def class_folders(root, counts):
    """`counts` by split ("" for none) and class."""
    for split, classes in counts.items():
        for name, count in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                colour_image(name, i, (12 + i % 3, 10)).save(folder / f"{i:03d}.{'PNG' if i % 2 else 'png'}")
    return root


def idx_arrays(images, seed):
    """Images of two classes, bright above or below."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, images).astype(np.uint8)
    pixels = rng.integers(0, 60, (images, 8, 8)).astype(np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        image[4 * label : 4 * label + 4] += 150
    return pixels, labels


def write_idx(path, array, compress):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    content = header + array.tobytes()
    path.write_bytes(gzip.compress(content) if compress else content)


def idx_folder(root, *, train=64, held_out=24, compress=True):
    root.mkdir(exist_ok=True)
    for word, count, seed in (("train", train, 0), ("t10k", held_out, 1)):
        pixels, labels = idx_arrays(count, seed)
        ending = ".gz" if compress else ""
        write_idx(root / f"{word}-images-idx3-ubyte{ending}", pixels, compress)
        write_idx(root / f"{word}-labels-idx1-ubyte{ending}", labels, compress)
    return root


def parquet_folder(root, counts, **columns):
    """A folder of parquet files by split, as `datasets` writes them; `columns` renames "image" and "label"."""
    import datasets

    root.mkdir()
    for split, classes in counts.items():
        rows = [(name, i) for i in range(max(classes.values())) for name in classes if i < classes[name]]
        table = datasets.Dataset.from_dict(
            {
                columns.get("image", "image"): [colour_image(*row) for row in rows],
                columns.get("label", "label"): [list(COLOURS).index(name) for name, _ in rows],
            }
        )
        table = table.cast_column(columns.get("image", "image"), datasets.Image())
        table = table.cast_column(columns.get("label", "label"), datasets.ClassLabel(names=list(COLOURS)))
        table.to_parquet(root / f"{split}-00000-of-00001.parquet")
    return root
