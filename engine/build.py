"""Puts an engine together from its configuration: model, pools, block manager, scheduler, runner."""

import importlib
import time
from collections.abc import Callable
from pathlib import Path

import structlog
import torch

from tidegate.engine.checkpoint import resolve
from tidegate.engine.config import EngineConfig
from tidegate.engine.constraints import Constraints
from tidegate.engine.core import EngineCore
from tidegate.engine.memory.host_pool import HostPool
from tidegate.engine.memory.prefix import BlockHasher
from tidegate.engine.memory.sizing import headroom, size_tiers
from tidegate.engine.memory.tiers import BlockManager
from tidegate.engine.memory.transfer import ThreadTransfer
from tidegate.engine.messages import EngineInfo
from tidegate.engine.model.operations import Operations
from tidegate.engine.model.runner import ModelRunner
from tidegate.engine.model.weights import load_model
from tidegate.engine.parts import DeviceParts
from tidegate.engine.profiler import Profiler
from tidegate.engine.scheduler import Limits, Scheduler
from tidegate.engine.torch_trace import TorchTrace

CPU_BLOCK_SIZE = 32
"""On the CPU device 16, 32 and 64 took about the same time a step: the middle one."""
CPU_STEP_TOKENS = 512
"""Where nobody says: a step of so many takes a small model tens of milliseconds there."""
CPU_WRITE_AHEAD = 0.25
"""See ``Limits``. Copying takes computing time here, yet what it costs a storm is less than its noise, and 48
conversations that came back with all their text went on 1.37 times as fast."""
CUDA_PARTS = "tidegate.engine.cuda"

Assemble = Callable[[EngineConfig, Path, bool], DeviceParts]

log = structlog.get_logger(__name__)


def build_engine(config: EngineConfig, progress: bool = False) -> EngineCore:
    """An engine that is ready to serve. Raises ``ConfigError`` in one line where it cannot be.

    ``progress`` draws a bar on stderr while the weights load.
    """
    path = resolve(config.model)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return compose(config, path, _cpu_parts(config, path, progress))
    # By name: Triton, which its kernels are written in, exists on Linux alone.
    assemble: Assemble = importlib.import_module(CUDA_PARTS).assemble
    return compose(config, path, assemble(config, path, progress))


def compose(config: EngineConfig, path: Path, parts: DeviceParts) -> EngineCore:
    """The engine of these parts, whatever the device."""
    layout, sizes, transfer, model = parts.layout, parts.sizes, parts.transfer, parts.model
    hasher = BlockHasher(f"{path}:{parts.dtype}", layout.block_size) if config.prefix_caching else None
    manager = BlockManager(
        block_size=layout.block_size,
        device_blocks=sizes.device,
        host_blocks=sizes.host,
        transfer=transfer,
        hasher=hasher,
        groups=parts.groups,
        most_uncommitted=config.pipeline_depth * parts.max_step_tokens,
        host_ready=parts.host_ready,
        host_quota=int(config.tenant_host_share * sizes.host),
    )
    scheduler = Scheduler(
        Limits(
            max_model_len=sizes.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_step_tokens=parts.max_step_tokens,
            park_grace=config.park_grace,
            preemption=config.preemption,
            block_bytes=layout.block_bytes,
            write_ahead=parts.write_ahead,
        ),
        manager,
        Constraints(path, model.vocab_size, model.eos_token_ids),
        eos_token_ids=frozenset(model.eos_token_ids),
        bytes_per_second=lambda: transfer.bytes_per_second,
    )
    info = EngineInfo(
        model=config.model,
        architecture=model.architecture,
        vocab_size=model.vocab_size,
        max_model_len=sizes.max_model_len,
        eos_token_ids=list(model.eos_token_ids),
        block_size=layout.block_size,
        device_blocks=sizes.device,
        host_blocks=sizes.host,
        kv_bytes_per_token=layout.bytes_per_token,
        device=parts.device,
        dtype=str(parts.dtype).removeprefix("torch."),
        load_seconds={"load": parts.load_seconds, "pool": parts.pool_seconds},
        kv_groups=len(parts.groups),
    )
    log.info(
        "tiers",
        device_blocks=sizes.device,
        host_blocks=sizes.host,
        block_bytes=layout.block_bytes,
        block_size=layout.block_size,
        windows=[group.window for group in parts.groups],
        max_model_len=sizes.max_model_len,
    )
    return EngineCore(info, scheduler, parts.runner, transfer, config.pipeline_depth, Profiler(TorchTrace))


def _cpu_parts(config: EngineConfig, path: Path, progress: bool) -> DeviceParts:
    """Both tiers are ordinary memory, and a thread copies."""
    started = time.perf_counter()
    device = torch.device("cpu")
    model = load_model(path, dtype=config.dtype, device=device, progress=progress)
    loaded = time.perf_counter()
    _say_which_kernels(model.operations)
    layout = model.layout(config.block_size or CPU_BLOCK_SIZE)
    groups = tuple(group.kind for group in model.groups)
    step_tokens = config.max_step_tokens or CPU_STEP_TOKENS
    sizes = size_tiers(
        config,
        block_size=layout.block_size,
        block_bytes=layout.block_bytes,
        model_len=model.config.sequence_limit(config.max_model_len),
        step_tokens=step_tokens,
        free=headroom(),
        groups=groups,
    )
    device_pool = layout.allocate(sizes.device, device)
    host_pool = HostPool(layout.allocate(sizes.host, device))
    transfer = ThreadTransfer(device_pool, host_pool)
    runner = ModelRunner(
        model,
        device_pool,
        layout,
        max_rows=config.max_num_seqs,
        max_model_len=sizes.max_model_len,
        eos_token_ids=model.config.eos_token_ids,
        depth=config.pipeline_depth,
        groups=groups,
        argmax=model.operations.argmax,
    )
    return DeviceParts(
        model=model.config,
        dtype=model.dtype,
        device=str(device),
        layout=layout,
        groups=groups,
        sizes=sizes,
        transfer=transfer,
        runner=runner,
        max_step_tokens=step_tokens,
        host_ready=lambda: host_pool.num_ready,
        write_ahead=CPU_WRITE_AHEAD,
        load_seconds=loaded - started,
        pool_seconds=time.perf_counter() - loaded,
    )


def _say_which_kernels(operations: Operations) -> None:
    if operations.slower_because is None:
        log.info("kernels", path=operations.path)
    else:
        log.warning("kernels", path=operations.path, slower_because=operations.slower_because)
