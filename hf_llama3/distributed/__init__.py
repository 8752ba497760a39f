"""One model over several processes, or its layers over several devices."""

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
PARALLEL = ("data", "tensor", "pipeline")
