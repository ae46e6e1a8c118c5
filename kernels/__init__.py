"""The ops of Token Sparse Attention: schema, fake, CPU reference and Triton kernels."""
