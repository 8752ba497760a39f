"""Commands that generate: generate, chat, and pack, which makes folders that start fast."""

from pathlib import Path
from typing import Annotated

import typer

from hf_llama3.distributed import PARALLEL
from hf_llama3.errors import UserError, for_terminal
from hf_llama3.text import BATCH_SIZE, MAX_NEW_TOKENS

from .app import command
from .options import (
    CHECKPOINT,
    DEVICES,
    SPEED,
    CompileFlag,
    DeviceMapOption,
    DtypeOption,
    JsonFlag,
    MaxNewOption,
    MemoryOption,
    ModelArgument,
    OverwriteFlag,
    QuantizeOption,
    RopeOption,
    SeedOption,
    TemperatureOption,
    TopPOption,
    one_of,
)
from .printing import print_files, print_json, print_list, print_next, print_table

GROUP = "Text"


@command("hf-llama3 generate llama-3-8b 'The capital of France is' --max-new-tokens 20", GROUP)
def generate(
    model: ModelArgument,
    prompt: Annotated[
        str | None, typer.Argument(help="Text to complete; an instruct model gets it as a user's message.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="File with one prompt a line, in place of PROMPT.")] = None,
    max_new_tokens: MaxNewOption = MAX_NEW_TOKENS,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    dtype: DtypeOption = "auto",
    rope_factor: RopeOption = None,
    optimize: Annotated[bool, SPEED("--optimize", help="Use fast kernels; --quantize and --compile imply it.")] = False,
    quantize: QuantizeOption = None,
    compile: CompileFlag = False,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends a completion; can be given several times.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Number of prompts in a batch.")] = BATCH_SIZE,
    output: Annotated[
        Path | None, typer.Option(help="File to write, one line of JSON for each prompt; the same command resumes it.")
    ] = None,
    device_map: DeviceMapOption = None,
    max_memory: MemoryOption = None,
    offload_folder: Annotated[Path | None, DEVICES(help="Folder for weights that fit on no device.")] = None,
    parallel: Annotated[
        str | None,
        DEVICES(help=f"Share the work between torchrun's processes: {', '.join(PARALLEL)}.", **one_of(*PARALLEL)),
    ] = None,
    as_json: JsonFlag = False,
):
    """Complete a prompt, or each line of a file; use several devices by --device-map, or by torchrun and --parallel."""
    if (prompt is None) == (prompts is None):
        raise UserError("give either a prompt or --prompts with a file")
    from hf_llama3.distributed.parallel import join
    from hf_llama3.distributed.placement import offload_into
    from hf_llama3.text.loading import load_model
    from hf_llama3.text.prompts import Job, check_paths, complete, complete_into

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
            records = [completion.to_dict() for completion in completions]
            if group.is_first:
                print_json(records)
            return
        for completion in completions:
            print(for_terminal(completion.prompt + completion.text), flush=True)


@command("hf-llama3 pack llama-3-8b llama-3-8b-int4 --quantize int4", GROUP)
def pack(
    source: Annotated[str, typer.Argument(help=f"Checkpoint to read: {CHECKPOINT}. It is not changed.")],
    target: Annotated[Path, typer.Argument(help="Folder to make.")],
    quantize: QuantizeOption = None,
    rope_factor: RopeOption = None,
    overwrite: OverwriteFlag = False,
    as_json: JsonFlag = False,
):
    """Write a folder whose weights are optimised or quantised already, so that it starts faster on a CPU."""
    from hf_llama3.cpu.packing import pack_model

    report = pack_model(source, target, quantize, rope_factor=rope_factor, overwrite=overwrite, progress=True).to_dict()
    if as_json:
        print_json(report)
        return
    files, notes = report.pop("files"), report.pop("notes")
    print_table(report | {"source": source, "target": target})
    print_files("\nWrote", files)
    print_list("Note", notes)
    print_next("generate", target, "The capital of France is")


@command("hf-llama3 chat Meta-Llama-3-8B-Instruct --quantize int8", GROUP)
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
    """Chat with a model; Ctrl-C stops an answer, Ctrl-D ends the chat."""
    from hf_llama3.text.chat import chat
    from hf_llama3.text.loading import load_model

    loaded, tokenizer = load_model(model, dtype, rope_factor, True, quantize, compile, progress=True)
    chat(loaded, tokenizer, max_new_tokens, temperature, top_p, seed)
