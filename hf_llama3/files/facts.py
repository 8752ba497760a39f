"""The files beside a model that record how it was trained and what was measured."""

from importlib.metadata import version

__version__ = version("hf_llama3")

TRAINING_FACTS = "training.json"  # how the model was trained, for its card
CURVES_FILE = "curves.png"  # the losses of training, as a picture
EVALUATIONS = "evaluations.json"  # results of `evaluate --record`, for its card
