"""What will be done, before anything is: which linears, how they are stored, what they cost.

May import: core, hf, recipes, checkpoint, calibration.
Start at `selection.py`, which linears; `not_quantized.py`, why not the others.
"""
