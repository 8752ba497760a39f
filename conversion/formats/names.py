"""Bring names of tensors as other tools leave them to one of the two formats' names."""

from typing import NamedTuple, TypeVar

from hf_llama3.errors import UserError, quoted

from ..weights import EMBEDDING, HEAD_MODULES

Tensor = TypeVar("Tensor")

# Parts of names that torch.compile, DistributedDataParallel, FSDP and activation checkpointing add.
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Tables of RoPE that some files hold; they follow from the configuration, and are not read.
ROPE_TABLES = {"inv_freq", "original_inv_freq", "cos_cached", "sin_cached"}  # Hugging Face's
ROPE_TABLES |= {"freqs", "freqs_cis", "freqs_cos", "freqs_sin"}  # Meta's, torchtitan's, llama2.c's
ADAPTERS = {"lora_A", "lora_B", "lora_a", "lora_b", "base_layer", "modules_to_save"}
BASE = "model."  # before every name of Hugging Face's but the head's


class Settled(NamedTuple):
    """Tensors under the names of one format, and what was changed."""

    tensors: dict
    order: str  # "hf" or "meta": the names, and so the order of query and key rows
    said: list[str]


def settle(tensors: dict[str, Tensor], path) -> Settled:
    """Remove tables of RoPE, wrappers' names, and any prefix of the embedding's name.

    Names without an embedding among them are left, so that the comparison with the table reports them.

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
    """Replace the embedding's prefix by `base`; from other names, such as the head's, remove the shared part of it.

    PEFT, for example, leaves `base_model.model.model.` before layers, and `base_model.model.` before the head.
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
