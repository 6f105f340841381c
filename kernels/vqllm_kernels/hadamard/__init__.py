"""Orthonormal Hadamard-like transforms of every size."""
