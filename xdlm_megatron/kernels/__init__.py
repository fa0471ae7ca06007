"""CUDA twins of diffusion/: the same operations, the same signatures, chosen by dispatch.py."""
