"""An adapter's files, as PEFT writes them: adapter_config.json and the pairs of narrow matrices in adapter_model.

The product B @ A, times a scale, is added to a weight. A is (rank, in) and B (out, rank); for an embedding A is
(rank, vocabulary) and B (hidden, rank), and their product is transposed. torchtune's own files hold the same pairs
under its names, with rows in Meta's order (torchtune 0.6, models/convert_weights.py, `tune_to_peft_adapter_weights`).
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from hf_llama3.errors import UserError, quoted, shown
from hf_llama3.files.atomic import is_unfinished
from hf_llama3.files.json import read_json
from hf_llama3.files.schema import FLAG, Rule, check, mapped, number, optional, text, whole

from ..formats.hf import INDEX, merging_by_peft
from ..formats.pth import read_pth
from ..formats.safetensors import read_safetensors
from ..formats.storage import StoredTensor
from ..formats.torch_files import ADAPTER as CONFIG
from ..formats.torch_files import BIN_INDEX, find_torchtune_adapters, is_weights, refuse_lone_adapter
from ..weights import Row, rows

TENSORS, OLDER_TENSORS = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
LORA, LORA_OF_EMBEDDING = (".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")
ENDS = {end: one for ends in (LORA, LORA_OF_EMBEDDING) for end, one in zip(ends, "ab", strict=True)}
MOST_LAYERS = 4096
# torchtune's names of modules -> Meta's; layers and the output have the same
TORCHTUNE = {
    "attn.q_proj": "attention.wq",
    "attn.k_proj": "attention.wk",
    "attn.v_proj": "attention.wv",
    "attn.output_proj": "attention.wo",
    "mlp.w1": "feed_forward.w1",
    "mlp.w2": "feed_forward.w2",
    "mlp.w3": "feed_forward.w3",
}
TORCHTUNE_ENDS = {".lora_a.weight": LORA[0], ".lora_b.weight": LORA[1]}


def pattern(rule: Rule) -> Rule:
    """Accept an object with few enough keys to compare each with every module."""
    table = mapped(rule)
    return Rule(f"{table.words}, at most 256", lambda value: table.takes(value) and len(value) <= 256)


SCHEMA = {
    "peft_type": text(64),
    "r": whole(1, 2**20),
    "lora_alpha": number(-(2.0**40)),
    "use_rslora": optional(FLAG),
    "rank_pattern": optional(pattern(whole(1, 2**20))),
    "alpha_pattern": optional(pattern(number(-(2.0**40)))),
    "base_model_name_or_path": optional(text()),
}
REQUIRED = ("peft_type", "r", "lora_alpha")
# Keys of adapters that are more than two narrow matrices beside a weight -> what they are
BEYOND = {
    "use_dora": "DoRA",
    "use_qalora": "QA-LoRA",
    "lora_bias": "biases of its own",
    "fan_in_fan_out": "weights that lie the other way",
    "modules_to_save": "whole modules beside the narrow matrices",
    "layer_replication": "layers that stand several times",
    "trainable_token_indices": "single tokens that are trained",
    "target_parameters": "parameters outside of layers",
    "alora_invocation_tokens": "aLoRA",
    "megatron_config": "Megatron's parallel layers",
}
# Initialisations of the matrices; others change the model's weights as well.
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(eq=False)
class Pair:
    """The two matrices beside one weight, and the scale of their product."""

    a: StoredTensor
    b: StoredTensor
    scale: float


@dataclass(eq=False)
class Adapter:
    """An adapter; its matrices are located, but not read."""

    path: Path
    order: str  # of names, and of B's rows for queries and keys: "hf" or "meta"
    config: dict
    pairs: dict[str, Pair] = field(repr=False)  # by the name of the weight in Hugging Face's files


WEIGHTS = {key: row for row in rows(1) if len(row.shape) == 2 for key in (row.meta, row.hf.removeprefix("model."))}


def row_of(name: str) -> Row | None:
    """Return the table's row of a weight, given its name in either format."""
    parts = name.removeprefix("model.").split(".")
    number = parts[1] if parts[0] == "layers" and len(parts) > 1 and parts[1].isdecimal() else None
    if number is not None:
        if len(number) > 4 or int(number) >= MOST_LAYERS:
            return None
        parts[1] = "0"
    row = WEIGHTS.get(".".join(parts))
    if row is None or number is None:
        return row
    return row._replace(
        **{key: re.sub(r"\b0\b", str(int(number)), getattr(row, key)) for key in ("meta", "hf", "gguf")}
    )


def is_adapter(folder: Path) -> bool:
    """Tell whether a folder holds an adapter and no model."""
    if not (folder / CONFIG).is_file():
        return False
    others = [path for path in folder.iterdir() if not path.name.startswith("adapter")]
    return not any(
        is_weights(path) or path.suffix == ".safetensors" or path.name in (INDEX, BIN_INDEX) for path in others
    )


