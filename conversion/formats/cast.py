"""Cast elements to another type, on request: the only arithmetic of a conversion."""

import math
import threading

import numpy as np

from hf_llama3.errors import UserError

from .storage import Dtype

AT_A_TIME = 2**17  # elements, whose errors in float64 fit a processor's cache


class Cast:
    """Round elements to another type and remember the largest error."""

    def __init__(self, to: Dtype):
        import torch

        self.torch = torch
        self.to = to
        self.largest_error = 0.0
        self.lock = threading.Lock()

    def __call__(self, block: np.ndarray, stored: Dtype) -> np.ndarray:
        """Cast elements, given and returned as unsigned integers of their width.

        Raises:
            UserError: a finite number has no finite form in the new type.
        """
        flat = np.ascontiguousarray(block).reshape(-1)
        result = np.empty(flat.size, f"<u{self.to.itemsize}")
        for start in range(0, flat.size, AT_A_TIME):
            result[start : start + AT_A_TIME] = self._round(flat[start : start + AT_A_TIME], stored)
        return result.reshape(block.shape)

    def _round(self, block: np.ndarray, stored: Dtype) -> np.ndarray:
        torch = self.torch
        signed = np.array(block).view(f"<i{stored.itemsize}")  # torch lacks unsigned types, and needs writable memory
        before = torch.from_numpy(signed).view(getattr(torch, stored.name))
        after = before.to(getattr(torch, self.to.name))
        error = (after.double() - before.double()).abs().nan_to_num(nan=0.0, posinf=math.inf).max().item()
        if math.isinf(error):
            largest = before.double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).abs().max().item()
            raise UserError(
                f"--dtype {self.to.name} cannot hold {largest:g}, which is in the weights; choose a wider type"
            )
        with self.lock:
            self.largest_error = max(self.largest_error, error)
        return after.view(getattr(torch, f"int{8 * self.to.itemsize}")).numpy().view(f"<u{self.to.itemsize}")
