"""Several processes, started by torchrun, that generate together: tensor, pipeline or data parallel.

transformers divides the model, by the plans in its configuration. This module does what that leaves to the caller:
joining the processes, refusing what cannot be divided, one error message for all, and collecting results.
"""

import contextlib
import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, DistributedConfig, PretrainedConfig, PreTrainedModel

from hf_llama3.errors import UserError, words_of

from . import PARALLEL

TIMEOUT = timedelta(hours=2)  # for one exchange, which waits for the slowest process; a lost one is noticed at once
_groups = itertools.count()


@dataclass
class Group:
    """The processes that generate together; this one is number `rank`."""

    mode: str | None = None  # "data", "tensor" or "pipeline"; None: this process is alone
    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def shares(self) -> int:
        """The number of shares that prompts are divided into."""
        return self.count if self.mode == "data" else 1

    @property
    def share(self) -> int:
        return self.rank if self.mode == "data" else 0

    def check(self, config: PretrainedConfig):
        """Check that a model of this configuration can be divided among the processes.

        Raises:
            UserError: it cannot.
        """
        if self.mode == "tensor":
            for key in ("num_key_value_heads", "num_attention_heads", "intermediate_size", "vocab_size"):
                size = getattr(config, key, None)
                if size is None:
                    raise UserError(f"--parallel tensor needs a Llama, got {config.model_type!r} without `{key}`")
                if size % self.count:
                    raise UserError(
                        f"--parallel tensor needs a number of processes that divides `{key}` {size}, got {self.count}; "
                        "start another number"
                    )
        if self.mode == "pipeline" and config.num_hidden_layers < self.count:
            raise UserError(
                f"--parallel pipeline needs a layer for each process, got {config.num_hidden_layers} layers and "
                f"{self.count} processes; start fewer"
            )

    def loading_options(self) -> dict:
        """Return options for `from_pretrained` by which each process reads only its part."""
        if self.mode == "tensor":
            return {"distributed_config": DistributedConfig(tp_size=self.count)}
        if self.mode == "pipeline":
            return {"distributed_config": DistributedConfig(pp_size=self.count)}
        return {"device_map": str(torch.device(device_type(), local_rank()))} if device_type() != "cpu" else {}

    def gather(self, value) -> list:
        """Return the values of all shares, in order, in the first process, and an empty list in the others."""
        if self.shares == 1:
            return [value] if self.is_first else []
        values = [None] * self.count if self.is_first else None
        dist.gather_object(value, values)
        return values or []

    def share_out(self, value):
        """Return the first process's value in all processes."""
        values = [value]
        if self.count > 1:
            dist.broadcast_object_list(values)
        return values[0]


@contextlib.contextmanager
def join(mode: str | None) -> Iterator[Group]:
    """Join the processes that torchrun started; after an error only the first process that met one prints it.

    Raises:
        UserError: the mode is unknown, or it and the number of processes or of devices do not go together.
    """
    count = int(os.environ.get("WORLD_SIZE", 1))
    if mode not in (None, *PARALLEL):
        raise UserError(f"--parallel must be one of {PARALLEL}, got {mode!r}")
    if mode is None and count > 1:
        raise UserError(f"{count} processes must be told how to share the work; add --parallel {'|'.join(PARALLEL)}")
    if mode is None:
        yield Group()
        return
    if count == 1:
        start = "torchrun --nproc-per-node 2 -m hf_llama3 generate"
        raise UserError(f"--parallel needs several processes, got 1; start them by {start} ...")
    check_devices()
    store, rank, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
    store = dist.PrefixStore(f"group {next(_groups)}", store)  # ignore what an earlier group left there
    try:
        backend = bind_device()
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)
        yield Group(mode, rank, count)
        dist.barrier()
        dist.destroy_process_group()
    except Exception as error:
        if store.add("errors", 1) > 1:
            os._exit(2)  # another process has printed the error; exchanges with it would never end
        if not isinstance(error, UserError) and is_lost(error):
            raise UserError(f"another process was lost ({words_of(error)}); see above why") from error
        raise


def bytes_per_process(config: PretrainedConfig, dtype: torch.dtype, mode: str, count: int) -> list[int]:
    """Return the bytes of weights that each of `count` processes holds, by the plans alone.

    As transformers divides. Tensor parallel: what the plan names is divided, everything else lies in every process.
    Pipeline parallel: equal numbers of layers, the remainder to the last process; the embedding to the first (if tied,
    also to the last), norm and head to the last.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    model.tie_weights()
    sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    if mode == "data":
        return [sum(sizes.values())] * count
    if mode == "tensor":
        planned = [name for name in sizes if re.sub(r"\.\d+\.", ".*.", name).removesuffix(".weight") in model.tp_plan]
        shared = sum(sizes.values()) - sum(sizes[name] for name in planned)
        return [shared + sum(sizes[name] for name in planned) // count] * count
    layers, held = config.num_hidden_layers, [0] * count
    for name, size in sizes.items():
        layer = re.search(r"\.layers\.(\d+)\.", name)
        if layer:
            held[min(int(layer[1]) // (layers // count), count - 1)] += size
            continue
        held[0 if "embed_tokens" in name else -1] += size
        if "embed_tokens" in name and config.tie_word_embeddings:
            held[-1] += size
    return held


def is_lost(error: Exception) -> bool:
    """Tell whether an exchange failed because a process at its other end is gone or silent."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def check_devices():
    """Check, in every process, that the machine has a device for each of its processes.

    An error in some processes alone, before they have joined, would leave the others waiting.

    Raises:
        UserError: it has fewer.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank() + 1))
    if device_type() != "cpu" and processes > (devices := torch.accelerator.device_count()):
        raise UserError(f"each process needs a GPU of its own, got {devices} for {processes}; start {devices}")


def bind_device() -> str:
    """Give this process the device of its local rank, and return the backend for exchanges."""
    kind = device_type()
    if kind == "cpu":
        return "gloo"
    torch.accelerator.set_device_index(local_rank())
    return f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}"


def device_type() -> str:
    # Without the check torch's build for CUDA, which pip brings, names a GPU on a machine that has none.
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None or accelerator.type == "mps" else accelerator.type


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def number_own_layers(model: PreTrainedModel):
    """Number the layers that a process of a pipeline holds from 0, as in its cache.

    The library keeps their numbers in the whole model, but reads the length of the text so far from the cache's first
    layer. In all processes but the first that layer would be empty, with the masks and positions of a new text.
    """
    attentions = [module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "q_proj")]
    for number, attention in enumerate(attentions):
        attention.layer_idx = number
