"""Triton kernels of CRaFT, installed as craft_opt.kernels."""

__version__ = "0.0.0"
