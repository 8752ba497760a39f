"""A process that talks to a Hub: it stays for many commands, since to import torch and transformers takes seconds.

It is started with the Hub's address, which the libraries read once; a token may differ from command to command. Its
cache is one as well: give repositories names of their own.
"""

import io
import json
import os
import subprocess
import sys
import traceback
from types import SimpleNamespace
from unittest import mock

from command_line import call


class Client:
    def __init__(self, environment: dict[str, str], folder):
        self.folder = folder  # where the commands run
        environment = os.environ | environment | {"PYTHONPATH": ":".join(filter(None, sys.path))}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, __file__], env=environment, cwd=folder, **pipes)

    def run(self, *arguments, code=0, **environment):
        """Run a command as `command_line.run` does."""
        result = SimpleNamespace(**self.ask(arguments=[str(argument) for argument in arguments], env=environment))
        assert result.code == code, f"exit {result.code}\n{result.stdout}\n{result.stderr}"
        return result

    def refuse(self, *arguments, **environment) -> str:
        """Run a command that must be refused; returns its one sentence, after what the libraries may have logged."""
        result = self.run(*arguments, code=2, **environment)
        lines = [line for line in result.stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and result.stdout == "" and "Traceback" not in result.stderr, result.stderr
        token = environment.get("HF_TOKEN")
        assert not token or token not in result.stderr, "the token was printed"
        return lines[0].removeprefix("error: ")

    def python(self, source: str, **environment):
        """Run Python and return what it calls `result`; what it raises comes back as the name and text of the class."""
        answer = self.ask(source=source, env=environment)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]

    def ask(self, **request):
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)


def serve():
    """Answer requests, a line each, until there are no more."""
    requests, answers = sys.stdin, sys.stdout
    sys.stdout = sys.stderr
    for line in requests:
        request = json.loads(line)
        with mock.patch.dict(os.environ, request["env"]), mock.patch.object(sys, "stdin", io.StringIO()):
            answer = execute(request["source"]) if "source" in request else command(request["arguments"])
        print(json.dumps(answer), file=answers, flush=True)


def command(arguments: list[str]) -> dict:
    try:
        return dict(zip(("code", "stdout", "stderr"), call(*arguments), strict=True))
    except Exception:  # as a process of its own would end
        return {"code": 1, "stdout": "", "stderr": traceback.format_exc()}


def execute(source: str) -> dict:
    names = {}
    try:
        exec(source, names)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"result": names.get("result")}


if __name__ == "__main__":
    serve()
