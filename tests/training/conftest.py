import pytest

from hf_llama3.quickstart import python_documentation


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text of 40,000 characters."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(python_documentation()[:40_000])
    return path
