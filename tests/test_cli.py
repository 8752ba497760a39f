"""The command line: what it prints, how it exits, and what a user does wrong."""

import json
import shutil
import subprocess
import sys
import time

import pytest
import torch
from checkpoints import hf_model, params, real_tokenizer, write_meta
from command_line import refuse, run
from safetensors.torch import load_file, save_file

from hf_llama3.errors import for_terminal
from hf_llama3.training.tokenizer import tiktoken_tokenizer, train_bpe

TEXT = "The quick brown fox jumps over the lazy dog. " * 400


@pytest.fixture
def meta(tmp_path):
    write_meta(tmp_path / "meta", params())
    return tmp_path / "meta"


@pytest.fixture
def hf(tmp_path):
    hf_model().save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A model folder with a tokenizer, and the same in Meta's format."""
    folder = tmp_path_factory.mktemp("talker") / "hf"
    folder.mkdir()
    made = tiktoken_tokenizer(train_bpe([TEXT], 600), context=64)
    files, vocabulary = made.files, made.vocabulary
    for name, content in files.items():
        (folder / name).write_bytes(content)
    hf_model(**vocabulary, max_position_embeddings=64, dtype=torch.float32).save_pretrained(folder)
    run("convert", folder, folder.parent / "meta")
    return folder


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What works


def test_version_and_help():
    assert run("--version", fresh=True).stdout.startswith("hf-llama3 0.")
    started = time.perf_counter()
    help_text = run("--help").stdout
    assert time.perf_counter() - started < 10  # about 0.3 s on an idle machine; this only catches an import of torch
    for command in ("quickstart", "inspect", "convert", "verify", "generate", "train", "card"):
        assert command in help_text
        assert f"Example: hf-llama3 {command}" in " ".join(run(command, "--help").stdout.split())


