"""What tests share: tiny models, random weights and checkpoints, digests of what recipes write."""
