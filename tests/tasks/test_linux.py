"""The Linux kernel's source as text: found, split by folders, the same from a tarball and unpacked."""

import io
import tarfile

import pytest

from kvbind.tasks import linux, preset_files
from kvbind.tasks.language import Config, Task
from kvbind.tasks.linux import LINUX
from kvbind.tasks.sources import TextSource
from kvbind.train.config import load_config

TREE = {
    **{f"drivers/d{i}/{name}.c": f"int d{i}_{name};\n" * 40 for i in range(30) for name in ("b", "a", "main")},
    "drivers/d0/sub/deep.c": "int deep;\n",
    "drivers/d0/registers.h": "#define A 1\n",
    "drivers/d1/empty.c": "",
    "mm/slab.c": "struct page;\n" * 300,
    "crypto/aes.c": "u8 key;\n" * 300,
    "tools/perf.c": "int perf;\n",
    "Makefile": "all:\n",
}


def write_tarball(path, tree=TREE, suffix="xz"):
    with tarfile.open(path, f"w:{suffix}") as archive:
        # in an order of its own, as archives have
        for name in sorted(tree, reverse=True):
            member = tarfile.TarInfo(f"linux-source-6.1/{name}")
            member.size = len(tree[name])
            archive.addfile(member, io.BytesIO(tree[name].encode()))
        link = tarfile.TarInfo("linux-source-6.1/drivers/d0/link.c")
        link.type, link.linkname = tarfile.SYMTYPE, "main.c"
        archive.addfile(link)
    return path


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.delenv(linux.VARIABLE, raising=False)
    monkeypatch.setattr(linux, "PLACE", tmp_path)
    return tmp_path


def texts(where="linux", split=None):
    found = TextSource(where).open(split)
    return dict(zip(found.folders, found.once(), strict=True))


def test_a_document_is_a_folder_of_c_files_in_the_order_of_their_paths(place):
    write_tarball(place / "linux-source-6.1.tar.xz")
    found = texts()
    assert found["drivers/d3"] == "\n".join(TREE[f"drivers/d3/{name}.c"] for name in ("a", "b", "main"))
    assert set(found) == {f"drivers/d{i}" for i in range(30)} | {"drivers/d0/sub"}
    assert texts("linux-others") == {"mm": TREE["mm/slab.c"], "crypto": TREE["crypto/aes.c"]}


def test_folders_are_split_by_a_hash_of_their_paths_and_subsystems_apart_are_in_neither_part(place):
    write_tarball(place / "linux-source-6.1.tar.xz")
    train, held_out = (set(texts(split=split)) for split in ("train", "held_out"))
    assert train | held_out == set(texts())
    assert not train & held_out
    assert 0 < len(held_out) < 12
    fewer = {name: text for name, text in TREE.items() if not name.startswith("drivers/d7/")}
    write_tarball(place / "linux-source-6.1.tar.xz", fewer)
    assert set(texts(split="held_out")) == held_out - {"drivers/d7"}


def test_unpacked_it_is_the_same_text_under_the_same_name(place, monkeypatch):
    tarball = write_tarball(place / "linux-source-6.1.tar.xz")
    packed, found = TextSource("linux").open("train"), texts()
    with tarfile.open(tarball) as archive:
        archive.extractall(place, filter="data")
    assert linux.found() == place / "linux-source-6.1"
    unpacked = TextSource("linux").open("train")
    assert texts() == found
    assert unpacked.fingerprint() == packed.fingerprint()
    assert unpacked.contents() == packed.contents()
    monkeypatch.setenv(linux.VARIABLE, str(tarball))
    assert linux.found() == tarball


def test_the_newest_version_counts_by_its_numbers(place):
    for name in ("linux-source-6.9.tar.xz", "linux-source-6.12.tar.xz", "linux-source-5.10.tar.xz"):
        write_tarball(place / name)
    (place / "linux-source-7.0.tar.xz.partial").write_text("")
    (place / "linux-source-6.14").write_text("no folder")
    assert linux.found() == place / "linux-source-6.12.tar.xz"


def test_where_it_is_missing_the_error_says_how_to_install_it(place, monkeypatch):
    for name in ("linux", "linux-others"):
        with pytest.raises(
            ValueError, match=r"linux-source-\*\.tar\.xz here: apt-get install linux-source \(or set KVBIND_L"
        ):
            TextSource(name).open(None)
    monkeypatch.setenv(linux.VARIABLE, str(place / "nothing"))
    with pytest.raises(ValueError, match=r"KVBIND_LINUX must name a tarball or folder that exists; got '.*nothing'"):
        TextSource("linux").open(None)
    monkeypatch.setenv(linux.VARIABLE, str(place))
    with pytest.raises(ValueError, match=r"KVBIND_LINUX must name the Linux kernel's source; .* holds no such C files"):
        TextSource("linux").open(None)


@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_a_broken_tarball_is_named(place, damage):
    path = write_tarball(place / "linux-source-6.1.tar.xz")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"no archive at all" * 100)
    with pytest.raises(ValueError, match=r"linux-source-6\.1\.tar\.xz must be a whole tar archive; "):
        TextSource("linux").open(None)


def test_an_archive_beyond_its_limit_is_refused(place, monkeypatch):
    path = write_tarball(place / "linux-source-6.1.tar.xz")
    with pytest.raises(ValueError, match="must hold at most 1e-06 GiB of such files; it holds more"):
        linux.archive_files(path, lambda name: name, 1e-6)


def test_a_language_task_trains_on_it_and_evaluates_on_other_subsystems(place, tmp_path):
    write_tarball(place / "linux-source-6.1.tar.xz", suffix="gz")
    (place / "linux-source-6.1.tar.xz").rename(place / "linux-source-6.1.tar.gz")
    path = tmp_path / "config.yaml"
    path.write_text("data: {source: linux, held_out_source: linux-others, length: 1024, batch: 2, window: 4}\n")
    task = Task(load_config(Config, path))
    batch, _ = next(task.batches(None))
    assert bytes(batch["input_ids"][0].clamp(max=255).tolist()).count(b"int d") > 50
    assert all(b"int d" not in bytes(x["input_ids"].clamp(max=255).flatten().tolist()) for x in task.evaluation)


def test_presets_on_it_shuffle_whole_runs():
    """Folders are megabytes long: windows read one after another would each be learned and then forgotten."""
    for name, path in preset_files("language").items():
        config = load_config(Config, path)
        if config.data.source == LINUX:
            assert config.data.window >= config.train.steps * config.train.accumulate * config.data.batch, name
