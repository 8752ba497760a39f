"""A model card says what the folder's files say, in a form that the Hub takes, and keeps what a person wrote."""

import hashlib
import io
import json
import math
import re
import shlex
import shutil
from contextlib import redirect_stdout
from types import SimpleNamespace

import pytest
import torch
from checkpoints import hf_model, params, small_tokenizer, write_meta
from command_line import refuse, run
from gguf import GGUFReader, LlamaFileType
from huggingface_hub import ModelCard, parse_eval_result_entries
from small import make_model
from transformers import AutoModelForCausalLM
from yaml import safe_load

import hf_llama3
from hf_llama3.conversion import convert, inspect
from hf_llama3.measure.bench import weight_bytes
from hf_llama3.model_card import build_card, write_card
from hf_llama3.model_card.card import MARKS, memory_of
from hf_llama3.model_card.licenses import META, license_of_meta
from hf_llama3.presets import PRESETS, config_of


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same model, converted: the portable folder, one for dialogue with its own code, and Meta's."""
    root = tmp_path_factory.mktemp("cards")
    write_meta(root / "meta", params(vocab=516), mp=2, tokenizer=small_tokenizer(root))
    convert(root / "meta", root / "base")
    convert(root / "meta", root / "own", model_type="llama3", instruct=True)
    shutil.copytree(root / "meta", root / "plays" / "original")
    convert(root / "plays" / "original", root / "cast", dtype="float16")
    convert(root / "meta", root / "unverified", verify=False)
    return root


def row(card, name):
    return re.search(rf"^\| {name} \| (.*) \|$", card, re.MULTILINE)[1]


