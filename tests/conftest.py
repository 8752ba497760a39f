"""Nothing here downloads, and small models take one thread: the switches are set before any library reads them."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # more wait for one another, where something else runs beside
