"""Names that are imported when they are used, and the garbage collector meanwhile."""

import gc
import sys
import weakref

import pytest


class Ring:
    """Garbage that only the collector finds."""

    def __init__(self):
        self.itself = self


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with a module that notes whether the collector was at work, and one that fails."""
    folder = tmp_path / "a_package"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from hf_llama3.lazy import on_use\n"
        "__getattr__ = on_use(__name__, {'at_work': 'noting', 'name': 'failing'}, ('noting',))\n"
    )
    (folder / "noting.py").write_text("import gc\nat_work = gc.isenabled()\n")
    (folder / "failing.py").write_text("raise OSError('no such disk')\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield __import__("a_package")
    for name in [name for name in sys.modules if name.startswith("a_package")]:
        del sys.modules[name]


def test_the_collector_rests_meanwhile_and_works_again(package):
    ring = Ring()
    gone = weakref.ref(ring)
    assert "a_package.noting" not in sys.modules
    assert package.at_work is False and gc.isenabled()
    assert package.noting is sys.modules["a_package.noting"]
    del ring
    assert gone() is not None
    gc.collect()
    assert gone() is None  # what was there before can still be collected


def test_after_an_error(package):
    with pytest.raises(OSError, match="no such disk"):
        package.name  # noqa: B018
    assert gc.isenabled()


def test_a_collector_that_is_off_stays_off(package):
    gc.disable()
    try:
        assert package.at_work is False and not gc.isenabled()
    finally:
        gc.enable()


def test_what_is_frozen_stays_frozen(package):
    gc.freeze()
    try:
        count = gc.get_freeze_count()
        assert package.at_work is True and gc.get_freeze_count() >= count - 100  # what is deleted leaves
    finally:
        gc.unfreeze()


def test_other_names(package):
    with pytest.raises(AttributeError, match="'a_package' has no attribute 'other'"):
        package.other  # noqa: B018
