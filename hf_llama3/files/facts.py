"""The files beside a model in which a folder says of itself what was trained and measured, and by which version."""

from importlib.metadata import version

__version__ = version("hf_llama3")

TRAINING_FACTS = "training.json"  # what training leaves in a model's folder, for its card
CURVES_FILE = "curves.png"  # its losses, as a picture
EVALUATIONS = "evaluations.json"  # what `evaluate --record` measured, for the card
