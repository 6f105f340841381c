"""The quantization loop and its steps: from a loaded layer to a written shard.

May import: core, hf, recipes, calibration, plan, checkpoint, tuning, allocation.
Start at `loop.py`, then `linear.py`, how one linear is quantized.
"""
