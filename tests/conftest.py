"""Nothing here downloads, and small models take one thread: the switches are set before any library reads them."""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # more wait for one another, where something else runs beside

# Modules that take some eight seconds of a core or more, the longest first: `-m "not slow"` leaves them out.
SLOW = """
    test_readme test_notebooks training/test_recipe hub/test_streaming_pth reference/test_meta_reference
    distributed/test_parallel cpu/test_compiled training/test_processes files/test_atomic conversion/test_round_trip
    test_interrupted hub/test_come_back conversion/test_tokenizer_proof hub/test_reading
    conversion/test_nothing_lost conversion/test_layouts text/test_chat conversion/test_tokenizer_bounds
    model/test_registration text/test_hostile_folders hub/test_streaming model/test_remote_code hub/test_parts
    conversion/test_verify conversion/test_tokenizer test_examples cpu/test_packing conversion/test_gguf_divided
    conversion/test_llama2 test_quickstart conversion/test_memory conversion/test_dcp hub/test_publish
    cpu/test_decode_attention conversion/test_gguf_writing
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