@pytest.mark.parametrize("command", ["--help", "inspect", "convert", "verify"])
def test_light_commands_import_neither_torch_nor_transformers(command, meta, tmp_path):
    arguments = {
        "--help": ["--help"],
        "inspect": ["inspect", str(meta)],
        "convert": ["convert", str(meta), str(tmp_path / "hf")],
        "verify": ["verify", str(meta), str(meta)],
    }[command]
    code = (
        f"import sys; sys.argv = ['hf-llama3', *{arguments!r}]\n"
        "from hf_llama3.cli.main import app\n"
        "try: app()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys(), [m for m in sys.modules if m.startswith('t')]"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_command_ends_without_a_search_for_garbage():
    code = (
        "import atexit, gc, sys; atexit.register(lambda: print(gc.get_freeze_count()))\n"
        "from hf_llama3.cli.main import main; sys.argv = ['hf-llama3', '--version']; main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout.splitlines()[-1]) > 0


def test_inspect(meta):
    info = json.loads(run("inspect", meta, "--json", fresh=True).stdout)
    assert (info["format"], info["num_shards"], info["dtype"], info["tied"]) == ("meta", 1, "bfloat16", False)
    assert info["config"]["num_key_value_heads"] == 4
    assert any("no tokenizer" in sentence for sentence in info["inferred"])
    table = run("inspect", meta).stdout
    assert "parameters" in table and not any(word in table for word in ("None", "[]", "{"))
    assert "\n  num_key_value_heads: 4\n" in table and "Next: hf-llama3 convert" in table


def test_convert_both_ways_and_verify(meta, tmp_path):
    report = json.loads(run("convert", meta, tmp_path / "hf", "--json").stdout)
    assert report["verification"]["ok"] and "model.safetensors" in report["files"]
    assert "21 tensors equal to the bit" in run("convert", tmp_path / "hf", tmp_path / "again", "--to", "meta").stdout
    assert json.loads(run("verify", meta, tmp_path / "again", "--json").stdout)["ok"]
    assert "ok" in run("verify", meta, tmp_path / "again").stdout
    assert json.loads(run("verify", meta, tmp_path / "again", "--logits", "--json").stdout)["logits"]["tokens"] == 32


def test_dry_run_writes_nothing(meta, tmp_path):
    report = json.loads(run("convert", meta, tmp_path / "hf", "--dry-run", "--json").stdout)
    assert report["dry_run"] and report["tensors"] == 21 and report["verification"] is None
    assert not list(tmp_path.glob("hf*"))


def test_verify_says_no(meta, tmp_path):
    run("convert", meta, tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    weights["model.norm.weight"][3] += 1
    save_file(weights, tmp_path / "hf" / "model.safetensors")
    result = run("verify", meta, tmp_path / "hf", code=1)
    assert "Different: model.norm.weight: by up to" in result.stdout


@pytest.mark.parametrize("form", ["hf", "meta"])
def test_generate(form, talker):
    folder = talker.parent / form
    arguments = ["generate", folder, "The quick", "--max-new-tokens", 5]
    completions = json.loads(run(*arguments, "--json", fresh=True).stdout)
    assert [completion["prompt"] for completion in completions] == ["The quick"]
    assert 0 < len(completions[0]["token_ids"]) <= 5
    again = run("generate", folder, "The quick", "--max-new-tokens", 5).stdout
    assert again == for_terminal("The quick" + completions[0]["text"] + "\n")


def test_generate_from_a_file(talker, tmp_path):
    (tmp_path / "prompts.txt").write_text("The\nThe quick brown fox\n")
    arguments = ["--prompts", tmp_path / "prompts.txt", "--max-new-tokens", 8, "--json"]
    together = json.loads(run("generate", talker, *arguments).stdout)
    assert [completion["prompt"] for completion in together] == ["The", "The quick brown fox"]
    for completion in together:
        alone = json.loads(run("generate", talker, completion["prompt"], "--max-new-tokens", 8, "--json").stdout)
        assert alone == [completion]
    sampled = [run("generate", talker, *arguments, "--temperature", 1, "--seed", seed).stdout for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_train_and_card(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    shape = ["--layers", 1, "--hidden-size", 32, "--heads", 2, "--kv-heads", 1, "--context", 16]
    report = json.loads(
        run(
            *("train", "--text", tmp_path / "text.txt", "--output", tmp_path / "out", *shape, "--steps", 3),
            *("--tokenizer", "bpe:530", "--license", "mit", "--json"),
        ).stdout
    )
    assert report["steps"] == 3 and report["vocab_size"] == 530
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    options = ["--from", tmp_path / "out", "--text", tmp_path / "text.txt", "--steps", 2, "--context", 16]
    table = run("train", *options, "--output", tmp_path / "again").stdout
    assert "continued from   out\n" in table and " before, in nats per token\n" in table
    card = run("card", tmp_path / "out", "--print").stdout
    assert card.startswith("---\nlicense: mit\n") and "3 steps of" in card
    run("card", tmp_path / "out", "--license", "apache-2.0", "--output", tmp_path / "card.md")
    assert (tmp_path / "card.md").read_text().startswith("---\nlicense: apache-2.0\n")
    assert str(tmp_path / "out" / "README.md") in run("card", tmp_path / "out", "--license", "apache-2.0").stdout
    assert (tmp_path / "out" / "README.md").read_text().startswith("---\nlicense: apache-2.0\n")
    run("convert", tmp_path / "out", tmp_path / "meta", "--mp", 1)
    run("generate", tmp_path / "meta", "The quick", "--max-new-tokens", 3)


# What a user does wrong: one sentence, exit 2, nothing written or changed


def refused_without_a_trace(tmp_path, *arguments):
    before = snapshot(tmp_path)
    sentence = refuse(*arguments)
    assert snapshot(tmp_path) == before
    return sentence


def test_missing_folder(tmp_path):
    sentence = refused_without_a_trace(tmp_path, "convert", tmp_path / "nothing", tmp_path / "out")
    assert sentence == f"error: {tmp_path}/nothing does not exist; pass the folder of a checkpoint"


def test_file_for_a_folder(meta, tmp_path):
    sentence = refused_without_a_trace(tmp_path, "inspect", meta / "consolidated.00.pth")
    assert sentence.endswith(f"is a file; pass the folder that holds it, {meta}")


def test_neither_format(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "is neither a Hugging Face folder (config.json) nor one of Meta's (params.json); it holds nothing" in (
        refused_without_a_trace(tmp_path, "inspect", tmp_path / "empty")
    )


def test_shards_without_params(meta, tmp_path):
    (meta / "params.json").unlink()
    assert "holds consolidated.00.pth but no params.json" in refused_without_a_trace(tmp_path, "inspect", meta)


def test_params_without_shards(meta, tmp_path):
    (meta / "consolidated.00.pth").unlink()
    assert "holds no consolidated.00.pth" in refused_without_a_trace(tmp_path, "convert", meta, tmp_path / "out")


def test_missing_shard(tmp_path):
    write_meta(tmp_path / "meta", params(), mp=4)
    (tmp_path / "meta" / "consolidated.02.pth").unlink()
    sentence = refused_without_a_trace(tmp_path, "convert", tmp_path / "meta", tmp_path / "out")
    assert "lacks shard 2 of 4 (consolidated.02.pth); download it" in sentence


def test_adapter(tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    assert "is an adapter, not a model; merge it" in refused_without_a_trace(tmp_path, "inspect", tmp_path / "lora")


def test_pickled_weights(hf, tmp_path):
    (hf / "model.safetensors").rename(hf / "pytorch_model.bin")
    sentence = refused_without_a_trace(tmp_path, "convert", hf, tmp_path / "out")
    assert "pytorch_model.bin is not a readable PyTorch checkpoint" in sentence


def test_configuration_without_weights(hf, tmp_path):
    (hf / "model.safetensors").unlink()
    assert "no model.safetensors and no" in refused_without_a_trace(tmp_path, "convert", hf, tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_size", 128, "config.json makes model.embed_tokens.weight [512, 128], but it is [512, 64]"),
        ("num_hidden_layers", 3, "lacks 9 tensors: 'model.layers.2.input_layernorm.weight'"),
        ("num_hidden_layers", 1, "holds 9 unknown tensors: 'model.layers.1.input_layernorm.weight'"),
        (
            "num_key_value_heads",
            8,
            "config.json makes model.layers.0.self_attn.k_proj.weight [64, 64], but it is [32, 64]",
        ),
        ("intermediate_size", 100, "config.json makes model.layers.0.mlp.gate_proj.weight [100, 64]"),
    ],
)
def test_configuration_against_tensors(key, value, message, hf, tmp_path):
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {key: value}))
    assert message in refused_without_a_trace(tmp_path, "convert", hf, tmp_path / "out")


def test_params_against_tensors(meta, tmp_path):
    (meta / "params.json").write_text(json.dumps(params(kv_heads=2)))
    sentence = refused_without_a_trace(tmp_path, "convert", meta, tmp_path / "out")
    assert "params.json makes model.layers.0.self_attn.k_proj.weight [16, 64], but it is [32, 64]" in sentence
    assert "in consolidated.00.pth" in sentence


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("norm.weight"), "lacks 1 tensor: 'norm.weight'"),
        (lambda w: w.update(extra=torch.zeros(2)), "holds 1 unknown tensor: 'extra'; take the configuration that came"),
        (lambda w: w.update({"norm.weight": torch.zeros(65)}), "makes model.norm.weight [64], but it is [65]"),
        (lambda w: w.pop("tok_embeddings.weight"), "lacks 1 tensor: 'tok_embeddings.weight'"),
    ],
)
def test_tensors_of_meta(change, message, meta, tmp_path):
    weights = torch.load(meta / "consolidated.00.pth", weights_only=True)
    change(weights)
    torch.save(weights, meta / "consolidated.00.pth")
    assert message in refused_without_a_trace(tmp_path, "convert", meta, tmp_path / "out")


def test_target_exists(meta, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep me")
    sentence = refused_without_a_trace(tmp_path, "convert", meta, tmp_path / "out")
    assert sentence.endswith("out already exists; choose another target or add --overwrite")
    sentence = refused_without_a_trace(tmp_path, "convert", meta, tmp_path / "out", "--overwrite")
    assert "is no checkpoint, so it is not overwritten" in sentence
    (tmp_path / "out" / "config.json").write_text("{}")  # now it looks like one, but for what somebody put there
    sentence = refused_without_a_trace(tmp_path, "convert", meta, tmp_path / "out", "--overwrite")
    assert "out also holds 'mine.txt', which no conversion makes, so it is not overwritten; move that" in sentence
    (tmp_path / "out" / "mine.txt").unlink()
    run("convert", meta, tmp_path / "out", "--overwrite")
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"meta", "out"}


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--as", "llama3", "--instruct"),
        ("--to", "meta", "--mp", "2"),
        ("--to", "dcp"),
        ("--to", "dcp", "--as", "torchtitan"),
    ],
    ids=" ".join,
)
def test_what_was_made_can_be_overwritten(options, talker, tmp_path):
    """Nothing that a conversion makes is in the way of the next."""
    source = talker.parent / "meta"
    for more in ((), ("--overwrite",)):
        run("convert", source, tmp_path / "made", *options, *more)
    run("convert", tmp_path / "made", tmp_path / "back", *(() if "meta" in options else ("--to", "meta")))
    run("convert", source, tmp_path / "back", "--overwrite")


