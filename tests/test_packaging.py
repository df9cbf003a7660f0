"""Wheel and sdist: the same bytes whenever they are built, complete, small, and enough to run the README."""

import email
import hashlib
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAME = f"kvbind-{PROJECT['version']}"
MIB = 2**20

hatchling = pytest.importorskip("hatchling.builders.wheel")
from hatchling.builders.sdist import SdistBuilder  # noqa: E402


def build(root, to):
    """Both archives of the source at `root`, in the folder `to`."""
    made = [*SdistBuilder(str(root)).build(directory=str(to), versions=["standard"]),
            *hatchling.WheelBuilder(str(root)).build(directory=str(to), versions=["standard"])]  # fmt: skip
    return {Path(file).suffix: Path(file) for file in made}


def digest(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", "1600000000")
        yield build(ROOT, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def unpacked(archives, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(archives[".gz"]) as tar:
        tar.extractall(folder, filter="data")
    return folder / NAME


def metadata(archives):
    with zipfile.ZipFile(archives[".whl"]) as wheel:
        return email.message_from_bytes(wheel.read(f"{NAME}.dist-info/METADATA"))


def test_archives_are_the_same_bytes_when_built_again_and_from_the_sdist(archives, unpacked, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1600000000")
    for source in (ROOT, unpacked):
        again = build(source, tmp_path / source.name)
        assert {kind: digest(file) for kind, file in again.items()} == {
            kind: digest(file) for kind, file in archives.items()
        }
    with zipfile.ZipFile(archives[".whl"]) as wheel:
        assert {info.date_time[:3] for info in wheel.infolist()} == {(2020, 9, 13)}


def test_archives_hold_what_they_should_and_no_results(archives, unpacked):
    with zipfile.ZipFile(archives[".whl"]) as wheel:
        packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    source = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src/kvbind").rglob("*") if path.is_file()}
    assert packed == {name for name in source if "__pycache__" not in name}
    assert "kvbind/py.typed" in packed
    held = {path.name for path in unpacked.iterdir()}
    assert {"src", "tests", "docs", "README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "SECURITY.md"} <= held
    assert not held & {"results", "runs", ".venv", ".ci"}
    assert archives[".whl"].stat().st_size < 2 * MIB
    assert archives[".gz"].stat().st_size < 8 * MIB


def test_metadata_says_what_the_project_does(archives):
    found = metadata(archives)
    assert (found["Name"], found["Version"], found["License-Expression"]) == ("kvbind", PROJECT["version"], "Apache-2.0")
    assert found.get_payload(decode=True).decode().strip() == (ROOT / "README.md").read_text().strip()
    assert found["Description-Content-Type"] == "text/markdown"
    assert "Typing :: Typed" in found.get_all("Classifier")
    try:
        from trove_classifiers import classifiers
    except ImportError:
        pass
    else:
        assert set(PROJECT["classifiers"]) <= classifiers


def test_the_extra_all_is_what_users_may_want():
    extras = PROJECT["optional-dependencies"]
    (everything,) = extras["all"]
    named = set(re.fullmatch(r"kvbind\[(.*)\]", everything)[1].split(","))
    assert named == extras.keys() - {"all", "browser", "dev", "docs", "test"}
    assert {"gpu", "vision", "views", "data"} <= named


def test_the_version_is_one_everywhere():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(cited["version"]) == PROJECT["version"]
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    assert cited["license"] == PROJECT["license"]


def test_the_wheel_alone_runs_the_readme(archives, tmp_path):
    home, readme = tmp_path / "site", ROOT / "README.md"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--target", home]
    subprocess.run([*pip, archives[".whl"]], check=True)
    environment = {**os.environ, "PYTHONPATH": str(home)}
    done = subprocess.run(
        [sys.executable, ROOT / "tests/readme_alone.py", readme],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"kvbind {PROJECT['version']} from {home}" in done.stdout
