"""Decode by a compiled step over a static cache, through the library's own options; it is compiled once."""

import copy
import functools
import inspect
from collections.abc import Callable

import torch
from transformers import CompileConfig, GenerationMixin, PreTrainedModel

from hf_llama3.files.progress import bar

SMALLEST_CACHE = 256  # tokens; sizes double from here
CPU_ROWS, CPU_TOKENS = 1, 512  # up to which a compiled step is faster on a CPU, see `is_worth_it`
BY_POSITION = tuple(inspect.signature(GenerationMixin.generate).parameters)[1:]  # names of generate's arguments
NOT_COMPILED = (  # options of generate that a static cache does not serve, or not well
    *("assistant_model", "prompt_lookup_num_tokens", "past_key_values", "cache_implementation"),
    *("output_hidden_states", "output_attentions"),
)


def compile_decoding(model: PreTrainedModel, progress: bool = False):
    """Let `model.generate` decode by a compiled step, and compile it for one row and, on a GPU, for several.

    The compiled code takes any length and any number of rows; one row has code of its own. So nothing is compiled again
    when prompts or batches change. A GPU records a CUDA graph for each number of rows and size of cache. Calls that a
    static cache does not serve are decoded as before: an assistant or prompt lookup, beams, a cache that the caller
    passes and, on a CPU, several or long rows.
    """
    mode = "reduce-overhead" if model.device.type == "cuda" else "default"  # the former records CUDA graphs
    config = CompileConfig(dynamic=True, mode=mode)
    config._compile_all_devices = True
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:  # since torch 2.13
        config.isolate_recompiles = True  # recompilations are counted for each model
    model.generate = functools.partial(generate, model, config, model.generate)
    model.get_compiled_call = functools.partial(get_step, model)
    model._prepare_static_cache = functools.partial(prepare_static_cache, model)
    settings = {"min_new_tokens": 3, "max_new_tokens": 3}
    prompts = [torch.zeros(rows, 4, dtype=torch.long, device=model.device) for rows in (1, 2)]
    served = [prompt for prompt in prompts if is_worth_it(model, settings, prompt)]
    for prompt in bar(iterable=served, desc="compiling", disable=not progress):
        model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)


def generate(model: PreTrainedModel, config: CompileConfig, plain: Callable, *args, **kwargs):
    """Replace `model.generate`: use a static cache and a compiled step unless the caller asks for something else.

    The call leaves inference mode, because the compiler would compile everything again for its tensors; the library's
    method runs without gradients by itself.
    """
    given = dict(zip(BY_POSITION, args, strict=False)) | kwargs
    wanted = combine(model, given)
    if not is_served(wanted) or not is_worth_it(model, wanted):
        return plain(**given)
    options = {"cache_implementation": "static", "compile_config": config}
    if given.get("generation_config") is None:
        given |= options
    else:  # the library deprecates options beside a configuration
        given["generation_config"] = copy.deepcopy(given["generation_config"])
        given["generation_config"].update(**options)
    with torch.inference_mode(False):
        return type(model).generate(model, **given)


def combine(model: PreTrainedModel, given: dict) -> dict:
    """Return the settings of a call as the library combines them: options before configuration before model."""
    config = vars(given.get("generation_config") or model.generation_config)
    return vars(model.generation_config) | {name: value for name, value in config.items() if value is not None} | given


def get_step(model: PreTrainedModel, config: CompileConfig):
    """Replace the library's method, which also compiles the chunks of a prompt: each length again, for one use."""
    compiled = type(model).get_compiled_call(model, config)

    def step(input_ids: torch.Tensor, **inputs):
        call = compiled if input_ids.shape[1] == 1 else model.__call__
        return call(input_ids=input_ids, **inputs)

    return step


def is_served(wanted: dict) -> bool:
    """Tell whether the compiled step can serve what `model.generate` is asked for."""
    is_asked = any(wanted.get(name) not in (None, False) for name in NOT_COMPILED)
    return not is_asked and wanted.get("use_cache") is not False and (wanted.get("num_beams") or 1) == 1


def is_worth_it(model: PreTrainedModel, wanted: dict, prompt: torch.Tensor | None = None, *unused) -> bool:
    """Tell whether a compiled step is faster: always on a GPU, for one short row on a CPU.

    Every step attends to the whole static cache, with keys and values repeated for each query head. Time against a step
    that is not compiled, on one thread (benchmarks/generation.py, four layers of the 1B geometry): 0.96 after 64
    tokens, 1.2 after 2,048, 2.5 after 8,192; 1.0 to 1.3 for two and four rows, 1.4 for 16.
    """
    if model.device.type != "cpu":
        return True
    given = (wanted.get(name) for name in ("input_ids", "inputs", "inputs_embeds"))
    prompt = prompt if prompt is not None else next((one for one in given if one is not None), torch.empty(1, 1))
    rows = len(prompt) * (wanted.get("num_return_sequences") or 1)
    new = wanted.get("max_new_tokens") or (wanted.get("max_length") or 0) - prompt.shape[1]
    return rows <= CPU_ROWS and prompt.shape[1] + max(new, 0) <= CPU_TOKENS


def prepare_static_cache(model: PreTrainedModel, *args, max_cache_len: int, **kwargs):
    """Replace the library's method: cache sizes double, and one long text does not make all later caches long."""
    size = SMALLEST_CACHE
    while size < max_cache_len:
        size *= 2
    model._previous_max_cache_length = -1
    return type(model)._prepare_static_cache(model, *args, max_cache_len=size, **kwargs)
