"""What every other package may use: the protocols, and mathematics on tensors.

May import: nothing.
Start at `protocols.py`, what a codec, a transform and a rounding rule are.
"""
