"""Token Sparse Attention for unmodified PyTorch models, as a torch.compile backend."""
