"""The files that hold a model's tensors, each read with all that it says checked, and laid out before it is written."""
