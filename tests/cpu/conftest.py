"""Tests that take `on` run on this processor, and again as on the narrower ones that it can stand for."""

import pytest
from processors import PROCESSORS

from hf_llama3.cpu import processor


@pytest.fixture(params=PROCESSORS)
def on(request, monkeypatch):
    monkeypatch.setattr(processor, "here", lambda: PROCESSORS[request.param])
