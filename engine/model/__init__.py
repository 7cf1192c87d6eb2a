"""Model definitions, checkpoint loading, the step runner and the sampler."""
