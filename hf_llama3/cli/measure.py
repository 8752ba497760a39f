"""Commands that measure a model: bench, evaluate."""

from pathlib import Path
from typing import Annotated

import typer

from hf_llama3.errors import UserError

from .app import command
from .options import SPEED, CompileFlag, DtypeOption, JsonFlag, ModelArgument, QuantizeOption, RopeOption
from .printing import print_json, print_next, print_table, size

GROUP = "Measure"


@command("hf-llama3 bench llama-3-8b --quantize int8", GROUP)
def bench(
    model: ModelArgument,
    prompt_tokens: Annotated[int, typer.Option(help="Length of each prompt in tokens.")] = 64,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate for each prompt.")] = 32,
    batch_size: Annotated[int, typer.Option(help="Number of prompts in a batch.")] = 1,
    dtype: DtypeOption = "auto",
    rope_factor: RopeOption = None,
    optimize: Annotated[bool, SPEED(help="Optimise the model as hf_llama3.optimize does.")] = True,
    quantize: QuantizeOption = None,
    compile: CompileFlag = False,
    as_json: JsonFlag = False,
):
    """Measure how fast a model generates, and compare it with the speed at which this machine reads memory."""
    from hf_llama3.measure.bench import bench
    from hf_llama3.text.loading import load_model

    loaded, _ = load_model(model, dtype, rope_factor, optimize, quantize, compile, progress=True)
    report = bench(loaded, prompt_tokens, new_tokens, batch_size)
    if as_json:
        print_json(report.to_dict())
        return
    print_table(
        {
            "device": f"{report.device}, threads: {report.threads}",
            "weights": size(report.weight_gigabytes * 1e9),
            "prompts": f"{batch_size} of {prompt_tokens:,} tokens",
            "prefill": f"{report.prefill_tokens_per_second:,} tokens/s",
            "decode": f"{report.tokens_per_second:,} tokens/s, {report.milliseconds_per_token} ms a step",
            "memory": f"is read at {report.read_gigabytes_per_second} GB/s, weights in a step at "
            f"{report.share_of_read:.0%} of that",
        }
    )


@command("hf-llama3 evaluate llama-3-8b --text held-out.txt", GROUP)
def evaluate(
    model: ModelArgument,
    text: Annotated[Path, typer.Option(help="Text file in UTF-8.")],
    context: Annotated[
        int | None, typer.Option(help="Tokens in a window.", show_default="the model's, at most 2,048")
    ] = None,
    dtype: DtypeOption = "auto",
    rope_factor: RopeOption = None,
    quantize: QuantizeOption = None,
    keep: Annotated[bool, typer.Option("--record", help="Write the result into the folder, for its card.")] = False,
    benchmark: Annotated[
        str | None,
        typer.Option(help="With --record: the benchmark on the Hub that the text is, as OWNER/DATASET:TASK."),
    ] = None,
    as_json: JsonFlag = False,
):
    """Measure how well a model predicts a text: loss in nats and perplexity, per token."""
    from hf_llama3.measure.evaluation import evaluate
    from hf_llama3.measure.records import check_record, record
    from hf_llama3.text.loading import load_model

    if benchmark is not None and not keep:
        raise UserError("--benchmark says what --record puts down; add --record")
    if keep:
        check_record(model, benchmark)
    loaded, tokenizer = load_model(model, dtype, rope_factor, False, quantize)
    report = evaluate(loaded, tokenizer, text, context, progress=True)
    if keep:
        record(report, benchmark)
    if as_json:
        print_json(report.to_dict())
        return
    units = {"loss": f"{report.loss:.4f} nats per token", "context": f"{report.context:,} tokens"}
    print_table(report.to_dict() | units)
    if keep:
        print_next("card", model)
