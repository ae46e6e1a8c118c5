"""Which layers of a model may be sparse, measured on the model itself."""
