"""Registration with transformers in either order of import, without importing it.

transformers looks quantizers up in dictionaries of its module `transformers.quantizers.auto` and
has no entry points. If that module is already there, the quantizer is put into it at once. If not,
a finder at the front of `sys.meta_path` waits for it to be imported: it removes itself, lets the
ordinary finders find the module, and registers as soon as the module has been executed.
"""

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

TARGET = "transformers.quantizers.auto"


def install() -> None:
    """Register now, or as soon as transformers' registry of quantizers exists. Idempotent."""
    if TARGET in sys.modules:
        _register()
    elif not any(isinstance(finder, _RegisterOnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterOnImport())


class _RegisterOnImport(MetaPathFinder):
    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        if fullname != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        exec_module = spec.loader.exec_module

        def exec_and_register(module: ModuleType) -> None:
            exec_module(module)
            _register()

        spec.loader.exec_module = exec_and_register
        return spec


def _register() -> None:
    from vqllm.integrations.transformers import register

    register()
