"""Where other libraries meet this one. Each part is imported when it is needed.

May import: core, hf, checkpoint, runtime.
Start at `transformers.py`, how `from_pretrained` loads a quantized folder.
"""
