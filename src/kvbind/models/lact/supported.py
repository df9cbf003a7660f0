"""The versions of transformers that the language model works with: those its tests run with."""

from packaging.specifiers import SpecifierSet

TRANSFORMERS = ">=5.16,<5.25"


def check_transformers() -> None:
    """Raise `ImportError` where another transformers is installed: its minor versions rename what models share with it."""
    import transformers

    # nightly builds of a version in the range are in it
    if not SpecifierSet(TRANSFORMERS).contains(transformers.__version__, prereleases=True):
        raise ImportError(
            f"kvbind.models.lact works with transformers {TRANSFORMERS}, and {transformers.__version__} is installed: "
            f"pip install 'transformers{TRANSFORMERS}'"
        )
