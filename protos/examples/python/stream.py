"""Streams an answer through generated stubs: ``python stream.py PROMPT [ADDRESS]``."""

import sys
from pathlib import Path

import grpc

from tidegate.v1 import inference_pb2, inference_pb2_grpc, prompt_pb2, sampling_pb2

prompt, address, *_ = *sys.argv[1:], "127.0.0.1:50051"
# gRPC's own retries: a server that is still starting says when to come back, and they heed it.
service_config = Path(__file__).parents[1].joinpath("service_config.json").read_text()

request = inference_pb2.GenerateRequest(
    prompt=prompt_pb2.Prompt(text=prompt),
    sampling=sampling_pb2.SamplingParams(max_tokens=60, temperature=0),
)
with grpc.insecure_channel(address, options=[("grpc.service_config", service_config)]) as channel:
    for response in inference_pb2_grpc.InferenceServiceStub(channel).Generate(request):
        for delta in response.batch.deltas:
            print(delta.text, end="", flush=True)
print()
