"""How `from_pretrained` loads a folder that `hf-llama3 pack` made, by the library's interface for quantised weights.

The library imports this module before its models; so what needs those is imported inside of functions.
"""

from safetensors import safe_open
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_llama3.conversion.config.hf import PACKED
from hf_llama3.conversion.formats.storage import BY_NAME, Dtype
from hf_llama3.errors import UserError

PLAIN = "bfloat16"  # the name of exact weights
FORMAT = 2  # of packed folders; format 1 could be read by some processors only
TYPES = BY_NAME | {"int8": Dtype("int8", "I8", "", 1), "uint8": Dtype("uint8", "U8", "", 1)}  # as stored


class PackedConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed folder; its weights are "bfloat16", "int8" or "int4"."""

    def __init__(self, weights: str, format: int = 1, **others):
        self.quant_method = PACKED
        self.weights = weights
        self.format = format


class PackedQuantizer(HfQuantizer):
    """Give the tensors of a packed folder to kernels, and leave an optimised model."""

    requires_calibration = True  # only packed folders; a plain model is quantised by `hf_llama3.optimize`

    def validate_environment(self, *args, device_map=None, **kwargs):
        if self.quantization_config.format != FORMAT:
            found = self.quantization_config.format
            raise UserError(f"packed folders must have format {FORMAT}, got {found}; run hf-llama3 pack again")
        places = device_map.values() if isinstance(device_map, dict) else [device_map or "cpu"]
        if others := {str(place) for place in places} - {"cpu"}:
            raise UserError(f"a packed folder is for a CPU, got device_map {sorted(others)}; load the plain checkpoint")

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        """Prepare every linear layer whose tensors are stored for a kernel to take them."""
        from . import processor

        weights = self.quantization_config.weights
        dtype = str(model.dtype).removeprefix("torch.")
        if weights == PLAIN and dtype != PLAIN:
            raise UserError(f"the packed weights are {PLAIN}, got dtype {dtype}; leave it out or load the plain folder")
        if not processor.here().has_kernels:
            raise UserError(f"packed weights need a processor with AVX2 and FMA, or NEON, got {processor.here()}")
        stored = describe_files(checkpoint_files or [])
        self.kernels = {}
        for name, module in model.named_modules():
            if type(module) is nn.Linear and (kernel := self.find_kernel(model, name, module, stored)) is not None:
                self.kernels[name] = kernel
                for key, tensor in kernel.layout(tuple(module.weight.shape)).items():
                    module.register_buffer(key, tensor)
                if f"{name}.weight" not in model.all_tied_weights_keys:
                    module.weight = None

    def find_kernel(self, model, name: str, module: nn.Linear, stored: dict):
        """Return the class of kernel whose tensors the files hold, and check that they are all there in its layout."""
        from .kernels.int8_int4 import Int4Kernel, Int8Kernel

        for kernel in (Int8Kernel, Int4Kernel):
            expected = {f"{name}.{key}": tensor for key, tensor in kernel.layout(tuple(module.weight.shape)).items()}
            found = {key: stored.get(key) or stored.get(f"{model.base_model_prefix}.{key}") for key in expected}
            if not any(found.values()):
                continue
            for key, tensor in expected.items():
                wanted = (str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
                if found[key] != wanted:
                    raise UserError(f"{key} of a packed folder must be {wanted}, got {found[key]}; pack it again")
            return kernel
        return None

    def _process_model_after_weight_loading(self, model, **kwargs):
        from .linear import use_kernel
        from .optimization import optimize

        for name, kernel in self.kernels.items():
            module = model.get_submodule(name)
            shape = (module.out_features, module.in_features)
            stored = {key: module._buffers.pop(key) for key in kernel.layout(shape)}
            use_kernel(module, kernel.from_stored(stored, shape, model.dtype), keeps_weight=module.weight is not None)
        self.remove_quantization_config(model)  # from here on the model is as `optimize` leaves it
        weights = self.quantization_config.weights
        optimize(model, None if weights == PLAIN else weights)
        model.optimization.trainable = [name for name, _ in model.named_parameters()]
        return model

    def is_serializable(self):
        return False

    @property
    def is_trainable(self):
        return False


def describe_files(paths) -> dict[str, tuple[str, list[int]]]:
    """Return the type and shape of every tensor in the files, by name."""
    names, found = {dtype.safetensors: name for name, dtype in TYPES.items()}, {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                found[name] = (names.get(part.get_dtype(), part.get_dtype()), list(part.get_shape()))
    return found
