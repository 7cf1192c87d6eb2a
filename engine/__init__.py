"""The engine: requests in, tokens out, and the KV cache of every sequence in two tiers.

Knows requests and tensors; knows nothing of gRPC. Imports run one way: ``service → engine → kernels``.
"""
