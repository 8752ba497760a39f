"""An adapter as llama.cpp loads it beside a model: `llama-cli -m model.gguf --lora adapter.gguf`.

Its matrices have the names of GGUF's weights, and B's rows are in Meta's order. One number, alpha, gives all scales:
alpha / rank. Source: llama.cpp, src/llama-adapter.cpp and convert_lora_to_gguf.py.
"""

import numpy as np

from ..formats.gguf import GgufLayout
from ..formats.storage import BY_NAME, to_floats
from ..weights import EMBEDDING
from .files import Adapter, row_of

ENDS = (".lora_a", ".lora_b")


def gguf_adapter(adapter: Adapter, rows_of_b, notes: list[str]) -> bytes:
    """Return the content of the file.

    Args:
        rows_of_b: returns B of a weight, by its name, in Meta's order.
    """
    alphas = {round(pair.scale * pair.a.shape[0], 9) for pair in adapter.pairs.values()}
    alpha = alphas.pop() if len(alphas) == 1 else 0.0
    if not alpha:
        said = "the weights have scales of their own, which GGUF has no place for"
        notes.append(f"{said}: B is multiplied by them, in float32")
    arrays = {}
    for name, pair in adapter.pairs.items():
        a, b = pair.a.array[:], rows_of_b(name)
        if name == EMBEDDING.hf:
            a = a.T  # llama.cpp looks up its rows by tokens
        kind = pair.b.dtype
        if not alpha:
            b = (to_floats(np.ascontiguousarray(b), kind) * np.float32(pair.scale)).astype("<f4")
            kind = BY_NAME["float32"]
        for end, dtype, array in zip(ENDS, (pair.a.dtype, kind), (a, b), strict=True):
            arrays[row_of(name).gguf + end] = (dtype, np.ascontiguousarray(array))
    metadata = {"general.architecture": "llama", "general.type": "adapter", "general.name": adapter.path.resolve().name}
    metadata |= {"adapter.type": "lora", "adapter.lora.alpha": float(alpha)}
    layout = GgufLayout(metadata, [(name, dtype, array.shape) for name, (dtype, array) in arrays.items()])
    content = bytearray(layout.size)
    for offset, (_, array) in zip(layout.offsets, arrays.values(), strict=True):
        content[offset : offset + array.nbytes] = array.tobytes()
    for offset, piece in layout.fixed([]):
        content[offset : offset + len(piece)] = piece
    return bytes(content)
