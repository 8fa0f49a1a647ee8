"""A plugin (``-p support.sanitized``): iscsifuse's compiled module is the file that QUICK_MODULE names."""

import importlib.util
import os
import sys
from importlib.machinery import ExtensionFileLoader

_NAME = "iscsifuse._quick"


def _load() -> None:
    path = os.environ["QUICK_MODULE"]
    spec = importlib.util.spec_from_file_location(_NAME, path, loader=ExtensionFileLoader(_NAME, path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    import iscsifuse

    sys.modules[_NAME] = module
    iscsifuse._quick = module  # type: ignore[attr-defined]


_load()
