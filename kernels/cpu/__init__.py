"""Native kernels of the CPU device: a few C files, compiled for the machine that they run on.

A step of a small model is spent on the way to its operations rather than in them, so each kernel does what
would be several operations of torch, and is called through ctypes in about a microsecond. The C compiler is
the machine's own, as it is for Triton; where there is none, ``kernels.attention`` and torch serve.
"""
