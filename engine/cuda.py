"""An engine's parts on a CUDA device: weights, both pools, the copy engine and the runner."""

import time
from pathlib import Path

import structlog
import torch

from tidegate.engine.config import ConfigError, EngineConfig
from tidegate.engine.device.cuda import CudaDevice
from tidegate.engine.device.streams import Device
from tidegate.engine.memory.cuda_transfer import CudaTransfer
from tidegate.engine.memory.layout import BlockLayout
from tidegate.engine.memory.pinned_pool import PinnedPool
from tidegate.engine.memory.sizing import headroom, size_tiers
from tidegate.engine.model.cuda_decoder import CudaDecoder
from tidegate.engine.model.cuda_runner import CudaRunner
from tidegate.engine.model.linear import PlainLinear
from tidegate.engine.model.weights import load_weights
from tidegate.engine.parts import DeviceParts
from tidegate.engine.request import SamplingParams
from tidegate.engine.step import Chunk, RowSetup, StepPlan

BLOCK_SIZES = (64, 128)
"""Multiples of the tensor cores' tiles: the first whose blocks are ``FAST_COPY`` long is taken, or the last.
64 are 8 MiB of Llama-3.1-8B's KV in bf16."""
FAST_COPY = 3 * 2**20
"""Bytes from which a copy runs at nearly the link's full speed: blocks of 1.75 MiB measured 0.85 of it."""
STEP_TOKENS = 2048
"""Where nobody says: products of so many tokens run at full speed, and a longer step would only hold up
those who decode beside it."""
WRITE_AHEAD = 0.5
"""Share of the link's time beside a step that may go to blocks that nobody has to move yet."""

log = structlog.get_logger(__name__)


def assemble(config: EngineConfig, path: Path, progress: bool, device: Device | None = None) -> DeviceParts:
    """Load the checkpoint in ``path`` and size both tiers by what is left. Raises ``ConfigError``.

    ``device``: None is the machine's own.
    """
    started = time.perf_counter()
    device = device or _device()
    model, weights = load_weights(path, lambda *_: PlainLinear, config.dtype, device.torch_device, progress)
    decoder = CudaDecoder(model, weights, model.sequence_limit(config.max_model_len))
    device.synchronize()
    return parts_of(config, decoder, device, load_seconds=time.perf_counter() - started)


def parts_of(
    config: EngineConfig, decoder: CudaDecoder, device: Device, load_seconds: float = 0.0
) -> DeviceParts:
    """The parts around a model that is on the device. Raises ``ConfigError``."""
    loaded = time.perf_counter()
    model, model_len = decoder.config, decoder.max_model_len
    layout = decoder.layout(config.block_size or default_block_size(decoder.layout(BLOCK_SIZES[0])))
    groups = tuple(group.kind for group in decoder.groups)
    step_tokens = config.max_step_tokens or STEP_TOKENS
    device_free = 0
    if config.device_kv_tokens is None:
        device_free = _room_for_kv(config, decoder, layout, device, step_tokens)
    sizes = size_tiers(
        config,
        block_size=layout.block_size,
        block_bytes=layout.block_bytes,
        model_len=model_len,
        step_tokens=step_tokens,
        free=headroom(),
        device_free=device_free,
        groups=groups,
    )
    device_pool = layout.allocate(sizes.device, device.torch_device)
    host_pool = PinnedPool(device, layout, sizes.host)
    runner = CudaRunner(
        decoder,
        device,
        device_pool,
        layout,
        max_rows=config.max_num_seqs,
        max_model_len=sizes.max_model_len,
        max_step_tokens=step_tokens,
        eos_token_ids=model.eos_token_ids,
        groups=groups,
    )
    transfer = CudaTransfer(device, device_pool, host_pool, compute_done=lambda: runner.last_done)
    transfer.calibrate()
    return DeviceParts(
        model=model,
        dtype=decoder.dtype,
        device=str(device.torch_device),
        layout=layout,
        groups=groups,
        sizes=sizes,
        transfer=transfer,
        runner=runner,
        max_step_tokens=step_tokens,
        host_ready=lambda: host_pool.num_ready,
        write_ahead=WRITE_AHEAD,
        load_seconds=load_seconds,
        pool_seconds=time.perf_counter() - loaded,
    )


def default_block_size(layout: BlockLayout) -> int:
    """Tokens a block, of a model with the KV of this layout."""
    long_enough = (size for size in BLOCK_SIZES if size * layout.block_bytes >= FAST_COPY * layout.block_size)
    return next(long_enough, BLOCK_SIZES[-1])


def _device() -> CudaDevice:
    if not torch.cuda.is_available():
        raise ConfigError("device 'cuda': torch finds no GPU that it can use; use 'cpu' or 'auto'")
    return CudaDevice()


def _room_for_kv(
    config: EngineConfig, decoder: CudaDecoder, layout: BlockLayout, device: Device, step_tokens: int
) -> int:
    """Bytes that the device tier may take: of the share of the device's memory that was asked for, what the
    weights and the largest step leave. Raises ``ConfigError`` where that is nothing.
    """
    device.release_cache()
    memory = device.memory()
    needed = device.peak_bytes(lambda: _largest_steps(config, decoder, layout, device, step_tokens))
    device.release_cache()
    allowed = int(memory.total * config.device_memory_fraction)
    room = allowed - (memory.total - memory.free) - needed
    log.info("device_memory", total=memory.total, free=memory.free, largest_step=needed, kv=max(0, room))
    if room <= 0:
        raise ConfigError(
            f"device_memory_fraction {config.device_memory_fraction} of {memory.total} bytes leaves nothing "
            f"for the KV cache: {memory.total - memory.free} are in use and a step needs {needed}; raise it, "
            "lower max_step_tokens or max_num_seqs, or choose a smaller model"
        )
    return room


def _largest_steps(
    config: EngineConfig, decoder: CudaDecoder, layout: BlockLayout, device: Device, tokens: int
) -> None:
    """As many prompt tokens, and as many decodes, as a step may have. All of them in one block: what it
    holds means nothing.
    """
    pool = layout.allocate(1, device.torch_device).zero_()
    rows, model_len = config.max_num_seqs, decoder.max_model_len
    eos, groups = decoder.config.eos_token_ids, [group.kind for group in decoder.groups]
    runner = CudaRunner(decoder, device, pool, layout, rows, model_len, tokens, eos, groups)
    # With penalties: they need a place for all logits in fp32.
    params = SamplingParams(temperature=0, presence_penalty=1.0)
    setups, chunks = [], []
    for row in range(rows):
        count = min(model_len - 1, max(1, tokens))
        tokens -= count
        blocks = [[0] * -(-count // layout.block_size)] * len(groups)
        setups.append(RowSetup(row, [0] * count, count, blocks, params, 0, 0))
        chunks.append(Chunk(row, 0, count, True))
    chunks.sort(key=lambda chunk: chunk.count)
    decodes = [Chunk(row, 0, 1, True) for row in range(rows)]
    for plan in (StepPlan(0, chunks, setups), StepPlan(1, decodes)):
        runner.launch(plan).result()
    runner.close()
