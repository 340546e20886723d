"""Process groups of torch.distributed, and who holds and computes what in them.

Layer 0: imports torch alone.
"""
