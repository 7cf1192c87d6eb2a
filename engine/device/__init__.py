"""What the engine asks of a GPU, and the one place that calls CUDA."""
