"""How transformers' Auto classes find these models in a process that has not imported kvbind.

transformers has no entry points for models of other packages. What it has is code beside a model: `config.json` may name a
Python file in its own folder, which `trust_remote_code=True` lets it run. Every folder that a configuration is written into
gets such a file, which imports kvbind and does nothing else; the models' code stays in the package.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

MODULE = "kvbind_auto"
"""The file beside a model, without its ending."""

HOMES: dict[str, dict[str, str]] = {
    "kvbind.models.in_place": {"AutoConfig": "InPlaceConfig", "AutoModelForCausalLM": "InPlaceForCausalLM"},
    "kvbind.models.lact": {
        "AutoConfig": "LactConfig",
        "AutoModel": "LactModel",
        "AutoModelForCausalLM": "LactForCausalLM",
    },
    "kvbind.models.vittt": {
        "AutoConfig": "VitttConfig",
        "AutoImageProcessor": "VitttImageProcessor",
        "AutoModelForImageClassification": "VitttForImageClassification",
    },
}
"""By module, what transformers' Auto classes find in it."""

_FILE = '''"""Lets transformers open this model: `pip install kvbind`, then `from_pretrained(..., trust_remote_code=True)`.

There is nothing here but an import. After `import {home}`, `trust_remote_code` is not needed.
"""

from {home} import {names}

__all__ = [{quoted}]
'''


class NotCopied:
    """Classes of transformers whose source stays in this package.

    Once an Auto class has opened a model through the file beside it, it registers the class; `save_pretrained` would then
    copy the module that the class is in.
    """

    @classmethod
    def register_for_auto_class(cls, *args: Any, **kwargs: Any) -> None:
        """As transformers', for classes that users derive; for those of this library it does nothing."""
        if not cls.__module__.startswith("kvbind."):
            super().register_for_auto_class(*args, **kwargs)  # type: ignore[misc]


class WithImports(NotCopied):
    """Configurations of transformers that leave the file beside what they write.

    Attributes:
        auto_home: the module that it imports, of `HOMES`.
    """

    auto_home: ClassVar[str]

    def to_json_file(self, json_file_path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write this as JSON; under the name that transformers looks for in a model's folder, with the file beside it."""
        path = Path(json_file_path)
        if path.name == "config.json":
            classes = HOMES[self.auto_home]
            names = sorted(classes.values())
            (path.parent / f"{MODULE}.py").write_text(
                _FILE.format(home=self.auto_home, names=", ".join(names), quoted=", ".join(f'"{x}"' for x in names)),
                encoding="utf-8",
            )
            # classes that a user has derived and registered, whose files transformers has written
            others = {
                auto: name
                for auto, name in (getattr(self, "auto_map", None) or {}).items()
                if isinstance(name, str) and (path.parent / f"{name.split('.')[0]}.py").is_file()
            }
            self.auto_map = {auto: f"{MODULE}.{name}" for auto, name in classes.items()} | others
        super().to_json_file(json_file_path, *args, **kwargs)  # type: ignore[misc]
