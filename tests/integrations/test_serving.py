"""`transformers serve` and `transformers chat`, the real processes, with the folder that `convert` writes."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from transformers import AutoTokenizer

from hf_llama3 import Llama3ForCausalLM

pytestmark = pytest.mark.integrations
QUESTION = [{"role": "user", "content": "Who sat on the mat?"}]
COMMAND = [sys.executable, "-m", "transformers.cli.transformers"]


@pytest.fixture(scope="module")
def server(folders, tmp_path_factory):
    """The address of a server that has loaded the portable folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    command = [*COMMAND, "serve", str(folders["upstream"]), "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as out:
        process = subprocess.Popen([*command, "--device", "cpu"], stdout=out, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(f"{address}/health", process, log)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=30)


def wait_for(url, process, log, seconds=180):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.3)
    raise TimeoutError(log.read_text())


@pytest.fixture(scope="module")
def answer(folders):
    """What our class says to the question."""
    tokenizer = AutoTokenizer.from_pretrained(folders["upstream"])
    model = Llama3ForCausalLM.from_pretrained(folders["upstream"])
    inputs = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True)


def test_answers_as_our_class(server, folders, answer):
    body = {"model": str(folders["upstream"]), "messages": QUESTION, "max_tokens": 12, "temperature": 0}
    request = urllib.request.Request(
        f"{server}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        reply = json.load(response)
    assert reply["choices"][0]["message"]["content"] == answer
    assert reply["usage"]["completion_tokens"] == 12


def test_chats(server, folders, answer, tmp_path):
    """What is typed is answered, up to the limit; no more is wanted, and `!exit` ends it."""
    flags = ["max_new_tokens=12", "do_sample=False"]
    result = subprocess.run(
        [*COMMAND, "chat", str(folders["upstream"]), server, *flags],
        input=f"{QUESTION[0]['content']}\nN\n!exit\n",
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "0", "COLUMNS": "200", "TERM": "dumb"},  # offline, its client asks nobody
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert answer in result.stdout, (answer, result.stdout)
