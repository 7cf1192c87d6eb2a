"""The CUDA device's kernels, in Triton. Each stands in a file of its own, below the operation that checks
its arguments and launches it; ``attention.py`` is what the CPU's ``kernels.attention`` is there.

With ``TRITON_INTERPRET=1`` set before the first import they run on CPU tensors, slowly and without bf16.
"""
