"""Products with packed weights on a CPU, compiled by numba: no weight is decoded to memory.

    kernels        what `select` asks: whether a call is served, and its products
    bound          a call made of stored tensors, and calls that come again
    linear         a whole linear, or several of one input, as one call of compiled code
    plan           that call, and what it is told
    chains         scales and Hadamard transforms of one side (`hadamard`)
    activations    rows of x as integers
    parts          what a format gives: codes, and the kernels that read them
    trellis        kernels of tiles of a trellis (`tiles`, and its codes `byte_sums`, and gf2:
                   `parities` with AVX-512, `nibbles` with AVX2)
    e8p            kernels of e8p-v1
    codebooks      kernels of indices into one codebook
    code_rows      what those two have in common: the loop over rows and tiles
    code_words     and their weights without AVX-512, words of tables
    panels         many rows of x: a part of W decoded into the cache, torch's product
    sums, memory   what all kernels do with their sums, and with addresses
    vectors        operations on registers, as LLVM's IR
    instructions   which instructions the processor has, and how to choose fewer
    threads        the threads of torch's own pool

Start with `linear`, then `plan`.
May import: kernels of formats, nothing of vqllm.
"""
