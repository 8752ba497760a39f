"""Lay out a folder of torch.distributed.checkpoint to the byte before a tensor is written."""

import pickle
from itertools import accumulate

from ..pth import PthLayout
from ..storage import Dtype


class DcpLayout:
    """The place of every byte of a `.distcp` file, which holds a file of `torch.save` for each tensor.

    Args:
        tensors: (name, dtype, shape), in order.
    """

    needs_checksums = True

    def __init__(self, tensors: list[tuple[str, Dtype, tuple[int, ...]]]):
        self._layouts = [PthLayout("archive", [tensor], bare=True) for tensor in tensors]
        ends = list(accumulate(layout.size for layout in self._layouts))
        self.places = {  # name -> (offset of its file, size)
            name: (end - layout.size, layout.size)
            for (name, _, _), layout, end in zip(tensors, self._layouts, ends, strict=True)
        }
        starts = [start for start, _ in self.places.values()]
        self.offsets = [start + one.offsets[0] for start, one in zip(starts, self._layouts, strict=True)]
        self.size = ends[-1] if ends else 0

    def fixed(self, checksums: list[int]) -> list[tuple[int, bytes]]:
        """Return all other bytes as (offset, bytes), given the CRC-32 of every tensor."""
        parts = zip(self.places.values(), self._layouts, checksums, strict=True)
        return [(start + at, piece) for (start, _), layout, one in parts for at, piece in layout.fixed([one])]


def make_metadata(files: dict[str, tuple[DcpLayout, list[tuple[str, Dtype, tuple[int, ...]]]]]) -> bytes:
    """Return the list of tensors, pickled by the installed torch's own classes."""
    import torch
    from torch.distributed.checkpoint import filesystem, metadata

    tensors, places, Size = {}, {}, torch.Size
    for file, (layout, described) in files.items():
        for name, dtype, shape in described:
            start = Size([0] * len(shape))
            properties = metadata.TensorProperties(dtype=getattr(torch, dtype.name))
            chunks = [metadata.ChunkStorageMetadata(start, Size(shape))]
            tensors[name] = metadata.TensorStorageMetadata(properties, Size(shape), chunks)
            places[metadata.MetadataIndex(name, start)] = filesystem._StorageInfo(file, *layout.places[name])
    names = {name: (name,) for name in tensors}
    whole = metadata.Metadata(tensors, names, places, metadata.StorageMeta(), filesystem.CURRENT_DCP_VERSION)
    return pickle.dumps(whole)
