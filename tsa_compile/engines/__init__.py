"""Token Sparse Attention inside the engines that run a model themselves."""
