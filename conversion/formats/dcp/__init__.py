"""Folders of torch.distributed.checkpoint, as FSDP, torchtitan and torchtune write them: read as data, and laid out.

`.metadata` is a pickle that lists the tensors, their pieces, and the place of each piece in an `__R_N.distcp` file,
where it is a small file of `torch.save`. Sources: torch 2.13.0, torch/distributed/checkpoint/metadata.py and
filesystem.py (`_write_item`, `_StorageInfo`).
"""

from .layout import DcpLayout, make_metadata
from .metadata import METADATA
from .reading import SUFFIX, find_dcp, read_dcp

__all__ = ["METADATA", "SUFFIX", "DcpLayout", "find_dcp", "make_metadata", "read_dcp"]
