"""The gRPC service: it knows the wire, and of the engine only its client, requests and text."""
