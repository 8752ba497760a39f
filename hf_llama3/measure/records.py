"""Measurements written into a model's folder, for its card and for the benchmarks of the Hub."""

import math
import re
import shlex
from pathlib import Path

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from hf_llama3.conversion.provenance import read_evaluations
from hf_llama3.errors import UserError
from hf_llama3.files.atomic import system_errors, write_files
from hf_llama3.files.facts import EVALUATIONS, __version__
from hf_llama3.files.json import to_json

from .evaluation import Evaluation

BENCHMARK = r"(?P<dataset>[\w.-]+/[\w.-]+):(?P<task>[\w.-]+)"
SAME = ("text", "context", "dtype", "quantize")  # a new result replaces one that agrees in these


def check_record(model: str, benchmark: str | None):
    """Raise, before the work, unless its result can be written."""
    if not (Path(model) / "config.json").is_file():
        raise UserError(f"--record writes into a Hugging Face folder, got {model}; convert or download it first")
    if benchmark is not None and not re.fullmatch(BENCHMARK, benchmark):
        raise UserError(f"--benchmark must be OWNER/DATASET:TASK, as its eval.yaml has it, got {benchmark!r}")
    read_evaluations(Path(model))


def record(report: Evaluation, benchmark: str | None = None):
    """Write a result into the folder of its model: for the card and, if it is a benchmark's, for the Hub."""
    folder, text = Path(report.model), Path(report.text).name
    if not math.isfinite(report.perplexity):
        raise UserError(f"--record needs a perplexity that is a number, got {report.perplexity}; it was not put down")
    command = ["hf-llama3", "evaluate", folder.resolve().name, "--text", text, "--context", str(report.context)]
    command += ["--quantize", report.quantize] if report.quantize else ["--dtype", report.dtype]
    facts = report.to_dict() | {"model": folder.resolve().name, "text": text}
    facts |= {"command": shlex.join(command), "hf_llama3": __version__}
    others = [one for one in read_evaluations(folder) if any(one.get(key) != facts[key] for key in SAME)]
    files = {EVALUATIONS: to_json({"evaluations": [*others, facts]})}
    if benchmark is not None:
        dataset, task = re.fullmatch(BENCHMARK, benchmark).groups()
        entry = EvalResultEntry(dataset, task, round(report.perplexity, 4), notes=f"perplexity; {facts['command']}")
        name = f".eval_results/{dataset.replace('/', '--')}--{task}.yaml"
        files[name] = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False).encode()
    with system_errors(folder):
        write_files(folder, files)
