"""What is known of transformers: loading configs, tokenizers and models, and telling linears.

May import: nothing.
Start at `linears.py`, which modules can be quantized.
"""
