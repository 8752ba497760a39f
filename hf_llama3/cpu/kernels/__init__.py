"""Machine code for products with the weights of a model, as they lie in memory."""
