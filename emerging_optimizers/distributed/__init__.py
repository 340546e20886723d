"""Process groups of torch.distributed.

Layer 0: imports torch alone.
"""
