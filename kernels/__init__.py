"""Attention kernels for one kind of device each; paged_attention.py chooses among them."""
