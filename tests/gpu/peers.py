"""Other people's kernels on the same pool, where they are installed: FlashInfer, and vLLM's build of FA3.

FlashInfer compiles on first use, a minute or two: ``python3 -P tests/gpu/peers.py`` does it ahead of time.
``FA3_LIBRARY`` names ``_vllm_fa3_C.abi3.so`` of vLLM's wheel.
"""

import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

Launch = Callable[[], torch.Tensor]


@dataclass
class PagedWork:
    """One step's attention. ``N`` blocks, ``L`` layers, ``S`` sequences, ``T`` packed query tokens."""

    pool_NLCKBD: torch.Tensor
    query_THD: torch.Tensor
    block_tables_SM: torch.Tensor
    context_lens: list[int]
    query_starts: list[int]

    @property
    def scale(self) -> float:
        return float(self.query_THD.shape[-1] ** -0.5)

    @property
    def longest_query(self) -> int:
        return max(end - start for start, end in itertools.pairwise(self.query_starts))


def peers(work: PagedWork) -> Iterator[tuple[str, Callable[[], list[Launch]]]]:
    """Of each that is there and does this kind of work its name, and what plans its launches, one a layer."""
    if os.environ.get("FA3_LIBRARY"):
        yield "FA3", lambda: _fa3(work)
    if importlib.util.find_spec("flashinfer") is not None and work.longest_query == 1:
        yield "FlashInfer", lambda: _flashinfer(work, tensor_cores=False)
        yield "FlashInfer, tensor cores", lambda: _flashinfer(work, tensor_cores=True)


def _fa3(work: PagedWork) -> list[Launch]:
    torch.ops.load_library(os.environ["FA3_LIBRARY"])
    ops = torch.ops._vllm_fa3_C
    _, num_heads, head_dim = work.query_THD.shape
    _, _, _, num_kv_heads, block_size, _ = work.pool_NLCKBD.shape
    lens_S = torch.tensor(work.context_lens, dtype=torch.int32, device="cuda")
    starts_S1 = torch.tensor(work.query_starts, dtype=torch.int32, device="cuda")
    longest, longest_query = max(work.context_lens), work.longest_query
    # Planned ahead of the layers, as our own splits are.
    plan = ops.get_scheduler_metadata(
        len(work.context_lens),
        longest_query,
        longest,
        num_heads,
        num_kv_heads,
        head_dim,
        head_dim,
        work.query_THD.dtype,
        lens_S,
        starts_S1,
        None,
        None,
        None,
        None,
        block_size,
        0,
        True,
        -1,
        -1,
        False,
        0,
        None,
        0,
    )

    def launch(layer: int) -> torch.Tensor:
        key_NBKD, value_NBKD = work.pool_NLCKBD[:, layer].transpose(2, 3).unbind(1)
        # In the order of its schema: new keys, output, lengths, table, rotation, scales, window, plan.
        out_THD = ops.fwd(
            work.query_THD,
            key_NBKD,
            value_NBKD,
            None,
            None,
            None,
            None,
            starts_S1,
            None,
            None,
            None,
            lens_S,
            longest_query,
            longest,
            work.block_tables_SM,
            *[None] * 8,
            work.scale,
            True,
            -1,
            -1,
            0.0,
            True,
            plan,
            0,
            None,
            0,
            None,
            1,
            0,
            None,
        )[0]
        return torch.as_tensor(out_THD)

    return [lambda layer=layer: launch(layer) for layer in range(work.pool_NLCKBD.shape[1])]


def _flashinfer(work: PagedWork, tensor_cores: bool) -> list[Launch]:
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper  # noqa: PLC0415 - seldom installed

    _, num_heads, head_dim = work.query_THD.shape
    _, _, _, num_kv_heads, block_size, _ = work.pool_NLCKBD.shape
    counts = [-(-length // block_size) for length in work.context_lens]
    tables = work.block_tables_SM.cpu()
    pages = torch.cat([row[:count] for row, count in zip(tables, counts, strict=True)])
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda"),
        "HND",
        use_tensor_cores=tensor_cores,
        backend="fa2",
    )
    wrapper.plan(
        torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32),
        pages.cuda(),
        torch.tensor([(length - 1) % block_size + 1 for length in work.context_lens], dtype=torch.int32),
        num_heads,
        num_kv_heads,
        head_dim,
        block_size,
        q_data_type=work.query_THD.dtype,
        kv_data_type=work.pool_NLCKBD.dtype,
        sm_scale=work.scale,
    )
    return [
        lambda layer=layer: wrapper.run(work.query_THD, work.pool_NLCKBD[:, layer])
        for layer in range(work.pool_NLCKBD.shape[1])
    ]


def main() -> None:
    """Compile what is compiled on first use, for head size 128 in bf16."""
    work = PagedWork(
        torch.zeros(2, 1, 2, 8, 64, 128, dtype=torch.bfloat16, device="cuda"),
        torch.zeros(1, 32, 128, dtype=torch.bfloat16, device="cuda"),
        torch.zeros(1, 1, dtype=torch.int32, device="cuda"),
        [64],
        [0, 1],
    )
    for name, plan in peers(work):
        try:
            plan()[0]()
            print(f"{name} runs", flush=True)
        except (RuntimeError, TypeError, ValueError) as problem:
            print(f"{name} does not: {problem}", flush=True)


if __name__ == "__main__":
    main()
