"""A folder with the six files loads where this package is not installed, and can be saved again from there."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from parity import GEOMETRY, randomise, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_llama3 import Llama3Config, Llama3ForCausalLM
from hf_llama3.errors import UserError
from hf_llama3.remote_code import AUTO_MAP, CODE_FILES, add_code, code_files, save_with_code


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("remote") / "model"
    torch.manual_seed(0)
    model = Llama3ForCausalLM(Llama3Config(**GEOMETRY)).eval()
    randomise(model)
    save_with_code(model, folder)
    save_file({"logits": model(tokens()).logits.detach().contiguous()}, folder.parent / "expected.safetensors")
    return folder


def run_without_package(code, folder):
    """Run code in a fresh process in which `hf_llama3` cannot be imported."""
    prelude = f"""
        import sys
        sys.modules["hf_llama3"] = None  # importing it raises
        from safetensors.torch import load_file
        import torch
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForQuestionAnswering
        from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification
        folder = {str(folder)!r}
        expected = load_file({str(folder.parent / "expected.safetensors")!r})["logits"]
        tokens = torch.randint(3, 96, (2, 64), generator=torch.Generator().manual_seed(1))
    """
    environment = os.environ | {"HF_MODULES_CACHE": str(folder.parent / "modules")}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(prelude) + textwrap.dedent(code)],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_folder_is_complete(folder):
    assert {path.name for path in folder.iterdir()} >= set(CODE_FILES)
    assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_loads_through_every_auto_class(folder):
    run_without_package(
        """
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        assert type(config).__name__ == "Llama3Config"
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert torch.equal(model(tokens).logits, expected)
        base = AutoModel.from_pretrained(folder, trust_remote_code=True)
        assert torch.equal(model.lm_head(base(tokens).last_hidden_state), expected)
        assert model.generate(tokens[:, :4], max_new_tokens=3, do_sample=False).shape[1] <= 7
        for auto_class in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
            head = auto_class.from_pretrained(folder, trust_remote_code=True)
            assert torch.equal(head.base_model(tokens).last_hidden_state, base(tokens).last_hidden_state)
        head = AutoModelForQuestionAnswering.from_pretrained(folder, trust_remote_code=True)
        assert head(tokens).start_logits.shape == (2, 64)
        """,
        folder,
    )


def test_code_is_short_enough_to_read():
    assert sum(len(content.splitlines()) for content in code_files().values()) <= 600


def test_skipped_logits_without_the_package(folder):
    """The loss that needs no logits stays with the package: the six files alone compute the logits, and the same."""
    run_without_package(
        """
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        output = model(tokens, labels=tokens, skip_logits=True)
        assert torch.equal(output.logits, expected) and torch.equal(output.loss, model(tokens, labels=tokens).loss)
        model.train().skip_logits_in_training = True
        model(tokens, labels=tokens).loss.backward()
        """,
        folder,
    )


def test_can_be_saved_again(folder):
    run_without_package(
        """
        again = folder + "-again"
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).save_pretrained(again)
        model = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
        assert torch.equal(model(tokens).logits, expected)
        base = AutoModel.from_pretrained(again, trust_remote_code=True)
        assert torch.equal(model.lm_head(base(tokens).last_hidden_state), expected)
        """,
        folder,
    )


def test_package_needs_no_trust_and_leaves_no_dangling_map(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is Llama3ForCausalLM
    assert torch.equal(model(tokens()).logits, load_file(folder.parent / "expected.safetensors")["logits"])
    model.save_pretrained(tmp_path)  # without the code, so without the map that points to it
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


def test_code_files_know_only_each_other():
    """`trust_remote_code` copies what `from .x import y` names, found by a regular expression over the text."""
    import ast
    import pathlib

    import hf_llama3

    home = pathlib.Path(hf_llama3.__file__).parent
    siblings = {name.removesuffix(".py") for name in CODE_FILES}
    for name in CODE_FILES:
        for node in ast.walk(ast.parse((home / name).read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module in siblings, f"{name}: {ast.unparse(node)}"
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
                for module in names:
                    assert module.split(".")[0] in {
                        "torch",
                        "transformers",
                        "huggingface_hub",
                        *sys.stdlib_module_names,
                    }


def test_code_goes_only_where_it_belongs(folder, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="must be 'llama3' to carry code, got 'llama'"):
        add_code(tmp_path)
    with pytest.raises(UserError, match="upload that instead of passing push_to_hub=True"):
        save_with_code(None, tmp_path, push_to_hub=True)


def test_adding_code_twice_changes_nothing(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    add_code(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
