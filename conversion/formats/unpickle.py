"""The pickle in a file of torch's, interpreted by a machine that can build nothing but descriptions of tensors.

A hostile one can neither run code nor make the reader allocate.
"""

import collections
import io
import pickle
import pickletools
from typing import NamedTuple

from hf_llama3.errors import UserError, quoted, shown

from .names import is_rope_table
from .storage import BY_STORAGE, Dtype

MAX_PICKLE_BYTES = 64 * 2**20  # the 405B's is 0.3 MB a shard
# Where trainers keep the weights beside the state of their run.
STATE_KEYS = ("model", "state_dict", "model_state_dict", "module", "weights")
OTHER_SIZES = {"LongStorage": 8, "IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1}
OTHER_SIZES |= {"BoolStorage": 1, "ComplexFloatStorage": 8, "ComplexDoubleStorage": 16}


class Described(NamedTuple):
    """A tensor of a pickle; of a type that is not read, the type is torch's name."""

    dtype: Dtype | str
    key: str  # of its storage
    first: int  # element of the storage
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def check_memo(pickled: bytes):
    """Raise if a memo index sizes a table: no honest one exceeds the number of bytes that could have filled it."""
    for opcode, argument, _ in pickletools.genops(pickled):
        if "PUT" in opcode.name and argument is not None and argument > len(pickled):
            raise pickle.UnpicklingError(f"memo index {argument}")


class TensorUnpickler(pickle.Unpickler):
    """Interpret a pickle that can only build a dictionary of tensor descriptions, or one tensor's."""

    def __init__(self, path, pickled: bytes):
        super().__init__(io.BytesIO(pickled))
        self.path = path
        self.pickled = pickled
        self.built = None
        self.storages = {}  # key -> (type, elements), as the tensors say

    def run(self):
        """Return what the pickle builds, the first time by reading it.

        Raises:
            UserError: it is damaged, or would build something else.
        """
        if self.built is not None:
            return self.built
        try:
            check_memo(self.pickled)
            self.built = self.load()
            return self.built
        except UserError:
            raise
        except Exception as error:  # whatever a damaged pickle makes the machine stumble over
            raise UserError(
                f"the list of tensors in {self.path} is damaged ({shown(error)}); download it again"
            ) from error

    def load_tensors(self) -> dict[str, Described]:
        """Return the tensors by name, without tables of RoPE of whatever type."""
        state = self.run()
        if not isinstance(state, dict):
            raise UserError(f"{self.path} must hold a dictionary of tensors, got {type(state).__name__}")
        nested = [state[key] for key in STATE_KEYS if isinstance(state.get(key), dict)]
        tensors = {}
        for name, value in (nested[0] if nested else state).items():
            if not (isinstance(name, str) and isinstance(value, Described)):
                got = f"{type(value).__name__} {quoted(name)}"
                raise UserError(f"{self.path} must hold nothing but tensors by name, got {got}")
            if not is_rope_table(name) or isinstance(value.dtype, Dtype):
                tensors[name] = self.require_type(value)
        return tensors

    def find_class(self, module, name):
        allowed = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): describe_tensor,
            # for types without a storage class: float8, ...
            ("torch._utils", "_rebuild_tensor_v3"): describe_untyped,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *unused: tensor,
            ("torch.storage", "UntypedStorage"): None,
        }
        if module == "torch":
            return BY_STORAGE.get(name, name)
        if (module, name) not in allowed:
            wanted = shown(f"{module}.{name}")
            raise UserError(f"{self.path} asks to run {wanted}, which no checkpoint needs; do not trust this file")
        return allowed[module, name]

    def persistent_load(self, pid):
        kind, dtype, key, _, elements = pid[:5]
        if kind != "storage" or not isinstance(key, str) or not isinstance(dtype, Dtype | str | None):
            raise pickle.UnpicklingError(f"persistent id {quoted(pid)}")
        self.storages[key] = (dtype, elements)
        return dtype, key, elements

    def require_type(self, tensor: Described) -> Described:
        if not isinstance(tensor.dtype, Dtype):
            kinds = sorted(dtype.name for dtype in BY_STORAGE.values())
            raise UserError(f"{self.path} holds tensors of type {shown(tensor.dtype)}; only {kinds} can be converted")
        return tensor


def describe_tensor(storage, first, shape, strides, *unused, dtype=None) -> Described:
    stored, key, _ = storage
    numbers = (first, *shape, *strides)
    if not all(type(number) is int for number in numbers) or len(shape) != len(strides):
        raise pickle.UnpicklingError(f"shape {quoted(shape)} with strides {quoted(strides)}")
    return Described(dtype or stored, key, first, tuple(shape), tuple(strides))


def describe_untyped(storage, first, shape, strides, requires_grad, hooks, dtype, *unused) -> Described:
    return describe_tensor(storage, first, shape, strides, dtype=str(dtype))
