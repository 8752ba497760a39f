"""Public names of a package that are imported when they are used (PEP 562), and that sooner."""

import gc
import importlib
import sys


def on_use(package: str, homes: dict[str, str], modules: tuple[str, ...] = ()):
    """Return the `__getattr__` of a package, for names that live in its modules (name -> module) and for modules."""

    def __getattr__(name):
        if name in homes:
            return getattr(import_module(package, homes[name]), name)
        if name in modules:
            return import_module(package, name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return __getattr__


def import_module(package: str, module: str):
    """Import a module of a package while the garbage collector rests.

    What torch and transformers make on import stays, and to search it for garbage takes a fifth of the time. It counts
    as old afterwards, without which the next search would go through all of it.
    """
    name = f"{package}.{module}"
    if name in sys.modules or not gc.isenabled() or gc.get_freeze_count():
        return importlib.import_module(name)
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        gc.unfreeze()
        gc.enable()
