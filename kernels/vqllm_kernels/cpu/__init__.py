"""Products with packed weights on a CPU, compiled by numba: no weight is decoded to memory.

    instructions   which instructions the processor has, and how to choose fewer
    vectors        the few operations on registers from which kernels are built, as LLVM's IR
    trellis        tiles of a trellis times 1 to 16 rows of activations
    hadamard       scales and Hadamard transforms
    threads        the threads of torch's own pool

Start with `linear`, which is one call of a whole linear.
May import: kernels of formats, nothing of vqllm.
"""
