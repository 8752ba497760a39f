"""Nothing here downloads, and small models take one thread: the switches are set before any library reads them."""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # more wait for one another, where something else runs beside

# Modules that take more than some ten seconds of a core: `-m "not slow"` leaves them out.
SLOW = """
    conversion/test_changing_source conversion/test_dcp conversion/test_fuzzed conversion/test_hostile
    conversion/test_hostile_json conversion/test_layouts conversion/test_memory conversion/test_nothing_lost
    conversion/test_round_trip conversion/test_tokenizer conversion/test_tokenizer_bounds
    conversion/test_tokenizer_proof conversion/test_verify cpu/test_compiled cpu/test_decode_attention cpu/test_packing
    cpu/test_processor cpu/test_products distributed/test_parallel files/test_atomic hub/test_come_back hub/test_reading
    hub/test_streaming hub/test_streaming_pth model/test_registration model/test_remote_code
    reference/test_meta_reference text/test_chat training/test_processes training/test_recipe test_devices test_examples
    test_interrupted test_notebooks test_quickstart test_readme test_trust
"""
LEFT_OUT = {"compat", "integrations", "long"}  # by addopts


def pytest_configure(config):
    config.option.loadscopereorder = False  # of xdist: modules of many tests first


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    """Mark them, and what the plain command leaves out: an -m of the command line takes the place of its own.

    They go first, so that no process is left with a long one at the end.
    """
    here = Path(__file__).parent
    slow = [here / f"{name}.py" for name in SLOW.split()]
    if gone := sorted(str(path) for path in slow if not path.exists()):
        raise pytest.UsageError(f"SLOW in tests/conftest.py names modules that are gone: {', '.join(gone)}")
    for item in items:
        if item.path in slow or LEFT_OUT & {mark.name for mark in item.iter_markers()}:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: slow.index(item.path) if item.path in slow else len(slow))
