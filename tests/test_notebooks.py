"""The notebooks of examples/, run from top to bottom in small; and what is committed of them is fit to be read.

Where a notebook changes, this executes it in full, in some minutes, and writes what it prints and draws into it:

    TINY_SHAKESPEARE=tinyshakespeare.txt python tests/test_notebooks.py llama3_from_scratch
"""

import base64
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOKS = sorted((Path(__file__).parent.parent / "examples").glob("*.ipynb"))
FEW_STEPS = "20"  # of training
LARGEST_PICTURE = 100_000  # bytes
ABSOLUTE_PATH = re.compile(r"(?:^|(?<=[\s'\"(=,]))(?:file://|[A-Za-z]:\\|[/~]/?[\w.-]+/)", re.MULTILINE)


def execute(notebook, folder, **environment):
    """Run the code of a notebook, which then holds its outputs, in a kernel that begins in `folder`."""
    client = NotebookClient(
        notebook, timeout=3600, kernel_name="python3", record_timing=False, resources={"metadata": {"path": folder}}
    )
    client.execute(env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(outputs):
    """Return what outputs say in words, and leave out their pictures."""
    for output in outputs:
        yield output.get("text", "")
        yield from (text for kind, text in output.get("data", {}).items() if kind.startswith("text/"))


def kinds(cell):
    """Return what a cell's output is made of; streams come in as many pieces as they happen to."""
    return {kind for output in cell.outputs for kind in output.get("data", [output.get("name", output.output_type)])}


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def committed(request):
    return nbformat.read(request.param, 4)


def test_runs_and_its_committed_outputs_are_its_own(committed, tmp_path):
    """As many outputs of the same kinds in each cell; the sources that it shows are those of today."""
    executed = nbformat.from_dict(committed)
    execute(executed, tmp_path, NOTEBOOK_STEPS=FEW_STEPS, TINY_SHAKESPEARE="none")
    for ours, theirs in zip(code_cells(executed), code_cells(committed), strict=True):
        assert kinds(ours) == kinds(theirs), ours.source
        for fresh, old in zip(ours.outputs, theirs.outputs, strict=False):
            assert fresh.get("data", {}).get("text/markdown") == old.get("data", {}).get("text/markdown"), ours.source


def test_committed_outputs_are_whole_and_fit_to_be_read(committed):
    cells = code_cells(committed)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(kinds(cell) <= {"stdout", "image/png", "text/plain", "text/markdown"} for cell in cells)
    for cell in committed.cells:
        for text in (cell.source, *texts(cell.get("outputs", []))):
            assert not ABSOLUTE_PATH.search(text), ABSOLUTE_PATH.search(text)
            assert "Warning" not in text and "Traceback" not in text
    pictures = [o.data["image/png"] for cell in cells for o in cell.outputs if "image/png" in o.get("data", {})]
    assert all(len(base64.b64decode(picture)) <= LARGEST_PICTURE for picture in pictures)
    assert not any("widgets" in part.metadata for part in (committed, *cells))


def test_a_broken_cell_is_seen(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 + 1 == 3")])
    with pytest.raises(CellExecutionError, match="AssertionError"):
        execute(notebook, tmp_path)


def test_there_are_notebooks_with_pictures():
    pictures = {path.stem: path.read_text("utf-8").count('"image/png"') for path in NOTEBOOKS}
    assert set(pictures) == {"llama3_from_scratch", "from_meta_to_the_hub"} and pictures["llama3_from_scratch"] >= 8


@pytest.mark.parametrize(
    "text", ["/home/me/x", "in '/tmp/a/b'", "C:\\Users", "~/models/x", "path=/opt/a/b", "file:///a"]
)
def test_an_absolute_path_is_seen(text):
    assert ABSOLUTE_PATH.search(text) and not ABSOLUTE_PATH.search("a/b https://x.org/y/z and/or 3 / 4 ../b/c ./d/e")


def refresh():
    text = os.environ.get("TINY_SHAKESPEARE", "")
    if not Path(text).is_file():
        sys.exit("TINY_SHAKESPEARE must be the path of tiny Shakespeare, which the committed outputs show")
    for path in [path for path in NOTEBOOKS if path.stem in sys.argv[1:] or not sys.argv[1:]]:
        notebook = nbformat.read(path, 4)
        with tempfile.TemporaryDirectory() as folder:
            execute(notebook, folder, TINY_SHAKESPEARE=str(Path(text).resolve()))
        notebook.metadata = {"kernelspec": notebook.metadata.kernelspec, "language_info": {"name": "python"}}
        nbformat.write(notebook, path)
        print(f"wrote {path.name}")


if __name__ == "__main__":
    refresh()
