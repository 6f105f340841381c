"""Files for other programs: a model as a GGUF file of llama.cpp's native types.

May import: core, rounding, hf, calibration, checkpoint, allocation, quantization.
Start at `native_types.py`, what the types are; then `native_rounding.py`, how a matrix is coded.
"""
