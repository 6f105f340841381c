"""The names of this module are in `kernels` and `select` now; they can be imported from here too.

Call, Operation, BATCH_BUCKETS and bucket are part of the protocol of kernels; Choice, choices,
force and forget belong to the selection.
"""

from vqllm_kernels.kernels import BATCH_BUCKETS, Call, Operation, bucket
from vqllm_kernels.select import Choice, choices, force, forget

__all__ = [
    "BATCH_BUCKETS",
    "Call",
    "Choice",
    "Operation",
    "bucket",
    "choices",
    "force",
    "forget",
]
