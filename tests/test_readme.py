"""Every command that the README and docs/ show, run as it stands, on small models and texts under the names they use.

A block after `<!-- long -->` is run with `-m long`; one after `<!-- not run: REASON -->` is held to options that exist.
A table whose last column is headed "Type" is a block of its commands.
"""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import typer.main
from checkpoints import SMALL_VOCAB, params, small_tokenizer, write_meta
from command_line import run
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_llama3.cli.main import app
from hf_llama3.quickstart import python_documentation

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- (?P<mark>long|not run: .+?) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.DOTALL | re.M
)
TYPE_THIS = re.compile(r"^\|.*\| Type \|\n\|[-|]+\|\n(?P<rows>(?:\|.*\n)+)", re.M)
SET_UP = "pip install -c constraints.txt"  # run by .ci/run, in new environments
LINK = re.compile(r"\[[^]]*\]\((?P<target>[^)\s]+)\)")
IN_THE_TREE = re.compile(r"\b(?:tests|benchmarks|examples|docs|hf_llama3)/[\w/.-]*\w/?")
MOST_LINES = 200

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page):
    """Return each block as its language, its code and its mark, in the order of the page."""
    text = page.read_text("utf-8")
    found = {match.start(): match.groupdict() for match in BLOCK.finditer(text)}
    for table in TYPE_THIS.finditer(text):
        for number, row in enumerate(table["rows"].splitlines()):
            command, _, mark = row.strip("| ").rpartition("| ")[2].partition("<!-- ")
            code, mark = command.strip("` "), mark.removesuffix(" -->") or None
            found[table.start() + number] = {"language": "bash", "code": code + "\n", "mark": mark}
    return [found[start] for start in sorted(found)]


def commands(block):
    """Split a shell block into its commands; a Python block has none."""
    lines = block["code"].splitlines() if block["language"] == "bash" else []
    split = [shlex.split(line, comments=True) for line in lines if line.strip()]
    return [["hf-llama3", *one[one.index("hf_llama3") + 1 :]] if one[0] == "torchrun" else one for one in split]


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    """What the pages take for granted: checkpoints of Meta's and Hugging Face's, a text, a model that was trained."""
    folder = tmp_path_factory.mktemp("materials")
    (folder / "my-text.txt").write_text(python_documentation()[:30_000], "utf-8")
    shutil.copy(folder / "my-text.txt", folder / "tinyshakespeare.txt")
    layout, tokenizer = params(vocab=SMALL_VOCAB, kv_heads=8), small_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    for name in ("Meta-Llama-3-8B", "Llama3.1-8B", "Llama3.1-8B-Instruct", "Llama-3.2-1B/original"):
        write_meta(folder / name, layout, tokenizer=tokenizer)
    write_meta(folder / "Llama3.1-70B", layout, mp=4, tokenizer=tokenizer)  # which divide the small vocabulary
    write_meta(folder / "my-llama", layout | {"use_scaled_rope": True}, tokenizer=tokenizer)
    sentencepiece.SentencePieceTrainer.train(  # as Llama 2's was
        sentence_iterator=iter(python_documentation()[:30_000].splitlines()),
        **{"model_prefix": str(folder / "pieces"), "vocab_size": 320, "model_type": "bpe", "minloglevel": 2},
        **{"byte_fallback": True, "split_digits": True, "normalization_rule_name": "identity"},
        **{"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, "character_coverage": 0.99},
    )
    llama2 = {key: value for key, value in layout.items() if key != "rope_theta"} | {"vocab_size": 320}
    write_meta(folder / "llama-2-7b", llama2, embedding_dim=1, tokenizer=folder / "pieces.model")
    run("convert", folder / "Meta-Llama-3-8B", folder / "my-model")
    model = AutoModelForCausalLM.from_pretrained(folder / "my-model")
    with contextlib.chdir(folder):  # the adapter names its model by a path
        get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).save_pretrained("my-adapter")
    shape = ("--layers", 2, "--hidden-size", 64, "--heads", 4, "--tokenizer", "bpe:512", "--license", "apache-2.0")
    run("train", "--text", folder / "my-text.txt", "--output", folder / "runs" / "mine", "--steps", 4, *shape)
    shutil.copytree(folder / "runs" / "mine", folder / "runs" / "first")
    return folder


