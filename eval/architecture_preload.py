"""Imported once by the server whose copies run the steps that need vqllm.

What takes seconds is done here, so that no copy has to.
"""

import matplotlib.figure  # noqa: F401
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText  # noqa: F401

import vqllm.api
import vqllm.integrations.transformers
from vqllm.codecs.search.e8p import weighted_nearest

vqllm.integrations.transformers.register()
weighted_nearest(torch.ones(1, 8), torch.eye(8))
