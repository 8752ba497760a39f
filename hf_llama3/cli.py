"""The command line: each command parses, calls one function and prints what it returned.

Exit codes: 0 done, 1 a check said no, 2 a user's error in one sentence, 130 Ctrl-C.
"""

import atexit
import gc
import json
import os
import sys
import time
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

import typer

from . import __version__
from .errors import UserError
from .generation.defaults import BATCH_SIZE, DEVICE_MAPS, DTYPES, MAX_NEW_TOKENS, PARALLEL, QUANTIZATIONS
from .training.settings import PRESETS, Settings, make_settings

app = typer.Typer(
    help="Llama 3 as a Hugging Face model package, and the bridge to Meta's checkpoint format.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
UsageError = typer.BadParameter.__base__  # click's, which typer carries under names that change


def one_of(*names: str) -> dict:
    """Make an option complete to these names on Tab; what is nearly one of them is asked about."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    def check(option: typer.CallbackParam, value):
        near = get_close_matches(str(value).lower(), names, 1, cutoff=0.8)
        if near and value not in names:
            raise UserError(f"{option.opts[0]} has no {value!r}; did you mean {near[0]!r}?")
        return value

    return {"autocompletion": complete, "callback": check}


SECONDS_TO_SPEAK = 20  # by which the first of several processes is as far as the others
SETTINGS = {field.name for field in fields(Settings)}
HUB_NAME = "owner/name on the Hub, which @revision may follow"
ModelArgument = Annotated[str, typer.Argument(help=f"Folder of either format, or {HUB_NAME}.")]
DtypeOption = Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.", **one_of(*DTYPES))]
QuantizeOption = Annotated[
    str | None, typer.Option(help=f"Weights of {' or '.join(QUANTIZATIONS)}.", **one_of(*QUANTIZATIONS))
]
CompileFlag = Annotated[bool, typer.Option("--compile", help="Decode by a compiled step; to compile takes a minute.")]
RopeOption = Annotated[float | None, typer.Option(help="Of a directory of Meta's, where no file says it.")]
MaxNewOption = Annotated[int, typer.Option(help="At most, for each prompt.")]
TemperatureOption = Annotated[float, typer.Option(help="0 takes the likeliest token each time.")]
TopPOption = Annotated[float, typer.Option(help="Sample from the likeliest tokens of this share.")]
DeviceMapOption = Annotated[
    str | None, typer.Option(help=f"Layers over devices: {', '.join(DEVICE_MAPS)}.", **one_of(*DEVICE_MAPS))
]
MemoryOption = Annotated[str | None, typer.Option(help='JSON: what each device may take, as {"0": "20GiB"}.')]
SeedOption = Annotated[int, typer.Option(help="Of the sampling.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]


def main():
    atexit.register(gc.freeze)  # or Python would search all that was imported for garbage at its end, for a second
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character shows its number
    try:
        sys.exit(app(prog_name="hf-llama3", standalone_mode=False))
    except UserError as error:
        sys.exit(fail(str(error)))
    except UsageError as error:
        sys.exit(fail(describe(error)))
    except typer.Abort:
        sys.exit("Aborted!")


def fail(message: str) -> int:
    """Print a user's error and return its exit code."""
    torch = sys.modules.get("torch")
    if os.environ.get("LOCAL_RANK", "0") != "0" and not (torch and torch.distributed.is_initialized()):
        # What is wrong before processes have joined is wrong in all of them: one on each machine says so. torchrun ends
        # all at the first that ends, which must not be one of the others.
        time.sleep(SECONDS_TO_SPEAK)
        return 2
    process = "" if is_first_process() else f" (process {os.environ['RANK']})"
    print(f"error{process}: {message}", file=sys.stderr)
    return 2


def describe(error: UsageError) -> str:
    """Return what is wrong with a command as it was typed, and what to type instead."""
    message = error.format_message()
    example = error.ctx and error.ctx.command.epilog
    return f"{message}{'' if message.endswith(('.', '?')) else '.'} {example or 'Try: hf-llama3 --help'}"


def is_first_process() -> bool:
    """Whether this process is alone or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def command(example: str):
    """Register a command whose `--help` ends with a worked example."""
    return app.command(epilog=f"Example: {example}")


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
):
    if version:
        print(f"hf-llama3 {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@command("hf-llama3 quickstart --output quickstart")
def quickstart(
    output: Annotated[Path, typer.Option(help="Folder to make: OUTPUT/hf, OUTPUT/meta, OUTPUT/hf-again.")] = Path(
        "quickstart"
    ),
    text: Annotated[Path | None, typer.Option(help="Text to train on; Python's own documentation if omitted.")] = None,
):
    """Train a small Llama 3, convert it to Meta's format and back, verify, generate: all in two minutes."""
    from .quickstart import quickstart

    quickstart(output, text)


@command("hf-llama3 inspect Meta-Llama-3-8B/original")
def inspect(
    path: ModelArgument,
    rope_factor: Annotated[float | None, typer.Option(help="RoPE factor, where no file says it.")] = None,
    device_map: DeviceMapOption = None,
    max_memory: MemoryOption = None,
    plot: Annotated[
        Path | None, typer.Option(help="Picture to draw: parameters by part; with --device-map, what goes where.")
    ] = None,
    as_json: JsonFlag = False,
):
    """Say what a checkpoint is, what had to be inferred, and where its layers would go (--device-map)."""
    from .conversion import inspect

    info = inspect(path, rope_factor).to_dict()
    placement = note = None
    if device_map is not None:
        from .generation.placement import place_checkpoint, plot_placement

        placement = place_checkpoint(path, rope_factor, device_map, max_memory)
        note = plot_placement(placement, plot) if plot else None
    elif max_memory is not None:
        raise UserError("--max-memory says more of --device-map; add --device-map auto")
    elif plot is not None:
        from .conversion.parts import plot_parts

        note = plot_parts(path, rope_factor, plot)
    if note:
        print(f"Note: {note}", file=sys.stderr)
    if as_json:
        print_json(info | ({"placement": placement.to_dict()} if placement else {}))
        return
    config, inferred = info.pop("config"), info.pop("inferred")
    print_table(info | {f"config.{key}": value for key, value in config.items()})
    print_list("Inferred", inferred)
    if placement:
        print_table(placement.table())


@command("hf-llama3 convert Meta-Llama-3-8B/original llama-3-8b")
def convert(
    source: Annotated[str, typer.Argument(help=f"Folder of either format, which is not changed, or {HUB_NAME}.")],
    target: Annotated[Path, typer.Argument(help="Folder to make.")],
    to: Annotated[
        str | None, typer.Option(help="hf or meta; the format that SOURCE is not, if omitted.", **one_of("hf", "meta"))
    ] = None,
    mp: Annotated[int | None, typer.Option(help="Model-parallel shards of a Meta target.")] = None,
    model_type: Annotated[
        str | None,
        typer.Option(
            "--as",
            help="llama (default): every tool reads it; llama3: our type, with its code.",
            **one_of("llama", "llama3"),
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Type to cast to; every tensor keeps its own if omitted.")] = None,
    rope_factor: Annotated[float | None, typer.Option(help="RoPE factor, where no file says it.")] = None,
    llama_version: Annotated[
        str | None, typer.Option(help="2, 3.0, 3.1, 3.2 or 3.3, where the inferred one is wrong.")
    ] = None,
    instruct: Annotated[
        bool | None, typer.Option("--instruct/--base", help="Whether a Meta checkpoint was tuned for dialogue.")
    ] = None,
    max_shard_size: Annotated[str | None, typer.Option(help="Largest safetensors file, 5GB if omitted.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and plan all, write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace TARGET once the new one is whole.")] = False,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Compare every tensor to the bit after.")] = True,
    as_json: JsonFlag = False,
):
    """Convert Meta's format to Hugging Face's or back, or divide Meta's into other shards (--to meta --mp N)."""
    from .conversion import convert

    report = convert(
        source,
        target,
        to,
        mp,
        model_type=model_type,
        dtype=dtype,
        rope_factor=rope_factor,
        llama_version=llama_version,
        instruct=instruct,
        max_shard_size=max_shard_size,
        dry_run=dry_run,
        overwrite=overwrite,
        verify=verify,
        progress=True,
    ).to_dict()
    if as_json:
        print_json(report)
        return
    files, inferred, notes = report.pop("files"), report.pop("inferred"), report.pop("notes")
    verification, source_files = report.pop("verification"), report.pop("source_files")
    report["verified"] = f"{verification['tensors']} tensors bit-equal" if verification else "no"
    listed = {f"reads {name}": size for name, size in source_files.items()}
    listed |= {f"writes {name}": size for name, size in files.items()}
    print_table(report | {name: f"{size:,} bytes" for name, size in listed.items()})
    print_list("Inferred", inferred)
    print_list("Note", notes)


@command("hf-llama3 verify Meta-Llama-3-8B/original llama-3-8b")
def verify(
    source: Annotated[Path, typer.Argument(help="Folder of either format.")],
    target: Annotated[Path, typer.Argument(help="Folder of either format.")],
    logits: Annotated[bool, typer.Option("--logits", help="Compute the logits of both as well, streamed.")] = False,
    as_json: JsonFlag = False,
):
    """Compare two checkpoints: every tensor to the bit, the configuration, the tokenizer; exit 1 if they differ."""
    from .conversion import verify

    report = verify(source, target, logits, progress=True).to_dict()
    if as_json:
        print_json(report)
    else:
        differences = report.pop("differences")
        print_table(report)
        print_list("Different", differences)
    if not report["ok"]:
        raise typer.Exit(1)


def default(name: str) -> str:
    """Say what an option of `train` is where neither it nor a preset says."""
    return f"{getattr(Settings, name)} if omitted, save by a preset."


@command("hf-llama3 train --text tinyshakespeare.txt --output runs/shakespeare --preset shakespeare-cpu")
def train(
    text: Annotated[Path, typer.Option(help="Text in UTF-8, of any size.")],
    output: Annotated[Path, typer.Option(help="Model folder to make.")],
    preset: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(PRESETS)}; options add to it.", **one_of(*PRESETS))
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help=f"char, bpe:N (N tokens), or a folder with one. {default('tokenizer')}")
    ] = None,
    layers: Annotated[int | None, typer.Option(help=f"Decoder layers. {default('layers')}")] = None,
    hidden_size: Annotated[int | None, typer.Option(help=f"Width. {default('hidden_size')}")] = None,
    intermediate_size: Annotated[
        int | None, typer.Option(help="Width of the feed-forward; 8/3 of the model's if omitted.")
    ] = None,
    heads: Annotated[int | None, typer.Option(help=f"Query heads. {default('heads')}")] = None,
    kv_heads: Annotated[int | None, typer.Option(help=f"Key/value heads. {default('kv_heads')}")] = None,
    context: Annotated[int | None, typer.Option(help=f"Tokens per window. {default('context')}")] = None,
    dropout: Annotated[float | None, typer.Option(help=f"Probability. {default('dropout')}")] = None,
    steps: Annotated[int | None, typer.Option(help=f"Optimiser steps. {default('steps')}")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help=f"Windows per step, over all processes. {default('batch_size')}")
    ] = None,
    accumulate: Annotated[
        int | None, typer.Option(help=f"Parts that a step is computed in. {default('accumulate')}")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help=f"AdamW's, at its peak. {default('learning_rate')} 1e-4 with --from.")
    ] = None,
    matrix_learning_rate: Annotated[
        float | None,
        typer.Option(help=f"Muon's; 0: AdamW trains all. {default('matrix_learning_rate')} 0 with --from."),
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help=f"Of matrices. {default('weight_decay')}")] = None,
    warmup: Annotated[float | None, typer.Option(help=f"Share of the steps. {default('warmup')}")] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between evaluations; a tenth if omitted.")] = None,
    validation_share: Annotated[float | None, typer.Option(help=f"Of the text. {default('validation_share')}")] = None,
    test_share: Annotated[float | None, typer.Option(help=f"Of the text. {default('test_share')}")] = None,
    source: Annotated[str | None, typer.Option("--from", help="Folder of a model to go on from.")] = None,
    lora: Annotated[int | None, typer.Option(help="Rank of adapters to train in place of the weights.")] = None,
    bf16: Annotated[
        bool | None, typer.Option("--bf16/--no-bf16", help="Compute in bfloat16; on a GPU that can if omitted.")
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="By torch.compile.")] = False,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Of activations: less memory.")] = False,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="Divide the model among processes (under torchrun).")] = False,
    license: Annotated[str | None, typer.Option(help="Licence of the model, as the Hub knows it.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    seed: Annotated[int | None, typer.Option(help=f"Of weights, windows, dropout. {default('seed')}")] = None,
    as_json: JsonFlag = False,
):
    """Train a Llama 3 on a text and leave a model folder; several processes: torchrun -m hf_llama3 train ..."""
    options = {name: value for name, value in locals().items() if name in SETTINGS}
    settings = make_settings(preset, **options)
    from .model_card import build_card, check_license, write_card
    from .training import train

    if license is not None:
        check_license(license)  # before hours of training
    report = train(text, output, settings, resume, progress=True).to_dict()
    if not is_first_process():
        return
    if license is not None:
        write_card(output / "README.md", build_card(output, license))
    if as_json:
        print_json(report)
        return
    report.pop("curves")
    notes = report.pop("notes")
    print_table(report)
    print_list("Note", notes)


@command("hf-llama3 generate llama-3-8b 'The capital of France is' --max-new-tokens 20")
def generate(
    model: ModelArgument,
    prompt: Annotated[str | None, typer.Argument(help="Text to complete.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="File with a prompt on each line.")] = None,
    max_new_tokens: MaxNewOption = MAX_NEW_TOKENS,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    dtype: DtypeOption = "auto",
    rope_factor: RopeOption = None,
    optimize: Annotated[bool, typer.Option("--optimize", help="Generate faster; --quantize and --compile do.")] = False,
    quantize: QuantizeOption = None,
    compile: CompileFlag = False,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends a completion; may be repeated.")] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts at a time.")] = BATCH_SIZE,
    output: Annotated[
        Path | None, typer.Option(help="File to write, a line of JSON for each prompt; the same command goes on.")
    ] = None,
    device_map: DeviceMapOption = None,
    max_memory: MemoryOption = None,
    offload_folder: Annotated[Path | None, typer.Option(help="For weights that fit on no device.")] = None,
    parallel: Annotated[
        str | None, typer.Option(help=f"Under torchrun: {', '.join(PARALLEL)}.", **one_of(*PARALLEL))
    ] = None,
    as_json: JsonFlag = False,
):
    """Complete a prompt, or each line of a file; on several devices by --device-map, or torchrun and --parallel."""
    if (prompt is None) == (prompts is None):
        raise UserError("give either a prompt or --prompts with a file")
    from .generation import load_model
    from .generation.parallel import join
    from .generation.placement import offload_into
    from .generation.prompts import Job, check_paths, complete, complete_into

    job, texts = Job(max_new_tokens, temperature, top_p, seed, stop), [prompt] if prompts is None else prompts
    with join(parallel) as group, offload_into(offload_folder) as folder:
        check_paths(prompts, output)
        loaded, tokenizer = load_model(
            model, dtype, rope_factor, optimize, quantize, compile, True, device_map, max_memory, folder, group
        )
        if output is not None:
            report = complete_into(output, loaded, tokenizer, texts, job, batch_size, group, progress=True)
            if group.is_first:
                print_json(report) if as_json else print_table(report)
            return
        completions = complete(loaded, tokenizer, texts, job, batch_size, group, progress=True)
        if as_json:
            found = [completion.to_dict() for completion in completions]
            if group.is_first:
                print_json(found)
            return
        for completion in completions:
            print(completion.prompt + completion.text, flush=True)


@command("hf-llama3 pack llama-3-8b llama-3-8b-int4 --quantize int4")
def pack(
    source: Annotated[str, typer.Argument(help=f"Folder of either format, which is not changed, or {HUB_NAME}.")],
    target: Annotated[Path, typer.Argument(help="Folder to make.")],
    quantize: QuantizeOption = None,
    rope_factor: RopeOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace TARGET once the new one is whole.")] = False,
    as_json: JsonFlag = False,
):
    """Write a folder that starts at once on a CPU: weights as --optimize or --quantize would make them each time."""
    from .generation import pack_model

    report = pack_model(source, target, quantize, rope_factor=rope_factor, overwrite=overwrite, progress=True).to_dict()
    if as_json:
        print_json(report)
        return
    files, notes = report.pop("files"), report.pop("notes")
    print_table(report | {f"writes {name}": f"{size:,} bytes" for name, size in files.items()})
    print_list("Note", notes)


@command("hf-llama3 chat Meta-Llama-3-8B-Instruct --quantize int8")
def chat(
    model: ModelArgument,
    max_new_tokens: MaxNewOption = MAX_NEW_TOKENS,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    dtype: DtypeOption = "auto",
    rope_factor: RopeOption = None,
    quantize: QuantizeOption = None,
    compile: CompileFlag = False,
):
    """Talk with a model; Ctrl-C stops an answer, Ctrl-D ends."""
    from .generation import chat, load_model

    loaded, tokenizer = load_model(model, dtype, rope_factor, True, quantize, compile, progress=True)
    chat(loaded, tokenizer, max_new_tokens, temperature, top_p, seed)


@command("hf-llama3 bench llama-3-8b --quantize int8")
def bench(
    model: ModelArgument,
    prompt_tokens: Annotated[int, typer.Option(help="Of each prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(help="For each prompt.")] = 32,
    batch_size: Annotated[int, typer.Option(help="Prompts at a time.")] = 1,
    dtype: DtypeOption = "auto",
    rope_factor: RopeOption = None,
    optimize: Annotated[bool, typer.Option(help="As hf_llama3.optimize does.")] = True,
    quantize: QuantizeOption = None,
    compile: CompileFlag = False,
    as_json: JsonFlag = False,
):
    """Measure how fast a model generates, beside how fast the memory is read."""
    from .generation import bench, load_model

    loaded, _ = load_model(model, dtype, rope_factor, optimize, quantize, compile, progress=True)
    report = bench(loaded, prompt_tokens, new_tokens, batch_size).to_dict()
    print_json(report) if as_json else print_table(report)


@command("hf-llama3 evaluate llama-3-8b --text held-out.txt")
def evaluate(
    model: ModelArgument,
    text: Annotated[Path, typer.Option(help="Text in UTF-8.")],
    context: Annotated[int | None, typer.Option(help="Tokens per window; the model's, but at most 2,048.")] = None,
    dtype: DtypeOption = "auto",
    rope_factor: RopeOption = None,
    quantize: QuantizeOption = None,
    keep: Annotated[bool, typer.Option("--record", help="Put the result into the folder, for its card.")] = False,
    benchmark: Annotated[
        str | None, typer.Option(help="With --record: the text is OWNER/DATASET:TASK, a benchmark on the Hub.")
    ] = None,
    as_json: JsonFlag = False,
):
    """Measure how well a model predicts a text: loss in nats and perplexity, per token."""
    from .generation import evaluate, load_model
    from .generation.record import check_record, record

    if benchmark is not None and not keep:
        raise UserError("--benchmark says what --record puts down; add --record")
    if keep:
        check_record(model, benchmark)
    loaded, tokenizer = load_model(model, dtype, rope_factor, False, quantize)
    report = evaluate(loaded, tokenizer, text, context, progress=True)
    if keep:
        record(report, benchmark)
    (print_json if as_json else print_table)(report.to_dict())


@command("hf-llama3 card runs/shakespeare --license apache-2.0")
def card(
    folder: Annotated[Path, typer.Argument(help="Hugging Face folder.")],
    license: Annotated[str | None, typer.Option(help="As the Hub knows it; the folder's own if omitted.")] = None,
    output: Annotated[Path | None, typer.Option(help="File to write; standard output if omitted.")] = None,
):
    """Make the model card of a folder from what its files say."""
    from .model_card import build_card, write_card

    content = build_card(folder, license, card=output, progress=True)
    if output is None:
        print(content, end="")
        return
    write_card(output, content)


@command("hf-llama3 doctor")
def doctor(as_json: JsonFlag = False):
    """Say what is installed, what this machine has, and what to type where something is missing; exit 1 if it is."""
    from .doctor import examine

    report = examine()
    if as_json:
        print_json(report.to_dict())
    else:
        print_table(report.table())
        print_list("Optional", report.advice)
        print_list("Problem", report.problems)
    if not report.ok:
        raise typer.Exit(1)


@command("hf-llama3 push runs/shakespeare my-name/tiny-shakespeare --license apache-2.0 --dry-run")
def push(
    folder: Annotated[Path, typer.Argument(help="Hugging Face folder.")],
    repo_id: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub; made where it does not exist.")],
    license: Annotated[str | None, typer.Option(help="As the Hub knows it; the folder's own if omitted.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, or a pull request as refs/pr/1.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all, print what would be uploaded.")] = False,
    as_json: JsonFlag = False,
):
    """Check a folder, make its card, and upload what belongs to the model; the same command goes on."""
    from .model_card import publish

    report = publish(
        folder,
        repo_id,
        license=license,
        private=private,
        revision=revision,
        create_pr=create_pr,
        dry_run=dry_run,
        progress=True,
    ).to_dict()
    if as_json:
        print_json(report)
        return
    files, left_out, notes = report.pop("files"), report.pop("left_out"), report.pop("notes")
    print_table(report)
    for name, size in files.items():
        print(f"{size:>15,}  {name}")
    print_list("Left out", left_out)
    print_list("Note", notes)
    if not dry_run:
        at = f", revision={report['revision']!r}" if report["revision"] else ""
        trust = ", trust_remote_code=True" if "modeling_llama3.py" in files else ""
        print(f'\nAutoModelForCausalLM.from_pretrained("{repo_id}"{at}{trust})')


def print_json(value):
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(rows: dict):
    """Print names and values in two columns."""
    width = max(map(len, rows))
    for name, value in rows.items():
        print(
            f"{name.replace('_', ' '):<{width}}  {value:,}"
            if type(value) is int
            else f"{name.replace('_', ' '):<{width}}  {value}"
        )


def print_list(title: str, sentences: list[str], at_most: int = 10):
    for sentence in sentences[:at_most]:
        print(f"{title}: {sentence}")
    if len(sentences) > at_most:
        print(f"{title}: ... and {len(sentences) - at_most} more")
