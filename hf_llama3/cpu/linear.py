"""Linear layers that multiply by a kernel, and the parameter that takes the place of a quantised weight."""

import itertools
import weakref

import torch
from torch import library, nn
from torch.utils._pytree import tree_map_only

from hf_llama3.errors import UserError

from .kernels.exact import ExactKernel
from .kernels.kernel import Kernel

KERNELS = weakref.WeakValueDictionary()  # number -> kernel; compiled code knows the number
NUMBERS = itertools.count()
CHANGED = "the weights of an optimised model must stay as they are; call hf_llama3.restore before they are changed"


class QuantizedWeight(torch.Tensor):
    """The parameter in place of a quantised weight: it has its shape and type, but cannot be read or written."""

    @staticmethod
    def __new__(cls, kernel):
        return torch.Tensor._make_wrapper_subclass(cls, kernel.shape, dtype=kernel.dtype, device="cpu")

    def __init__(self, kernel):
        self.kernel = kernel

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].kernel)
        if function._schema.is_mutable and isinstance(args[0], cls):
            raise UserError(CHANGED)
        tree_map_only(cls, refuse_reading, (args, kwargs or {}))
        return function(*args, **(kwargs or {}))

    def __deepcopy__(self, memo):
        return nn.Parameter(QuantizedWeight(self.kernel), requires_grad=False)

    def __repr__(self, **kwargs):
        return f"QuantizedWeight(shape={tuple(self.shape)}, dtype={self.dtype})"


def refuse_reading(*_):
    raise UserError("a quantised weight cannot be read, since the exact one is gone; load the model again")


class KernelLinear(nn.Linear):
    """An `nn.Linear` that multiplies by its kernel.

    A module changes its class in place: hooks, references to the module and its name must stay as they are.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return torch.ops.hf_llama3.kernel_linear(x, self.bias, self.number, self.out_features)
        if self.version is not None and self.weight._version != self.version:
            raise UserError(CHANGED)
        if x.requires_grad and torch.is_grad_enabled():
            if not self.kernel.is_exact:
                raise UserError("a quantised model has no gradients, got inputs that require them; use torch.no_grad()")
            return super().forward(x)
        return self.kernel(x, self.bias)

    def __setattr__(self, name, value):
        if name == "weight":
            raise UserError(CHANGED)
        super().__setattr__(name, value)

    def __setstate__(self, state):
        super().__setstate__(state)
        if self.version is not None:
            self.version = self.weight._version  # the count of a copy starts at 0
        if self.kernel.is_exact:
            self.set_kernel(ExactKernel(self.weight))

    def set_kernel(self, kernel: Kernel):
        """Multiply by a kernel from now on, registered under a new number."""
        self.kernel, self.number = kernel, next(NUMBERS)
        KERNELS[self.number] = kernel

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if isinstance(self.weight, QuantizedWeight):
            refuse_reading()
        super()._save_to_state_dict(destination, prefix, keep_vars)


def use_kernel(linear: nn.Linear, kernel: Kernel, keeps_weight: bool):
    """Let a module multiply by a kernel.

    An exact kernel reads the module's weight. A quantised one replaces it, unless the module `keeps_weight` for another
    module that shares the parameter.
    """
    linear.version = None
    if not kernel.is_exact and not keeps_weight:
        linear.weight = nn.Parameter(QuantizedWeight(kernel), requires_grad=False)
    elif not kernel.is_exact and not linear.weight.is_inference():
        linear.version = linear.weight._version
    linear.__class__ = KernelLinear
    linear.set_kernel(kernel)


def use_weight(linear: KernelLinear):
    """Undo `use_kernel` of an exact kernel."""
    linear.__class__ = nn.Linear
    del linear.kernel, linear.number, linear.version


OPERATORS = library.Library("hf_llama3", "DEF")
OPERATORS.define("kernel_linear(Tensor x, Tensor? bias, int number, int out_features) -> Tensor")


@library.impl(OPERATORS, "kernel_linear", "CPU")
def kernel_linear(x, bias, number, out_features):
    return KERNELS[number](x, bias)


@library.impl(OPERATORS, "kernel_linear", "Meta")
def kernel_linear_meta(x, bias, number, out_features):
    return x.new_empty(*x.shape[:-1], out_features)