def test_facts(folders):
    card, model = build_card(folders / "base", "mit"), AutoModelForCausalLM.from_pretrained(folders / "base")
    inside = sum(
        weight.numel() for name, weight in model.named_parameters() if "embed" not in name and "head" not in name
    )
    assert row(card, "Parameters") == f"{model.num_parameters():,}, of them {inside:,} outside embedding and head"
    assert row(card, "Weights") == f"bfloat16, {2 * model.num_parameters():,} bytes"
    tokenizer = row(card, "Tokenizer").replace("\\|", "|")
    assert tokenizer == "BPE; begins with `<|begin_of_text|>`; ends with `<|end_of_text|>`"
    lines = [line.replace("\\|", "") for line in card.split("## Use")[0].splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {3}  # two cells in each
    assert row(card, "RoPE") == "theta 500,000" and row(card, "Vocabulary") == "516 tokens"
    unverified = build_card(folders / "unverified", "mit")
    for made, folder in ((card, "base"), (unverified, "unverified")):  # with a list of hashes, and without
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            content = (folders / folder / name).read_bytes()
            assert row(made, name) == f"{len(content):,} | `{hashlib.sha256(content).hexdigest()}`"
    assert "Converted from `meta`: Meta's format, 2 shards.\nAfterwards all 21 tensors were equal" in card
    assert not re.search(r"\bNone\b|\bnan\b|TODO|unknown|\{", card)
    cast = build_card(folders / "cast", "mit")
    assert "Converted from `plays`: Meta's format, 2 shards, cast to float16.\nAfterwards every cast" in cast
    assert "Converted from `meta`" in unverified and "Afterwards" not in unverified


def test_front_matter_as_the_hub_reads_it(folders):
    data = ModelCard(build_card(folders / "base", "apache-2.0")).data
    found = data.to_dict()
    assert [found[key] for key in ("license", "library_name", "pipeline_tag")] == [
        "apache-2.0",
        "transformers",
        "text-generation",
    ]
    assert data.tags == ["llama", "llama-3"]


@pytest.mark.parametrize("name", ["base", "own"])
def test_the_code_of_a_card_runs(name, folders):
    card = build_card(folders / name, "mit", repo_id=str(folders / name))
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert ("trust_remote_code=True" in code, "apply_chat_template" in code) == (
        (True, True) if name == "own" else (False, False)
    )
    assert ("vllm serve" in card) == (name == "base")
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(code, {})
    assert printed.getvalue().strip()


def test_the_command_for_llama_cpp(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    card = build_card(folders / "base", "mit", repo_id=str(folders / "base"))
    run(*shlex.split(re.search("^hf-llama3 (.*) && llama-cli -m model.gguf", card, re.M)[1]))
    written = GGUFReader("model.gguf").fields
    assert written["general.file_type"].contents() == LlamaFileType.MOSTLY_Q8_0
    assert written["tokenizer.ggml.model"].contents() == "gpt2"


@pytest.mark.parametrize("change", ["no tokenizer", "another kind of tokenizer", "another RoPE"])
def test_what_llama_cpp_has_no_place_for(change, folders, tmp_path):
    folder = shutil.copytree(folders / "base", tmp_path / "model")
    path = folder / "tokenizer.json"
    if change == "no tokenizer":
        path.unlink()
    elif change == "another RoPE":
        rope = {"rope_type": "dynamic", "rope_theta": 500000.0, "factor": 2.0}
        hf_model(vocab_size=516, rope_parameters=rope).save_pretrained(folder)
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pre_tokenizer": {"type": "Whitespace"}}))
    assert "vllm serve" in build_card(folder, "mit") and "llama-cli" not in build_card(folder, "mit")


def test_memory():
    """The 3.2-1B: 1.24 billion weights, the head as a copy of the embedding, which stays in bf16."""
    config = config_of("3.2-1B")
    info = SimpleNamespace(
        config=config | {"head_dim": 64}, num_parameters=1_235_814_400, tied=True, head="ForCausalLM"
    )
    memory, embedding = memory_of(info), 128256 * 2048
    assert memory["bf16"] == 2_471_628_800
    assert memory["int8"] == 1_235_814_400 * 8.25 / 8 + 2 * embedding
    assert memory["int4"] == (embedding * 8.25 + (1_235_814_400 - embedding) * 5) / 8 + 2 * embedding
    assert memory["token"] == 16 * 8 * 64 * 2 * 2


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_memory_is_what_optimize_takes(quantize, tied, tmp_path):
    size = {"hidden_size": 256, "intermediate_size": 384, "tie_word_embeddings": tied}
    model = make_model(dtype=torch.bfloat16, **size)
    model.save_pretrained(tmp_path / "model")
    embedding = model.get_input_embeddings().weight.nbytes
    taken = embedding + weight_bytes(hf_llama3.optimize(model, quantize=quantize))
    assert memory_of(inspect(tmp_path / "model"))[quantize] == pytest.approx(taken, rel=0.005)  # norms are left out


def test_a_model_from_gguf(folders, tmp_path):
    run("convert", folders / "base", tmp_path / "model.gguf", "--to", "gguf")
    run("convert", tmp_path / "model.gguf", tmp_path / "again")
    card = build_card(tmp_path / "again", "mit")
    assert "converted from GGUF by hf_llama3" in card and "Converted from `model.gguf`: GGUF.\n" in card


def test_what_a_person_wrote_is_kept(folders, tmp_path):
    folder = tmp_path / "model"
    convert(folders / "base", folder, to="hf")
    path = folder / "README.md"
    write_card(path, build_card(folder, "mit"))
    text = path.read_text()
    text = text.replace("license: mit\n", "license: mit\nlanguage:\n- en\ndatasets: me/plays\n").replace(
        "- llama-3\n", "- llama-3\n- plays\n"
    )
    path.write_text(text.replace(MARKS[0], f"{MARKS[0]}\n## My words\n\nabout {{{{ it }}}}\n"))
    (folder / "generation_config.json").unlink()
    write_card(path, build_card(folder, "apache-2.0"))
    again = path.read_text()
    assert f"{MARKS[0]}\n## My words\n\nabout {{{{ it }}}}\n{MARKS[1]}" in again
    data = ModelCard(again).data
    assert (data.license, data.language, data.datasets, data.tags) == (
        "apache-2.0",
        ["en"],
        "me/plays",
        ["llama", "llama-3", "plays"],
    )
    assert build_card(folder) == again


def test_a_card_that_a_person_wrote_is_not_replaced(folders, tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: mit\n---\nMy own words.\n")
    assert "was not made by this command" in refuse("card", folders / "base", "--license", "mit", "--output", path)
    assert path.read_text().endswith("My own words.\n")
    path.write_text("---\nlicense: mit\n---\n\n")  # keys alone are kept by the new one
    run("card", folders / "base", "--license", "mit", "--output", path)
    assert "## Provenance" in path.read_text()


@pytest.mark.parametrize("content", [MARKS[0], f"{MARKS[1]}\n{MARKS[0]}", f"{MARKS[0]}{MARKS[1]}" * 2])
def test_broken_marks(content, folders, tmp_path):
    convert(folders / "base", tmp_path / "model", to="hf", verify=False)
    (tmp_path / "model" / "README.md").write_text(content)
    assert "once each, in this order; mend them" in refuse("card", tmp_path / "model", "--license", "mit")


def test_licences_of_metas_weights(folders):
    for name in PRESETS:
        version = name.split("-")[0]
        found = license_of_meta(SimpleNamespace(config=config_of(name)), "3.0" if version == "3" else version)
        assert found == f"llama{version}"
    assert license_of_meta(SimpleNamespace(config=config_of("3-8B") | {"vocab_size": 65}), "3.0") is None
    assert license_of_meta(SimpleNamespace(config=config_of("3.2-1B")), "3.0") is None  # which had no such size
    assert license_of_meta(inspect(folders / "base"), "3.0") is None
    for license, terms in META.items():
        card = build_card(folders / "base", license)
        assert f"**{terms.built_with}**" in card and terms.notice in card
    assert "Built with" not in build_card(folders / "base", "llama2")


def test_a_base_on_the_hub(folders, tmp_path):
    """A source in the Hub's cache has a name there, and so has what a model was trained from."""
    source = tmp_path / "models--lab--Llama-Plays" / "snapshots" / "0123"
    convert(folders / "base", source, to="hf", verify=False)
    convert(source, tmp_path / "model", to="hf")
    data = ModelCard(build_card(tmp_path / "model", "mit")).data
    assert data.base_model == "lab/Llama-Plays" and "base_model_relation" not in data.to_dict()
    (tmp_path / "model" / "training.json").write_text(json.dumps(TRAINING | {"source": "lab/Llama-Plays"}))
    data = ModelCard(build_card(tmp_path / "model", "mit")).data
    assert (data.base_model, data.to_dict()["base_model_relation"]) == ("lab/Llama-Plays", "finetune")


def test_measured_results(tmp_path):
    hf_model(vocab_size=516).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("abc abcd " * 50)
    write_meta(tmp_path / "meta", params(vocab=516), tokenizer=small_tokenizer(tmp_path))
    convert(tmp_path / "meta", tmp_path / "converted")
    evaluate = ["evaluate", tmp_path / "converted", "--text", tmp_path / "text.txt", "--record"]
    run(*evaluate)
    run(*evaluate, "--quantize", "int8")
    run(*evaluate, "--benchmark", "lab/plays:held-out")  # measured again, and of a benchmark
    facts = json.loads((tmp_path / "converted" / "evaluations.json").read_text())["evaluations"]
    assert [one["quantize"] for one in facts] == ["int8", None]
    card = build_card(tmp_path / "converted", "mit")
    for one, weights in zip(facts, ("int8", "bfloat16"), strict=True):
        assert (
            f"| text.txt | {weights} | 2048 | {one['tokens']} | {one['loss']:.4f} | {one['perplexity']:.3f} |" in card
        )
    assert "`hf-llama3 evaluate converted --text text.txt --context 2048 --dtype bfloat16`" in card
    results = (tmp_path / "converted" / ".eval_results" / "lab--plays--held-out.yaml").read_text()
    (entry,) = parse_eval_result_entries(safe_load(results))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("lab/plays", "held-out", round(facts[1]["perplexity"], 4))


def test_what_cannot_be_recorded(folders, tmp_path):
    (tmp_path / "text.txt").write_text("abc")
    text = ["--text", tmp_path / "text.txt"]
    assert "--record writes into a Hugging Face folder" in refuse("evaluate", folders / "meta", *text, "--record")
    assert "add --record" in refuse("evaluate", folders / "base", *text, "--benchmark", "a/b:c")
    message = refuse("evaluate", folders / "base", *text, "--record", "--benchmark", "plays")
    assert "--benchmark must be OWNER/DATASET:TASK" in message
    convert(folders / "base", tmp_path / "model", to="hf", verify=False)
    (tmp_path / "model" / "evaluations.json").write_text('{"evaluations": [{"loss": 1}]}')
    model = tmp_path / "model"
    assert "`text` in" in refuse("card", model, "--license", "mit")
    assert "`text` in" in refuse("evaluate", model, *text, "--record")  # before the work
    (model / "evaluations.json").unlink()
    (tmp_path / "text.txt").write_text("abcd b abc")
    with torch.no_grad():
        broken = AutoModelForCausalLM.from_pretrained(model)
        broken.model.norm.weight.fill_(math.nan)
    broken.save_pretrained(model)
    assert "--record needs a perplexity that is a number, got nan" in refuse("evaluate", model, *text, "--record")
    assert not (model / "evaluations.json").exists()


TRAINING = {
    "text": "t",
    "source": None,
    "first_loss": 2.0,
    "validation_loss": 1.0,
    "learning_rate": 0.1,
    "seconds": 1.0,
}
TRAINING |= dict.fromkeys(("steps", "batch_size", "context", "vocab_size", "seed", "best_step"), 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("provenance.json", {"source": 1}, "`source` in"),
        ("provenance.json", {"verified": {"tensors": "all"}}, "`tensors` in"),
        ("training.json", {"first_loss": "low"}, "`first_loss` in"),
        ("training.json", {"source": ["a"]}, "`source` in"),
        ("evaluations.json", {"evaluations": "good"}, "`evaluations` in"),
        ("evaluations.json", {"evaluations": [1]}, "`evaluations` in"),
        ("evaluations.json", {"evaluations": [{}]}, "`text` in"),
    ],
)
def test_facts_of_other_types(name, content, message, folders, tmp_path):
    model = shutil.copytree(folders / "base", tmp_path / "model")
    known = json.loads((model / name).read_text()) if (model / name).exists() else TRAINING
    (model / name).write_text(json.dumps(known | content))
    sentence = refuse("card", model, "--license", "mit")
    assert message in sentence and "remove the file" in sentence


def test_odd_files_are_no_facts(folders, tmp_path):
    model = shutil.copytree(folders / "base", tmp_path / "model")
    (model / "training.json").write_text('{"steps": 3}')  # another tool's
    (model / "norm.py").mkdir()
    (model / "x.safetensors").symlink_to("nowhere")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"].pop("type")
    (model / "tokenizer.json").write_text(json.dumps(tokenizer | {"added_tokens": None}))
    card = build_card(model, "mit")
    assert "## Training" not in card and "norm.py" not in card and "| Tokenizer" not in card
    (model / "tokenizer.json").write_text(json.dumps(tokenizer | {"model": []}))
    assert "`model` in" in refuse("card", model, "--license", "mit")
    (model / "tokenizer.json").write_text(json.dumps(tokenizer | {"added_tokens": None}))
    changed = (model / "tokenizer.json").read_bytes()  # after the list of hashes was made
    assert hashlib.sha256(changed).hexdigest() in card


def test_another_place_for_the_card(folders, tmp_path):
    """What a person wrote into the file that is made again is kept, and in no other."""
    command = ["card", folders / "base", "--license", "mit", "--output", tmp_path / "card.md"]
    run(*command)
    content = (tmp_path / "card.md").read_text()
    (tmp_path / "card.md").write_text(content.replace(MARKS[0], f"{MARKS[0]}\nMy words.\n"))
    run(*command)
    assert "\nMy words.\n" in (tmp_path / "card.md").read_text()
    assert "must be a file for a card" in refuse(*command[:-1], tmp_path)


def test_a_licence_that_the_hub_does_not_list(folders, tmp_path):
    model = shutil.copytree(folders / "base", tmp_path / "model")
    assert "write license: other, license_name and license_link" in refuse("card", model, "--license", "other")
    (model / "README.md").write_text("---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n")
    assert ModelCard(build_card(model)).data.to_dict()["license_name"] == "mine"
    (model / "README.md").write_text("---\nlicense:\n- llama3.1\n- mit\n---\n")
    assert "Built with Llama" in build_card(model)
