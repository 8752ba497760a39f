"""`hf-llama3 chat` in a process of its own, and `bench`."""

import json
import shutil
import signal
import subprocess
import sys
import threading

import pytest
from command_line import refuse, run
from small import make_model
from transformers import AutoTokenizer

from hf_llama3.cli.printing import size
from hf_llama3.cpu import processor
from hf_llama3.training.tokenizer import character_tokenizer

TEMPLATE = "{% for turn in messages %}{{ turn['role'][0] }}{{ turn['content'] }}{% endfor %}"
TEXT = "".join(map(chr, [*range(32, 127), *range(0x4E00, 0x4E00 + 350)]))  # Chinese is streamed sign by sign


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A model of a chat template that never stops by itself."""
    folder = tmp_path_factory.mktemp("talker")
    make_model(max_position_embeddings=4096, eos_token_id=None).save_pretrained(folder)
    for name, content in character_tokenizer([TEXT], 4096).files.items():
        (folder / name).write_bytes(content)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def chat(folder, lines, *options):
    command = [sys.executable, "-m", "hf_llama3", "chat", str(folder), *map(str, options)]
    how = {"encoding": "utf-8", "errors": "surrogateescape"}  # a line may hold bytes of another encoding
    result = subprocess.run(command, input=lines, capture_output=True, check=False, **how)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    return result.stdout


def answer_to(folder, prompt, tokens):
    """Complete a text that the template would have made."""
    model, tokenizer = (
        make_model(max_position_embeddings=4096, eos_token_id=None),
        AutoTokenizer.from_pretrained(folder),
    )
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    output = model.generate(ids, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_turn_sees_those_before(talker):
    out = chat(talker, "one\n\ncaf\udce9\ntwo\n", "--max-new-tokens", 8)
    first = answer_to(talker, "uone", 8)
    second = answer_to(talker, f"uonea{first}utwo", 8)
    refusal = "a text must be in UTF-8, got '\\udce9' at character 3; write it anew"
    assert out == f"> {first}\n> > {refusal}\n> {second}\n> \n"


def test_a_conversation_that_grows_too_long(talker, tmp_path):
    shutil.copytree(talker, tmp_path / "talker")
    config = json.loads((talker / "config.json").read_text()) | {"max_position_embeddings": 128}
    (tmp_path / "talker" / "config.json").write_text(json.dumps(config))
    out = chat(tmp_path / "talker", "one\ntwo\none\n", "--max-new-tokens", 120)
    first = answer_to(talker, "uone", 120)
    prompt = len(f"uonea{first}utwo")
    assert f"a prompt of {prompt} tokens and 120 new ones must fit the model's context of 128" in out
    assert "The conversation starts afresh." in out and out.count(first) == 2


def test_control_c_stops_the_answer_and_not_the_program(talker):
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_llama3", "chat", str(talker), "--max-new-tokens", "4000"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    watch = threading.Timer(120, process.kill)
    watch.start()
    for line in (b"one\n", b"two\n"):
        process.stdin.write(line)
        process.stdin.flush()
        said = process.stdout.read(60)  # it has begun to answer
        assert len(said) == 60
        process.send_signal(signal.SIGINT)
    rest, errors = process.communicate()
    watch.cancel()
    assert process.returncode == 0 and b"Traceback" not in errors, errors
    assert len(rest) < 9000, "an answer of 4,000 signs takes 12,000 bytes"


def test_without_a_template(talker, tmp_path):
    make_model().save_pretrained(tmp_path)
    for name, content in character_tokenizer([TEXT], 512).files.items():
        (tmp_path / name).write_bytes(content)
    assert "a conversation needs a chat template" in refuse("chat", tmp_path)
    assert "--temperature must be between" in refuse("chat", talker, "--temperature", -1)


def test_bench(talker):
    arguments = ["bench", talker, "--new-tokens", 4, "--batch-size", 2, "--quantize", "int8"]
    report = json.loads(run(*arguments, "--json").stdout)
    assert report["batch_size"] == 2 and report["new_tokens"] == 4 and report["prompt_tokens"] == 64
    assert report["tokens_per_second"] == pytest.approx(2000 / report["milliseconds_per_token"], rel=0.05)
    read = report["weight_gigabytes"] / report["milliseconds_per_token"] * 1e3
    assert report["share_of_read"] == pytest.approx(read / report["read_gigabytes_per_second"], rel=0.05)
    assert 0 < report["share_of_read"] < 2 and report["prefill_tokens_per_second"] > 0
    assert report["device"] == processor.here().name and report["threads"] == processor.threads()
    assert f"weights  {size(report['weight_gigabytes'] * 1e9)}\n" in run(*arguments).stdout
    assert "must fit the model's context of 4096, got 4000 and 100" in refuse(
        "bench", talker, "--prompt-tokens", 4000, "--new-tokens", 100
    )
