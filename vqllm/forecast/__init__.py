"""What a run will give and take, before it begins: size, quality, time, memory, disk.

May import: core, hf, recipes, calibration, checkpoint, plan, allocation, quantization, tuning,
report.
Start at `plan.py`, the record; `sizes.py` has the size, and what stays as it is.
"""
