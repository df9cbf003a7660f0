"""Runs the README's ten lines where kvbind is installed and its source is not: `python -I readme_alone.py README.md`."""

import pathlib
import re
import sys

import kvbind

# of an installation, not of the folder that this file is in
home = pathlib.Path(kvbind.__file__).resolve()
source = pathlib.Path(__file__).resolve().parents[1] / "src"
if source in home.parents:
    sys.exit(f"kvbind must be installed; it was imported from {home}")
text = pathlib.Path(sys.argv[1]).read_text(encoding="utf-8")
example = re.search(r"## Ten lines\n+```python\n(.*?)```", text, re.S)
if example is None:
    sys.exit(f"{sys.argv[1]} must have ten lines of Python")
exec(compile(example[1], sys.argv[1], "exec"), {})
print(f"kvbind {kvbind.__version__} from {home.parent}")