def test_empty_target_is_taken(meta, tmp_path):
    (tmp_path / "out").mkdir()
    run("convert", meta, tmp_path / "out")


@pytest.mark.parametrize("target", ["meta", "meta/inside", "."])
def test_target_within_source(target, meta, tmp_path):
    sentence = refused_without_a_trace(tmp_path, "convert", meta, tmp_path / target, "--overwrite")
    assert "must be apart; choose another target" in sentence


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mp", 3], "--mp must divide `num_attention_heads` 8"),
        (["--mp", 0], "--mp must divide `num_attention_heads` 8"),
        (["--to", "onnx"], "--to must be one of ('hf', 'meta', 'dcp', 'gguf'), got 'onnx'"),
        (["--as", "mistral"], "--as must be 'llama' or 'llama3', or 'torchtitan' with --to dcp, got 'mistral'"),
        (["--to", "hf", "--mp", 2], "--mp divides a checkpoint of Meta's format, got 2 with --to hf"),
        (["--llama-version", "5"], "--llama-version must be one of"),
        (["--rope-factor", "0.5"], "--rope-factor must be a number of at least 1, got 0.5"),
        (["--rope-factor", "nan"], "--rope-factor must be a number of at least 1, got nan"),
        (["--rope-factor", "8"], "does not scale RoPE"),
        (["--dtype", "q8_0"], "got 'q8_0'; add --to gguf and let TARGET end with .gguf"),
        (["--dtype", "int8"], "--dtype must be one of ['bfloat16', 'float16', 'float32', 'float64'], got 'int8'"),
        (["--to", "meta", "--as", "llama3"], "--as is for a Hugging Face target, got 'llama3' with --to meta"),
        (["--to", "meta", "--max-shard-size", "1GB"], "--max-shard-size is for a Hugging Face target"),
        (["--max-shard-size", "lots"], "--max-shard-size must be a number with one of"),
    ],
)
def test_impossible_options(options, message, meta, tmp_path):
    assert message in refused_without_a_trace(tmp_path, "convert", meta, tmp_path / "out", *options)


