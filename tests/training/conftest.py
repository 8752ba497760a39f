import pytest

from hf_llama3.quickstart import python_documentation


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text of 40,000 characters, whose tokens, and the unknown one, two processes can divide."""
    path, content = tmp_path_factory.mktemp("text") / "text.txt", 2 * python_documentation()[:20_000]
    path.write_text("\u00df" * ((len(set(content)) + 1) % 2) + content, "utf-8")
    return path
