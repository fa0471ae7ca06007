"""Pretraining of mixed discrete diffusion language models (XDLM, arXiv 2602.01362) on Megatron-Core."""

__version__ = "0.1.0"
