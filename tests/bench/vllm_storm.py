"""The work of ``storm.py`` in vLLM, under the Python of an environment that has it and none of ours.

Reads the work as JSON from stdin; of its lines one begins with ``figures:``, and JSON follows.
"""

import json
import sys
import time
from typing import Any

from vllm import LLM, SamplingParams

BLOCK_SIZE = 32


def main() -> None:
    work: dict[str, Any] = json.load(sys.stdin)
    output_len, prompts = work["output_len"], work["prompts"]
    llm = LLM(
        model=work["model"],
        dtype=work["dtype"],
        max_model_len=max(map(len, prompts)) + output_len,
        max_num_seqs=256,
        block_size=BLOCK_SIZE,
        num_gpu_blocks_override=work["device_kv_tokens"] // BLOCK_SIZE,
        disable_log_stats=False,
    )

    def generate(prompts: list[list[int]], length: int) -> None:
        inputs = [{"prompt_token_ids": tokens} for tokens in prompts]
        params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
        llm.generate(inputs, params, use_tqdm=False)

    generate([[7, 8, 9]] * 2, 8)
    began = time.perf_counter()
    generate(prompts, output_len)
    seconds = time.perf_counter() - began
    preemptions = sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    figures = {"tokens_per_s": len(prompts) * output_len / seconds, "dropped": preemptions}
    print(f"\nfigures: {json.dumps(figures)}", flush=True)


if __name__ == "__main__":
    main()
