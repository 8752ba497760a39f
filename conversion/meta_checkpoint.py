"""A directory of Meta's: recognised and read, with any number of model-parallel shards.

What lies in one: `params.json`, a `consolidated.NN.pth` for each shard, `tokenizer.model`, `checklist.chk`.
"""

import re
from pathlib import Path

from hf_llama3.errors import UserError

from .pth import read_pth
from .storage import StoredTensor

PARAMS_FILE = "params.json"
TOKENIZER_FILE = "tokenizer.model"
SHARD_NAME = re.compile(r"consolidated\.(\d+)\.pth")


def find_shards(folder: Path) -> list[Path]:
    """List the shards of a Meta directory in their order.

    Raises:
        UserError: there are none, or one is missing.
    """
    found = {int(match[1]): path for path in folder.glob("*.pth") if (match := SHARD_NAME.fullmatch(path.name))}
    others = sorted(folder.glob("*.pth"))
    if not found and len(others) == 1:  # a single shard that was renamed
        return others
    if not found:
        raise UserError(f"{folder} holds no consolidated.00.pth; pass the folder that Meta's download made")
    if missing := set(range(max(found) + 1)) - found.keys():
        raise UserError(f"{folder} lacks consolidated.{min(missing):02d}.pth of {max(found) + 1} shards; download it")
    return [found[index] for index in sorted(found)]


def read_shards(folder: Path) -> dict[str, list[StoredTensor]]:
    """List the tensors of a Meta directory by Meta's names, one for each shard.

    Raises:
        UserError: a shard is damaged, or the shards hold different tensors.
    """
    paths = find_shards(folder)
    shards = [read_pth(path) for path in paths]
    for path, shard in zip(paths, shards, strict=True):
        if differing := sorted(shard.keys() ^ shards[0].keys()):
            raise UserError(f"{path.name} and {paths[0].name} must hold the same tensors, differ in {differing[:3]}")
    return {name: [shard[name] for shard in shards] for name in shards[0]}
