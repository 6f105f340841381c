"""`python -m vqllm`, and so `torchrun -m vqllm`: the command line."""

from vqllm.cli import main

main()
