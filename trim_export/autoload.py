"""Opt-in: artifacts load in programs that never import us, since importing torch makes our loader known.

    TRIM_EXPORT_AUTOLOAD=1 python program.py

Transformers finds no quantisation methods outside of itself, but torch, at the end of its own import, calls the entry
points of the group ``torch.backends`` (its mechanism for autoloading device extensions), where pyproject.toml names
`register`. With the switch set a finder waits for transformers' table of methods and keeps a place in it; the loader
itself is imported when the first artifact is met. Without the switch nothing happens.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["SWITCH", "register"]

SWITCH = "TRIM_EXPORT_AUTOLOAD"
"""Environment variable; anything but 0 and nothing turns autoloading on."""

_TABLE = "transformers.quantizers.auto"


def register() -> None:
    """Watch for transformers, if the switch is set."""
    if os.environ.get(SWITCH, "0") not in ("", "0"):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds one module as anybody would, and sees to it that it ends with a place for us."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_keep_place(module: ModuleType) -> None:
                execute(module)
                _keep_place(module)

            spec.loader.exec_module = execute_and_keep_place  # type: ignore[method-assign]
        return spec


def _keep_place(table: ModuleType) -> None:
    """Have our configuration's place taken by something that imports the loader, which then takes it itself."""
    from trim_export.format import METHOD

    known: dict[str, Any] = table.AUTO_QUANTIZATION_CONFIG_MAPPING

    class Deferred:
        @staticmethod
        def from_dict(settings: dict[str, Any]) -> Any:
            import trim_export.runtimes  # noqa: F401  # it is too early for this while transformers is imported

            return known[METHOD].from_dict(settings)

    known[METHOD] = Deferred