def test_rope_factor_is_asked_for(tmp_path):
    write_meta(tmp_path / "meta", params(use_scaled_rope=True))
    sentence = refused_without_a_trace(tmp_path, "convert", tmp_path / "meta", tmp_path / "out")
    assert "add --rope-factor (8 in Llama 3.1 and 3.3, 32 in Llama 3.2)" in sentence
    run("convert", tmp_path / "meta", tmp_path / "out", "--rope-factor", 8)


def test_tokenizer_of_another_model(tmp_path):
    write_meta(tmp_path / "meta", params(), tokenizer=real_tokenizer())
    sentence = refused_without_a_trace(tmp_path, "convert", tmp_path / "meta", tmp_path / "out")
    assert "makes 128256 ids, but the embedding has 512 rows; it belongs to another model" in sentence


def test_prompt_beyond_the_context(talker):
    sentence = refuse("generate", talker, "The quick brown fox " * 30, "--max-new-tokens", 5)
    assert "must fit the model's context of 64; shorten the prompt or lower --max-new-tokens" in sentence


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either a prompt or --prompts with a file"),
        (["hi", "--prompts", "x"], "give either a prompt or --prompts with a file"),
        (["--prompts", "nowhere.txt"], "--prompts must name a file, got nowhere.txt, where there is nothing"),
        (["hi", "--dtype", "float8_e4m3fn"], "--dtype must be one of ('auto', 'float32', 'bfloat16', "),
        (["hi", "--max-new-tokens", 0], "--max-new-tokens must be between 1 and inf, got 0"),
        (["hi", "--temperature", -1], "--temperature must be between 0 and 100, got -1"),
        (["hi", "--temperature", "nan"], "--temperature must be between 0 and 100, got nan"),
        (["hi", "--top-p", 2], "--top-p must be between 1e-06 and 1, got 2"),
        (["hi", "--seed", -1], "--seed must be between 0 and"),
        (["hi", "--rope-factor", 8], "--rope-factor is for Meta's format"),
        (["--prompts", "/dev/null"], "got /dev/null, where there is a folder or a pipe"),
    ],
)
def test_impossible_generation(options, message, talker):
    assert message in refuse("generate", talker, *options)


