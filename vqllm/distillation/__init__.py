"""A quantized model that can be trained, and the original that it learns from.

May import: core, hf, recipes, calibration, plan, checkpoint, runtime, tuning.
Start at `student.py`.
"""
