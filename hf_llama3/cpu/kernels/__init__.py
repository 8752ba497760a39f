"""Machine code for products with the weights of a model, and for attention to its cache, as they lie in memory."""
