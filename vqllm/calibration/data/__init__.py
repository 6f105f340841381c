"""Texts, and the token sequences that are cut out of them or sampled from the model.

Start at `calibration_set.py`.
"""