def test_model_without_tokenizer(meta):
    assert "holds no tokenizer, without which there is no text" in refuse("generate", meta, "hi")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"short"), "is not a whole safetensors file"),
        (lambda f: edit_json(f / "config.json", hidden_size=128), "64] in model.safetensors"),
        (lambda f: edit_json(f / "config.json", model_type="bert"), "`model_type` in"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "is not valid JSON"),
        (lambda f: drop_tensor(f, "model.norm.weight"), "lacks 1 tensor: 'model.norm.weight'"),
    ],
)
def test_damaged_model(damage, message, talker, tmp_path):
    """Nothing is generated from weights that are not there: the library would draw them at random and go on."""
    shutil.copytree(talker, tmp_path / "damaged")
    damage(tmp_path / "damaged")
    assert message in refuse("generate", tmp_path / "damaged", "hi")


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_tensor(folder, name):
    weights = load_file(folder / "model.safetensors")
    weights.pop(name)
    save_file(weights, folder / "model.safetensors")


def test_unknown_model():
    assert "no/such-model cannot be loaded" in refuse("generate", "no/such-model", "hi")


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"\xff\xfea\x00", [], "must be text in UTF-8, but byte 0 is 0xff; convert it first"),
        (b"  \n", [], "must hold text, got 3 characters of white space"),
        (b"short", ["--tokenizer", "bpe:560"], "is too short: its training part has 1 tokens and needs 129"),
        (b"aaaaaaaaaaaa", ["--tokenizer", "char"], "must have at least two different characters to learn, got ['a']"),
        (TEXT.encode(), ["--context", 100000], "is too short: its training part has"),
        (b"", [], "must hold text, got 0 characters"),
        (
            TEXT.encode(),
            ["--preset", "huge"],
            "--preset must be one of ['shakespeare-cpu', 'shakespeare-gpu'], got 'huge'",
        ),
        (TEXT.encode(), ["--license", "MIT: yes"], "--license must be an identifier of the Hub, such as apache-2.0"),
        (
            TEXT.encode(),
            ["--validation-share", 0.6, "--test-share", 0.5],
            "must leave text to train on, got 0.6 and 0.5",
        ),
        (TEXT.encode(), ["--lora", 4], "--lora adapts a trained model, got --lora 4 without --from"),
        (TEXT.encode(), ["--from", "nowhere"], "nowhere does not exist"),
        (TEXT.encode(), ["--from", "x", "--layers", 2, "--heads", 4], "got --layers and --heads; leave them out"),
        (TEXT.encode(), ["--from", "x", "--preset", "shakespeare-cpu"], "got --preset; leave them out"),
        (TEXT.encode(), ["--from", "x", "--lora", 4, "--matrix-learning-rate", 0.1], "must be 0 with --lora, got 0.1"),
        (TEXT.encode(), ["--tokenizer", "/"], "/ must hold tokenizer.json, or Llama 3's tokenizer.model"),
        (
            TEXT.encode(),
            ["--batch-size", 3, "--accumulate", 2],
            "must be a multiple of processes x --accumulate, got 3",
        ),
        (TEXT.encode(), ["--tokenizer", "bpe:10"], "bpe:N must have at least 512 tokens"),
        (TEXT.encode(), ["--heads", 5], "no model has this shape: `hidden_size` must be a multiple of"),
        (TEXT.encode(), ["--kv-heads", 4], "no model has this shape: `num_attention_heads` must be a multiple of"),
        (TEXT.encode(), ["--steps", 0], "--steps must be at least 1, got 0"),
        (TEXT.encode(), ["--batch-size", 0], "--batch-size must be at least 1, got 0"),
        (TEXT.encode(), ["--seed", -1], "--seed must be between 0 and 4294967295, got -1"),
        (TEXT.encode(), ["--learning-rate", "nan"], "--learning-rate must be positive, got nan"),
        (TEXT.encode(), ["--tokenizer", "bpe:²"], "bpe:N with a number of tokens, or a folder with one, got 'bpe:²'"),
        (TEXT.encode(), ["--tokenizer", "word"], "bpe:N with a number of tokens, or a folder with one, got 'word'"),
    ],
)
def test_impossible_training(content, options, message, tmp_path):
    (tmp_path / "text.txt").write_bytes(content)
    arguments = ["train", "--text", tmp_path / "text.txt", "--output", tmp_path / "out"]
    assert message in refused_without_a_trace(tmp_path, *arguments, *options)


