"""Compute kernels over tensors. They know shapes and strides; they know nothing of requests."""
