"""Packed-weight formats: their definition in torch and their kernels.

Imports torch and triton only.
"""