def read_adapter(folder: Path, unfinished: bool = False) -> Adapter:
    """Read an adapter.

    Args:
        unfinished: accept a folder that is still being written.

    Raises:
        UserError: it is damaged, or not plain LoRA.
    """
    path = folder / CONFIG
    if is_unfinished(folder) and not unfinished:
        raise UserError(f"{folder} is not finished; run the command that was writing it again")
    if not path.is_file():
        refuse_lone_adapter(folder)
        raise UserError(f"--adapter must be a folder with an {CONFIG}, got {folder}; pass what PEFT saved")
    config = check(read_json(path), SCHEMA, path, REQUIRED, "; pass what PEFT saved")
    remedy = f"merge it by PEFT: {merging_by_peft(folder)}"
    if config["peft_type"] != "LORA":
        raise UserError(f"`peft_type` in {path} must be 'LORA', got {quoted(config['peft_type'])}; {remedy}")
    for key, meaning in BEYOND.items():
        if config.get(key):
            raise UserError(f"{path} asks for {meaning} (`{key}`), which is not LoRA alone; {remedy}")
    if config.get("bias") not in (None, "none"):
        raise UserError(f"`bias` in {path} must be 'none', got {quoted(config['bias'])}; {remedy}")
    if (start := config.get("init_lora_weights")) not in PLAIN_STARTS:
        raise UserError(f"{path} began with {quoted(start)}, which changes the model's weights too; {remedy}")

    tensors = read_matrices(folder)
    found, orders = {}, set()
    for name, tensor in sorted(tensors.items()):
        end = next((end for end in ENDS if name.endswith(end)), None)
        row = row_of(name.removeprefix(PREFIX).removesuffix(end) + ".weight") if end else None
        if row is None or len(tensor.shape) != 2:
            raise UserError(f"{folder} holds {quoted(name)}, which is no LoRA of a Llama's weight; {remedy}")
        orders.add("meta" if name.removeprefix(PREFIX).removesuffix(end) + ".weight" == row.meta else "hf")
        if found.setdefault(row.hf, {}).setdefault(ENDS[end], tensor) is not tensor:
            raise UserError(f"{folder} holds two matrices {ENDS[end].upper()} for {row.hf}; {remedy}")
    if len(orders) != 1:
        raise UserError(
            f"{folder} must name its weights as Meta or as Hugging Face does, got {sorted(orders)}; {remedy}"
        )
    order = orders.pop()
    pairs = {name: make_pair(name, pair, config, order, folder) for name, pair in found.items()}
    return Adapter(folder, order, config, pairs)


def read_matrices(folder: Path) -> dict[str, StoredTensor]:
    """Return an adapter's matrices under PEFT's names.

    Raises:
        UserError: there are none, or those of several epochs.
    """
    if (folder / TENSORS).exists():
        return read_safetensors(folder / TENSORS)
    if (folder / OLDER_TENSORS).exists():
        return read_pth(folder / OLDER_TENSORS)
    found = find_torchtune_adapters(folder)
    if not found:
        raise UserError(f"{folder} has an {CONFIG} but no {TENSORS}; download it")
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:4])
        raise UserError(f"{folder} holds the adapters {names}; move all but one elsewhere")
    return {name_in_peft(name): tensor for name, tensor in read_pth(found[0]).items()}


def name_in_peft(name: str) -> str:
    """Return PEFT's name, with Meta's modules, of a matrix of torchtune's; an unknown one stays as it is."""
    end = next((end for end in TORCHTUNE_ENDS if name.endswith(end)), None)
    if end is None:
        return name
    module = name.removesuffix(end)
    layer, inner = module[: module.rfind(".", 0, module.rfind("."))], ".".join(module.split(".")[-2:])
    module = f"{layer}.{TORCHTUNE[inner]}" if inner in TORCHTUNE else module
    return PREFIX + module + TORCHTUNE_ENDS[end]


def make_pair(name: str, pair: dict[str, StoredTensor], config: dict, order: str, folder: Path) -> Pair:
    """Return the two matrices of a weight.

    Raises:
        UserError: one is missing, or their shapes contradict the configuration.
    """
    if len(pair) < 2:
        raise UserError(f"{folder} lacks the matrix {'AB'['a' in pair]} for {name}; download it again")
    row = row_of(name)
    module = (row.meta if order == "meta" else row.hf).removesuffix(".weight")
    rank = matching(config.get("rank_pattern"), module, folder) or config["r"]
    alpha = matching(config.get("alpha_pattern"), module, folder)
    alpha = config["lora_alpha"] if alpha is None else alpha
    if (pair["a"].shape[0], pair["b"].shape[1]) != (rank, rank):
        got = f"A {list(pair['a'].shape)} and B {list(pair['b'].shape)}"
        raise UserError(f"{folder}: the rank of {name} must be {rank} by its {CONFIG}, got {got}; download it again")
    return Pair(pair["a"], pair["b"], alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def matching(pattern: dict | None, module: str, folder: Path):
    """Return a pattern's value for a module: that of the first key which ends its name, as in PEFT.

    PEFT takes keys for regular expressions. One from a file could run for ever, so only names are accepted.
    """
    for key, value in (pattern or {}).items():
        name = key.removeprefix("^").removesuffix("$")
        if not re.fullmatch(r"[\w.]+", name):
            remedy = f"write the names, or merge it by PEFT: {merging_by_peft(folder)}"
            raise UserError(f"the patterns in {folder / CONFIG} must be names of modules, got {quoted(key)}; {remedy}")
        if module == name or (module.endswith(f".{name}") and not key.startswith("^")):
            return value
    return None


def left_out(folder: Path) -> list[str]:
    """Note the files in an adapter's folder that are left out."""
    read = (CONFIG, TENSORS, OLDER_TENSORS)
    others = sorted(path.name for path in folder.iterdir() if path.name not in read)
    return [f"left out, since it is none of an adapter's files: {', '.join(map(shown, others[:5]))}"] if others else []