def test_output_that_cannot_be_made(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    for output in (tmp_path / "text.txt", tmp_path / "text.txt" / "out"):
        for command in (["train", "--text", tmp_path / "text.txt"], ["quickstart"]):
            sentence = refused_without_a_trace(tmp_path, *command, "--output", output)
            assert "already exists" in sentence or "cannot be made" in sentence
    sentence = refused_without_a_trace(
        tmp_path, "quickstart", "--text", tmp_path / "no.txt", "--output", tmp_path / "o"
    )
    assert "no.txt cannot be read" in sentence


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"---\nlicense: mit\n---\n", [], None),
        (b"---\r\nlicense: mit\r\n---\r\n", [], None),
        (b"\xff\xfe", [], "README.md cannot be read as UTF-8 text"),
        (b"", ["--license", "MIT: yes"], "--license must be an identifier of the Hub, such as apache-2.0"),
        (b"", ["--license", "mit", "--output", "/nowhere/card.md"], "/nowhere/card.md could not be written"),
    ],
)
def test_card_of_a_folder_that_people_wrote_in(content, options, message, hf):
    (hf / "README.md").write_bytes(content)
    (hf / "training.json").write_text('{"mine": 1}')  # not what this package's training leaves
    if message is None:
        assert run("card", hf, *options, "--print").stdout.startswith("---\nlicense: mit\n")
    else:
        assert message in refuse("card", hf, *options)


def test_card_needs_a_licence(hf, meta):
    assert "has no licence yet; add --license with the one you choose" in refuse("card", hf)
    assert "is in Meta's format; convert it first" in refuse("card", meta, "--license", "mit")
