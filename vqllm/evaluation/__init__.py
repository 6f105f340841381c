"""Measurements of a result: perplexity and divergence, speed, distortion of codecs.

May import: core, hf, codecs, checkpoint, calibration, runtime.
Start at `perplexity.py`.
"""
