"""Let `model.generate` run at the speed of memory: the same model object with the same outputs, executed faster."""

import functools
import warnings
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_llama3.errors import UserError

from . import QUANTIZATIONS, processor
from .cache import grow_caches
from .compiled import compile_decoding
from .decode_attention import use_decode_attention
from .kernels.exact import ExactKernel
from .kernels.int8_int4 import Int4Kernel, Int8Kernel
from .kernels.kernel import Kernel
from .linear import KernelLinear, use_kernel, use_weight

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # types of weights that kernels read
REPLACED = (  # attributes of the model that are replaced, or that the library keeps on it
    *("generate", "get_compiled_call", "_prepare_static_cache", "_prepare_cache_for_generation"),
    *("_compiled_call", "_last_compile_config"),
)
NO_PLAIN_WEIGHTS = ("state_dict", "save_pretrained", "push_to_hub")  # refused after quantising


@dataclass
class Optimization:
    """What was done to a model, kept on it."""

    quantize: str | None
    compile: bool
    trainable: list[str]  # parameters that required gradients
    training: list[str]  # modules that were in training mode


def optimize(
    model: PreTrainedModel, quantize: str | None = None, compile: bool = False, progress: bool = False
) -> PreTrainedModel:
    """Prepare a model to generate fast, and return it; it must not be changed until `restore`.

    On a CPU every linear layer multiplies by our kernels, which read its weight where it lies, and the decode steps of
    `generate` use our attention. Outputs differ only by the rounding of sums in another order. On another device it is
    `compile` that makes it faster. Works for any transformers model.

    Args:
        quantize: on a CPU, quantise weights to "int8", or to "int4" (the head to int8); outputs change, and the exact
            weights are gone until the model is loaded again.
        compile: decode over a static cache by a compiled step; the call then takes about a minute to compile it.
        progress: show the progress of that on standard error.

    Raises:
        UserError: the model has adapters, lies on several devices, or is quantised already (on a GPU by other than
            torchao); or `quantize` is asked for on a GPU, on a processor without kernels, or for another type.
    """
    done = getattr(model, "optimization", None)
    quantize = quantize or (done and done.quantize)
    check(model, quantize)
    if done and (done.quantize, done.compile) == (quantize, compile):
        return model
    if done:
        release(model)
    training = [name for name, module in model.named_modules() if module.training]
    model.eval()
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    if model.device.type == "cpu":
        pack_linears(model, quantize)
        grow_caches(model)
        use_decode_attention(model)
    elif not compile:
        warnings.warn(f"on {model.device} a compiled step alone is faster; optimize with compile=True", stacklevel=2)
    model.optimization = Optimization(quantize, compile, trainable, training)
    refuse_changes(model)
    if compile:
        compile_decoding(model, progress)
    return model


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `optimize` and return the model; one that is not optimised is left alone.

    Raises:
        UserError: the weights are quantised, and the exact ones are gone.
    """
    done = model.__dict__.get("optimization")
    if done is None:
        return model
    if done.quantize:
        raise UserError(f"a model quantised to {done.quantize} cannot be restored; load {origin(model)} again")
    release(model)
    return model


def release(model: PreTrainedModel):
    """Undo all of `optimize` except the quantisation."""
    done = model.optimization
    for module in model.modules():
        for name in (*REFUSALS, *NO_PLAIN_WEIGHTS, *REPLACED):
            module.__dict__.pop(name, None)
        if isinstance(module, KernelLinear) and not done.quantize:
            use_weight(module)
    parameters = dict(model.named_parameters())
    for name in done.trainable:
        parameters[name].requires_grad_(True)
    for name in done.training:
        model.get_submodule(name).training = True
    del model.optimization


def check(model: PreTrainedModel, quantize: str | None):
    """Refuse a model that cannot be optimised, before anything is changed."""
    if quantize not in (None, *QUANTIZATIONS):
        raise UserError(f"`quantize` must be one of {QUANTIZATIONS} or None, got {quantize!r}")
    if not isinstance(model, PreTrainedModel) or hasattr(model, "peft_config"):
        kind = type(model).__name__
        if hasattr(model, "peft_config"):
            raise UserError(f"adapters must be merged first, got a {kind} with them; call merge_and_unload()")
        raise UserError(f"`model` must be a transformers model, got {kind}; load one with from_pretrained")
    done = model.__dict__.get("optimization")
    if done and done.quantize and done.quantize != quantize:
        raise UserError(f"a model quantised to {done.quantize} cannot become {quantize}; load {origin(model)} again")
    quantizer = getattr(model, "hf_quantizer", None)
    was_gguf = quantizer is not None and getattr(quantizer.quantization_config, "quant_method", None) == "gguf"
    if was_gguf and all(type(parameter) is nn.Parameter for parameter in model.parameters()):
        quantizer = None  # the library has dequantised the file's weights
    if quantizer is not None and (model.device.type == "cpu" or not quantizer.is_compileable):
        method = type(quantizer.quantization_config).__name__
        raise UserError(f"on {model.device} weights must be plain, got a model loaded with a {method}; load it without")
    devices = sorted({str(device) for device in getattr(model, "hf_device_map", {}).values()})
    devices = devices if len(devices) > 1 or "disk" in devices else []
    if devices or any(parameter.device.type == "meta" for parameter in model.parameters()):
        where = " and ".join(devices) or "nowhere (meta)"
        raise UserError(f"all weights must lie on one device, got {where}; load the model without offload")
    if quantize and model.device.type != "cpu":
        raise UserError(
            f"`quantize` is for a CPU, got {quantize!r} for a model on {model.device}; load it with a TorchAoConfig"
        )
    if quantize and not processor.here().has_kernels:
        raise UserError(
            f"`quantize` needs a processor with AVX2 and FMA, or NEON, got {processor.here()}; leave it out"
        )
    if quantize and model.dtype not in DTYPES:
        raise UserError(f"weights to quantise must be float32, float16 or bfloat16, got {model.dtype}; cast the model")


def pack_linears(model: PreTrainedModel, quantize: str | None):
    """Give every linear layer a kernel that multiplies by its weight."""
    holders = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    head, skipped = model.get_output_embeddings(), Counter()
    for module in [module for module in model.modules() if type(module) is nn.Linear]:
        weight = module.weight
        if weight.device.type != "cpu" or weight.dtype not in DTYPES or not processor.here().has_kernels:
            skipped[f"{weight.dtype} on {weight.device.type}".removeprefix("torch.")] += 1
        else:
            kernel = choose_kernel(quantize, is_head=module is head)
            use_kernel(module, kernel(weight), keeps_weight=holders[id(weight)] > 1)
    if skipped:
        which = ", ".join(f"{count} of {kind}" for kind, count in skipped.items())
        warnings.warn(f"linear layers that have no faster kernel here were left as they are: {which}", stacklevel=3)


def choose_kernel(quantize: str | None, is_head: bool) -> type[Kernel]:
    """Return the kernel for a weight; with int4 the head gets int8, because its errors go straight into the logits."""
    if quantize is None:
        return ExactKernel
    return Int4Kernel if quantize == "int4" and not is_head else Int8Kernel


def refuse_changes(model: PreTrainedModel):
    """Let the methods refuse that would change the weights, or save weights that are gone."""
    for module in model.modules():
        for name, refusal in REFUSALS.items():
            setattr(module, name, functools.partial(refusal, module))
    if model.optimization.quantize:
        for name in NO_PLAIN_WEIGHTS:
            setattr(model, name, functools.partial(refuse_saving, model))


def refuse_train(module: nn.Module, mode: bool = True) -> nn.Module:
    if mode:
        raise UserError("an optimised model cannot be trained; call hf_llama3.restore(model) first")
    return type(module).train(module, False)


def refuse_apply(module: nn.Module, function, recurse: bool = True) -> nn.Module:
    """Replace `Module._apply`, which `.to()`, `.half()` and the like call: refuse those that change anything."""
    for parameter in module.parameters():
        probe = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        changed = function(probe)
        if (changed.dtype, changed.device) != (probe.dtype, probe.device):
            raise UserError(
                f"an optimised model must stay {probe.dtype} on {probe.device}, got {changed.dtype} on "
                f"{changed.device}; call hf_llama3.restore(model) first"
            )
        break
    return module


def refuse_load_state_dict(module: nn.Module, *args, **kwargs):
    raise UserError("an optimised model cannot take other weights; call hf_llama3.restore(model) first")


# Method that changes the weights -> its replacement while the model is optimised
REFUSALS = {"train": refuse_train, "_apply": refuse_apply, "load_state_dict": refuse_load_state_dict}


def refuse_saving(model: PreTrainedModel, *args, **kwargs):
    kind = model.optimization.quantize
    raise UserError(
        f"a model quantised to {kind} has no plain weights to save; copy {origin(model)} instead, or run hf-llama3 pack"
    )


def quantization_of(model: PreTrainedModel) -> str | None:
    """Return "int8", "int4", or None for exact weights."""
    done = model.__dict__.get("optimization")
    return done and done.quantize


def origin(model: PreTrainedModel) -> str:
    """Return where the model was loaded from."""
    return model.name_or_path or "what it was loaded from"