@pytest.fixture
def run_blocks(materials, tmp_path, monkeypatch):
    """Run the blocks of a page that bear a mark, in a folder of its own: later ones use what earlier ones make."""

    def run_marked(page, mark):
        chosen = [block for block in blocks(page) if block["mark"] == mark and SET_UP not in block["code"]]
        if not chosen:
            pytest.skip("no such block")
        place = tmp_path / "page"
        shutil.copytree(materials, place)
        for made in ("runs/mine", "runs/first"):
            if any(f"--output {made} " in block["code"] for block in chosen):
                shutil.rmtree(place / made)
        monkeypatch.chdir(place)
        monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
        for block in chosen:
            run_block(block, fresh=page == README)

    return run_marked


def run_block(block, fresh):
    """Run our own commands in this process, Python too unless it is to be `fresh`: imports take most of the time."""
    if block["language"] == "python" and not fresh:
        return exec(compile(block["code"], block["code"], "exec"), {"__name__": "block"})
    lines = block["code"].splitlines() if block["language"] == "bash" else [block["code"]]
    for line in filter(str.strip, lines):
        if line.startswith("hf-llama3 "):
            run(*shlex.split(line, comments=True)[1:])
        else:
            command = ["bash", "-euc", line] if block["language"] == "bash" else [sys.executable, "-c", line]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            assert result.returncode == 0, f"{line}\n{result.stderr}"


@each_page
def test_every_block_runs(page, run_blocks):
    run_blocks(page, None)


@pytest.mark.long
@each_page
def test_every_long_block_runs(page, run_blocks):
    run_blocks(page, "long")


@each_page
def test_options_of_every_block_exist(page):
    """Of those that are not run as well: no option is shown that the command line does not have."""
    group = typer.main.get_command(app)
    for block in blocks(page):
        assert block["language"] in ("bash", "python", "yaml"), block
        for name, *options in (command[1:] for command in commands(block) if command[0] == "hf-llama3"):
            group.commands[name].make_context(name, options).close()


def test_every_command_is_shown():
    text = "\n".join(block["code"] for page in PAGES for block in blocks(page))
    for command in app.registered_commands:
        name = command.callback.__name__
        assert f"hf-llama3 {name}" in (README.read_text("utf-8") if name == "doctor" else text)


def anchors(page):
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    text = BLOCK.sub("", page.read_text("utf-8"))  # comments in code look like headings
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page):
    for target in (match["target"] for match in LINK.finditer(page.read_text("utf-8"))):
        path, _, anchor = target.partition("#")
        if "://" in path:
            assert path.startswith("https://")
            continue
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target
        # The site holds docs/ alone.
        assert page == README or linked.resolve().is_relative_to(ROOT / "docs"), target


@each_page
def test_files_that_are_named_exist(page):
    for name in IN_THE_TREE.findall(re.sub(r"https://\S+", "", page.read_text("utf-8"))):
        assert (ROOT / name).exists(), name


def test_the_first_page_is_short():
    assert len(README.read_text("utf-8").splitlines()) <= MOST_LINES


def test_the_reading_order_gives_the_six_files_their_lengths():
    text = (ROOT / "docs" / "from-scratch.md").read_text("utf-8")
    rows = dict(re.findall(r"\| `(hf_llama3/\w+\.py)` \| (\d+) \|", text))
    lengths = {name: len((ROOT / name).read_text("utf-8").splitlines()) for name in rows}
    assert {name: int(lines) for name, lines in rows.items()} == lengths and sum(lengths.values()) == 600
