"""Names of tensors as other tools leave them, brought to those of one of the two formats."""

from typing import NamedTuple, TypeVar

from hf_llama3.errors import UserError, quoted

from ..weights import EMBEDDING, HEAD_MODULES

Tensor = TypeVar("Tensor")

# What torch.compile, DistributedDataParallel, FSDP and activation checkpointing put into the names of what they wrap.
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# What some files carry beside the weights; the configuration says it all, and it is not read.
ROPE_TABLES = {"inv_freq", "original_inv_freq", "cos_cached", "sin_cached"}  # Hugging Face's
ROPE_TABLES |= {"freqs", "freqs_cis", "freqs_cos", "freqs_sin"}  # Meta's, torchtitan's, llama2.c's
ADAPTERS = {"lora_A", "lora_B", "lora_a", "lora_b", "base_layer", "modules_to_save"}
BASE = "model."  # what stands before every name of Hugging Face's but those of the head


class Settled(NamedTuple):
    """Tensors under the names of one format, which that is, and what was done, in sentences."""

    tensors: dict
    order: str  # "hf" or "meta": whose names they are, and so the order of the query and key rows
    said: list[str]


def settle(tensors: dict[str, Tensor], path) -> Settled:
    """Take off tables of RoPE, wrappers' names and any prefix that stands before the embedding's name.

    Names that do not show an embedding stay as they are, for the comparison with the table to name them.

    Raises:
        UserError: two names become one, or adapters stand among the weights.
    """
    said = []
    kept = {name: tensor for name, tensor in tensors.items() if not is_rope_table(name)}
    if count := len(tensors) - len(kept):
        said.append(f"{count} RoPE table{'s' * (count > 1)} left out: the configuration says what they hold")
    plain = {name: without_wrappers(name) for name in kept}
    if adapted := sorted(name for name in kept if ADAPTERS & set(name.split("."))):
        remedy = "merge it with peft's merge_and_unload, save the model, and pass that folder"
        raise UserError(f"{path} holds an adapter that is not merged ({quoted(adapted[0])}); {remedy}")
    order, renamed = "hf", plain
    for kind, embedding, base in (("hf", f"{BASE}embed_tokens.weight", BASE), ("meta", EMBEDDING.meta, "")):
        last_two = embedding.removeprefix(base)
        anchors = [name for name, new in plain.items() if f".{new}".endswith(f".{last_two}")]
        if len(anchors) == 1:
            order, prefix = kind, plain[anchors[0]].removesuffix(last_two)
            renamed = {name: rename(new, prefix, base) for name, new in plain.items()}
            said += say(anchors[0], embedding)
            break
    settled = {}
    for name, new in renamed.items():
        if new in settled:
            twice = f"{path} holds {quoted(new)} twice, once as {quoted(name)}"
            raise UserError(f"{twice}; remove the copy that is not meant")
        settled[new] = kept[name]
    return Settled(settled, order, said)


def is_rope_table(name: str) -> bool:
    return name.rpartition(".")[2] in ROPE_TABLES


def without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def rename(name: str, prefix: str, base: str) -> str:
    """Put `base` in place of the embedding's prefix; of a name beside it, such as the head's, take off what they share.

    `base_model.model.model.` stands before the layers and `base_model.model.` before the head, as PEFT leaves it.
    """
    if name.startswith(prefix) and not (prefix == "" and name.split(".")[0] in HEAD_MODULES):
        return base + name.removeprefix(prefix)
    parts = prefix.split(".")[:-1]
    for count in range(len(parts) - 1, 0, -1):
        outer = ".".join(parts[:count]) + "."
        if name.startswith(outer):
            return name.removeprefix(outer)
    return name


def say(found: str, meant: str) -> list[str]:
    if found == meant:
        return []
    if found.endswith(meant):
        return [f"names of tensors without the prefix {quoted(found.removesuffix(meant))}, which all have"]
    return [f"names of tensors: {quoted(found)} is read as {meant!r}, and the others alike"]
