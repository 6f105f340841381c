"""All knowledge of transformers: loading configs, tokenizers and models, recognising linears.

May import: core, foreign.
Start at `linears.py`, which modules can be quantized.
"""
