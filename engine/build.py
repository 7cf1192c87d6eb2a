"""Puts an engine together from its configuration: model, pools, block manager, scheduler, runner."""

import time

import structlog
import torch

from tidegate.engine.checkpoint import resolve
from tidegate.engine.config import ConfigError, EngineConfig
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
from tidegate.engine.profiler import Profiler
from tidegate.engine.scheduler import Limits, Scheduler
from tidegate.engine.torch_trace import TorchTrace

CPU_BLOCK_SIZE = 32
"""On the CPU device 16, 32 and 64 took about the same time a step: the middle one."""

log = structlog.get_logger(__name__)


def build_engine(config: EngineConfig, progress: bool = False) -> EngineCore:
    """An engine that is ready to serve. Raises ``ConfigError`` in one line where it cannot be.

    ``progress`` draws a bar on stderr while the weights load.
    """
    started = time.perf_counter()
    device = _device(config.device)
    path = resolve(config.model)
    model = load_model(path, dtype=config.dtype, device=device, progress=progress)
    loaded = time.perf_counter()
    _say_which_kernels(model.operations)

    layout = model.layout(config.block_size or CPU_BLOCK_SIZE)
    sizes = size_tiers(
        config,
        block_size=layout.block_size,
        block_bytes=layout.block_bytes,
        model_len=model.config.sequence_limit(config.max_model_len),
        free=headroom(),
    )
    device_pool = layout.allocate(sizes.device, device)
    host_pool = HostPool(layout.allocate(sizes.host, torch.device("cpu")))
    transfer = ThreadTransfer(device_pool, host_pool)
    hasher = BlockHasher(f"{path}:{model.dtype}", layout.block_size) if config.prefix_caching else None
    manager = BlockManager(
        block_size=layout.block_size,
        device_blocks=sizes.device,
        host_blocks=sizes.host,
        transfer=transfer,
        hasher=hasher,
        host_ready=lambda: host_pool.num_ready,
        host_quota=int(config.tenant_host_share * sizes.host),
    )
    scheduler = Scheduler(
        Limits(
            max_model_len=sizes.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_step_tokens=config.max_step_tokens,
            park_grace=config.park_grace,
            preemption=config.preemption,
            block_bytes=layout.block_bytes,
            write_ahead=0,
        ),
        manager,
        eos_token_ids=frozenset(model.config.eos_token_ids),
        bytes_per_second=lambda: transfer.bytes_per_second,
    )
    runner = ModelRunner(
        model,
        device_pool,
        layout,
        max_rows=config.max_num_seqs,
        max_model_len=sizes.max_model_len,
        eos_token_ids=model.config.eos_token_ids,
        depth=config.pipeline_depth,
        argmax=model.operations.argmax,
    )
    info = EngineInfo(
        model=config.model,
        architecture=model.config.architecture,
        vocab_size=model.config.vocab_size,
        max_model_len=sizes.max_model_len,
        eos_token_ids=list(model.config.eos_token_ids),
        block_size=layout.block_size,
        device_blocks=sizes.device,
        host_blocks=sizes.host,
        kv_bytes_per_token=layout.bytes_per_token,
        device=str(device),
        dtype=str(model.dtype).removeprefix("torch."),
        load_seconds={"load": loaded - started, "pool": time.perf_counter() - loaded},
    )
    log.info(
        "tiers",
        device_blocks=sizes.device,
        host_blocks=sizes.host,
        block_bytes=layout.block_bytes,
        block_size=layout.block_size,
        max_model_len=sizes.max_model_len,
    )
    return EngineCore(info, scheduler, runner, transfer, config.pipeline_depth, Profiler(TorchTrace))


def _say_which_kernels(operations: Operations) -> None:
    if operations.slower_because is None:
        log.info("kernels", path=operations.path)
    else:
        log.warning("kernels", path=operations.path, slower_because=operations.slower_because)


def _device(name: str) -> torch.device:
    """Only the CPU device has kernels so far."""
    if name in ("auto", "cpu"):
        return torch.device("cpu")
    raise ConfigError(f"device {name!r} is not supported yet; use 'cpu' or 'auto'")
