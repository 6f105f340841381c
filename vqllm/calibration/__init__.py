"""Measurements on text: the model layer by layer, Hessians, gradients; `data/` is the text.

May import: core, hf, checkpoint.
Start at `layer_calibrator.py`, H of every input group of a layer.
"""
