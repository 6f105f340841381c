"""What a command does from end to end: quantize, tune, compare.

May import: core, hf, recipes, models, calibration, plan, checkpoint, distillation, quantization,
forecast,
evaluation, export, report, tuning.
Start at `commands.py`, from the arguments of a command to a run; then `quantize.py`.
"""
