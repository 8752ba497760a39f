"""Folders that contradict themselves: found before a byte is written, in one sentence with what to type next."""

import json
import shlex
import shutil
import subprocess

import pytest
import torch
from checkpoints import SMALL_VOCAB, folder_with_tokenizer, hf_model
from command_line import refuse, run
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_llama3.conversion import convert, inspect
from hf_llama3.errors import UserError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return folder_with_tokenizer(tmp_path_factory.mktemp("made"))


@pytest.fixture
def folder(made, tmp_path):
    shutil.copytree(made, tmp_path / "hf")
    (tmp_path / "hf" / "SHA256SUMS").unlink()
    return tmp_path / "hf"


def change(path, **keys):
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def push(folder):
    return "push", folder, "me/model", "--license", "mit", "--dry-run"


# A token without a row


@pytest.fixture
def padded(folder):
    """A pad token as many trainers add it: to the tokenizer, and not to the embedding."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("[PAD]", normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    change(folder / "tokenizer_config.json", pad_token="[PAD]")
    return folder


SAID = (
    f"has {SMALL_VOCAB} rows, and its tokenizer {SMALL_VOCAB + 1} ids: '[PAD]' ({SMALL_VOCAB}); give them rows: python"
)


def test_a_token_without_a_row_is_found_in_the_plan(padded, tmp_path):
    for more in (["--dry-run"], []):
        assert SAID in refuse("convert", padded, tmp_path / "meta", *more)
    assert not list(tmp_path.glob("meta*"))
    assert SAID in refuse(*push(padded))
    report = convert(padded, tmp_path / "again", to="hf")
    assert any("as in the source; for rows, python -c" in note for note in report.notes)


def test_the_command_that_is_named_gives_rows(padded, tmp_path):
    sentence = refuse("convert", padded, tmp_path / "meta")
    command = shlex.split(sentence.partition("give them rows: ")[2])
    subprocess.run(command, check=True, capture_output=True)
    resized = padded.with_name("hf-resized")
    assert convert(resized, tmp_path / "meta").verification.ok
    assert AutoTokenizer.from_pretrained(resized).pad_token_id < inspect(resized).config["vocab_size"]


def test_padding_without_a_row_does_not_end_a_run(padded, tmp_path):
    (tmp_path / "prompts").write_text("abc\nabc hello world\n")
    together = json.loads(
        run("generate", padded, "--prompts", tmp_path / "prompts", "--max-new-tokens", "3", "--json").stdout
    )
    alone = json.loads(run("generate", padded, "abc", "--max-new-tokens", "3", "--json").stdout)
    assert len(together) == 2 and len(alone[0]["token_ids"]) == 3


@pytest.mark.parametrize("how", ["one", "file"])
def test_a_prompt_with_a_token_without_a_row(how, padded, tmp_path):
    (tmp_path / "prompts").write_text("abc\nabc [PAD]\n")
    prompt = ["abc [PAD]"] if how == "one" else ["--prompts", tmp_path / "prompts"]
    assert f"holds '[PAD]', whose id {SMALL_VOCAB} has no row" in refuse("generate", padded, *prompt)


# A flag that says otherwise than the tensors


def test_push_of_a_head_that_older_readers_would_lose(folder):
    change(folder / "config.json", tie_word_embeddings=True)
    sentence = refuse(*push(folder))
    assert "is true, but there is a head that differs" in sentence
    assert f"push what hf-llama3 convert {folder} {folder}-whole --to hf makes" in sentence
    run("convert", folder, f"{folder}-whole", "--to", "hf")
    run(*push(f"{folder}-whole"))


@pytest.mark.parametrize("to", ["meta", "dcp"])
def test_a_head_that_equals_the_embedding_and_is_one_of_its_own(to, folder, tmp_path):
    """As one has it that was untied to be trained on."""
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert convert(folder, tmp_path / to, to=to).verification.ok
    assert not inspect(tmp_path / to).tied
    convert(tmp_path / to, tmp_path / "back", to="hf")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_head_that_is_missing(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for command in (("inspect", folder), ("generate", folder, "abc"), push(folder)):
        assert "lacks 1 tensor: 'lm_head.weight'; if its head is the embedding, set `tie_word" in refuse(*command)
    change(folder / "config.json", tie_word_embeddings=True)
    assert inspect(folder).tied


# Adapters


def adapter(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "me/base", "peft_type": "LORA"}))
    save_file({"base_model.model.a.lora_A.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("with_config", [True, False])
def test_an_adapter_instead_of_a_model(with_config, folder):
    (folder / "model.safetensors").unlink()
    adapter(folder)
    if not with_config:
        (folder / "config.json").unlink()
    merge = f"hf-llama3 convert me/base {folder}-merged --to hf --adapter {folder}"
    for command in (("inspect", folder), ("generate", folder, "abc"), push(folder)):
        assert refuse(*command).endswith(f"is an adapter, not a model; merge it into its model: {merge}")
    # `convert` puts it into the other format's order, which takes an adapter that is one.
    assert "adapter_config.json lacks `r`; pass what PEFT saved" in refuse("convert", folder, f"{folder}-out")


HOSTILE = [None, 7, "", " ", "--overwrite", "me/ba\u202ese", "me/base\nrm", "m" * 201]


@pytest.mark.parametrize("base", HOSTILE)
def test_an_adapter_whose_model_cannot_be_typed(base, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    assert f"merge it into its model: hf-llama3 convert MODEL {tmp_path}-merged --to hf" in refuse("inspect", tmp_path)


def test_an_adapter_whose_model_has_to_be_quoted(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "my $(base)"}))
    assert f"hf-llama3 convert 'my $(base)' {tmp_path}-merged --to hf" in refuse("inspect", tmp_path)


def test_an_adapter_beside_a_model(folder):
    adapter(folder)
    merge = f"to merge it, hf-llama3 convert me/base {folder}-merged --to hf --adapter {folder}"
    for command in (("convert", folder, f"{folder}-out", "--dry-run"), ("generate", folder, "abc"), push(folder)):
        sentence = refuse(*command)
        assert "holds a model and an adapter beside it; to take the model alone, move adapter_config.json" in sentence
        assert sentence.endswith(merge)
    change(folder / "adapter_config.json", base_model_name_or_path=str(folder))  # which has the adapter beside it
    assert f"hf-llama3 convert MODEL {folder}-merged" in refuse("inspect", folder)
    (folder / "adapter_config.json").unlink()
    assert inspect(folder)


def test_the_adapter_that_torchtune_has_merged(folder):
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    torch.save(weights, folder / "hf_model_0001_0.pt")
    torch.save({"a": torch.zeros(2)}, folder / "adapter_0.pt")
    (folder / "model.safetensors").unlink()
    adapter(folder)
    said = "the adapter beside the weights is left out: torchtune has merged it into them"
    assert said in inspect(folder).inferred


# Another kind of model


def test_a_configuration_of_another_kind(folder):
    change(folder / "config.json", model_type="qwen2")
    for command in (("convert", folder, f"{folder}-out"), ("generate", folder, "abc"), push(folder)):
        sentence = refuse(*command)
        assert (
            f"got 'qwen2'; transformers itself loads others: AutoModelForCausalLM.from_pretrained('{folder}')"
            in sentence
        )


def test_a_configuration_without_its_context(folder):
    """Text is generated with what transformers takes, as a conversion says it."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["max_position_embeddings"]
    path.write_text(json.dumps(config))
    assert run("generate", folder, "abc", "--max-new-tokens", 2).stdout.startswith("abc")


def test_a_configuration_of_no_kind(folder):
    change(folder / "config.json", model_type=None)
    sentence = refuse("convert", folder, f"{folder}-out")
    assert sentence.endswith("""got None; if the model is a Llama, add "model_type": "llama\"""")


def test_weights_of_another_kind(folder):
    names = [f"transformer.h.{layer}.attn.c_attn.weight" for layer in range(30)]
    save_file({name: torch.zeros(2, 2) for name in names}, folder / "model.safetensors")
    for command in (("convert", folder, f"{folder}-out"), ("generate", folder, "abc"), push(folder)):
        assert "it is of another kind than its configuration says: take the configuration that came with" in refuse(
            *command
        )


def test_an_index_and_a_model_without_a_tensor(folder):
    model = hf_model(vocab_size=SMALL_VOCAB)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if "norm" not in name}
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(
        UserError,
        match=r"lacks 5 tensors: .*norm.weight', \.\.\.; take the conf.* or download the files that are missing$",
    ):
        inspect(folder)
