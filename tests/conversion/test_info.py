"""The picture of parameters by part: its numbers are the weights', and it says what it cannot do."""

import re
import subprocess
import sys

import pytest
from checkpoints import hf_model, params, write_meta
from command_line import refuse, run

from hf_llama3.conversion.info import parameters_by_part
from hf_llama3.conversion.opening import open_checkpoint

MODULES = {
    "embedding": ("embed_tokens",),
    "attention": ("self_attn",),
    "feed-forward": ("mlp",),
    "norms": ("norm", "input_layernorm", "post_attention_layernorm"),
    "head": ("lm_head",),
}


@pytest.mark.parametrize("tied", [False, True])
def test_parts_are_those_of_the_weights(tied, tmp_path):
    model = hf_model(tied=tied, num_hidden_layers=3)
    model.save_pretrained(tmp_path / "hf")
    run("convert", tmp_path / "hf", tmp_path / "meta", "--mp", 2)
    theirs = {part: 0 for part in MODULES}
    for name, parameter in model.named_parameters():
        theirs[next(part for part, modules in MODULES.items() if set(modules) & set(name.split(".")))] += (
            parameter.numel()
        )
    for folder in ("hf", "meta"):
        ours = parameters_by_part(open_checkpoint(tmp_path / folder))
        assert {part: sum(layers) for part, layers in ours.items()} == theirs
        assert len(ours["attention"]) == len(ours["feed-forward"]) == 3 and len(ours["head"]) == (not tied)
        assert len(set(ours["attention"])) == 1 and sum(ours["head"]) == (0 if tied else 512 * 64)


def test_picture(tmp_path):
    """An SVG says its texts in comments: every part with its share, also the head that a tied embedding is."""
    write_meta(tmp_path / "meta", params())
    hf_model(tied=True).save_pretrained(tmp_path / "tied")
    for folder, head in (("meta", "32,768, 20.0%"), ("tied", "the embedding's")):
        assert "parameters" in run("inspect", tmp_path / folder, "--plot", tmp_path / "parts.svg").stdout
        texts = "\n".join(re.findall("<!-- (.*?) -->", (tmp_path / "parts.svg").read_text(), re.DOTALL))
        assert all(part in texts for part in MODULES) and head in texts
    run("inspect", tmp_path / "meta", "--plot", tmp_path / "parts.png", "--json")
    assert (tmp_path / "parts.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_drawn(tmp_path, monkeypatch):
    write_meta(tmp_path / "meta", params())
    plot = ["inspect", tmp_path / "meta", "--plot"]
    assert "--plot must end in one of" in refuse(*plot, tmp_path / "a.xyz")
    assert "could not be written (No such file or directory); choose another --plot" in (
        refuse(*plot, tmp_path / "none" / "a.png")
    )
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # importing it raises
    result = run(*plot, tmp_path / "a.png")
    assert 'Note: no picture was drawn; for one, pip install "hf_llama3[plot]"' in result.stderr
    assert "parameters" in result.stdout and not (tmp_path / "a.png").exists()


def test_it_is_drawn_from_headers(tmp_path):
    """Neither torch nor transformers is imported for it."""
    write_meta(tmp_path / "meta", params())
    code = (
        f"import sys; sys.argv = ['hf-llama3', 'inspect', {str(tmp_path / 'meta')!r}, '--plot', "
        f"{str(tmp_path / 'a.png')!r}]\n"
        "from hf_llama3.cli.main import app\n"
        "try: app()\n"
        "except SystemExit: pass\n"
        "assert 'matplotlib.figure' in sys.modules and not {'torch', 'transformers'} & sys.modules.keys()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
