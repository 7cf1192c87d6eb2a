"""Blocks between the tiers: bandwidth against one large copy, integrity, and what it costs a decode step."""

import random
import statistics
import sys
import threading
import time
from collections.abc import Sequence

import torch
from machine import DRY, open_device, scaled
from random_model import LLAMA_8B, QWEN_1_5B, TINY, random_decoder
from report import Report, run_part

from tidegate.engine.cuda import BLOCK_SIZES, default_block_size
from tidegate.engine.device.streams import Device
from tidegate.engine.memory.copies import CopyOp
from tidegate.engine.memory.cuda_transfer import CudaTransfer
from tidegate.engine.memory.layout import BlockLayout
from tidegate.engine.memory.pinned_pool import PinnedPool
from tidegate.engine.model.cuda_runner import CudaRunner
from tidegate.engine.request import SamplingParams
from tidegate.engine.step import Chunk, RowSetup, StepPlan

DEVICE_BYTES, HOST_BYTES = scaled(6 * 2**30), scaled(4 * 2**30)
ROUNDS = 3
TRIPS, TRIP_SECONDS = (10**6, 60.0) if not DRY else (100, 10.0)
SHAPES = {"8B": LLAMA_8B, "1.5B": QWEN_1_5B} if not DRY else {"tiny": TINY}


class Tiers:
    def __init__(self, layout: BlockLayout, device: Device) -> None:
        self.device = device
        self.num_device = DEVICE_BYTES // layout.block_bytes
        self.num_host = HOST_BYTES // layout.block_bytes
        self.block_bytes = layout.block_bytes
        self.pool = layout.allocate(self.num_device, device.torch_device)
        self.bytes = self.pool.view(torch.uint8).flatten(1)
        self.bytes.random_(0, 255)
        began = time.perf_counter()
        self.host = PinnedPool(device, layout, self.num_host)
        self.host.wait(self.num_host)
        self.pinning_seconds = time.perf_counter() - began
        device.synchronize()
        self.transfer = CudaTransfer(device, self.pool, self.host, lambda: None)
        self.transfer.calibrate()
        self._ticket = 0

    def ops(self, to_host: bool, devices: Sequence[int], hosts: Sequence[int]) -> list[CopyOp]:
        first = self._ticket
        self._ticket += len(devices)
        pairs = zip(devices, hosts, strict=True)
        return [CopyOp(first + i, to_host, d, h) for i, (d, h) in enumerate(pairs)]

    def finish(self, count: int) -> None:
        done = 0
        while done < count:
            self.transfer.wait(1.0)
            completions = self.transfer.poll()
            assert all(completion.ok for completion in completions)
            done += len(completions)


def bandwidth(report: Report) -> None:
    device = open_device()
    for name, shape in SHAPES.items():
        for block_size in BLOCK_SIZES:
            layout = BlockLayout(
                shape.num_layers, shape.num_kv_heads, shape.head_dim, block_size, torch.bfloat16
            )
            # What is chosen where nobody says; the other is there to compare with.
            goal = 0.90 if block_size == default_block_size(layout) else None
            measure_swaps(Tiers(layout, device), f"{name}, {block_size} tokens", goal, report)
            device.release_cache()


def measure_swaps(tiers: Tiers, name: str, goal: float | None, report: Report) -> None:
    report.figure(f"pinning {HOST_BYTES / 2**30:.0f} GiB", HOST_BYTES / tiers.pinning_seconds / 1e9, "GB/s")
    large = _large_copies(tiers)
    for kind, rate in large.items():
        report.figure(f"large pinned copies, {kind}", rate / 1e9, "GB/s")
    count = min(tiers.num_host, tiers.num_device) // 2
    rng = random.Random(0)
    devices = rng.sample(range(tiers.num_device), 2 * count)
    hosts = rng.sample(range(tiers.num_host), 2 * count)

    def ops(kind: str) -> list[CopyOp]:
        out = [] if kind == "to the device" else tiers.ops(True, devices[:count], hosts[:count])
        back = [] if kind == "to the host" else tiers.ops(False, devices[count:], hosts[count:])
        return out + back

    for kind in large:
        rates = []
        for _ in range(ROUNDS):
            asked = ops(kind)
            began = time.perf_counter()
            tiers.transfer.submit(asked)
            tiers.finish(len(asked))
            rates.append(len(asked) * tiers.block_bytes / (time.perf_counter() - began))
        rate = statistics.median(rates)
        report.figure(
            f"swap of random blocks of {name} ({tiers.block_bytes / 2**20:.2f} MiB), {kind}",
            rate / large[kind],
            "of large",
            goal,
            at_most=False,
            note=f"{rate / 1e9:.1f} GB/s",
        )
    tiers.transfer.close()


def _large_copies(tiers: Tiers) -> dict[str, float]:
    """Bytes a second of one large copy each way, and of both at once."""
    size = min(2**29, tiers.bytes.numel() // 4)
    devices = tiers.bytes.view(-1)[: 2 * size].view(2, size)
    hosts = [tiers.device.pinned(size // 4).view(torch.uint8) for _ in range(2)]
    streams = [tiers.device.stream(), tiers.device.stream()]

    def out() -> None:
        streams[0].launch(lambda: hosts[0].copy_(devices[0], non_blocking=True))

    def back() -> None:
        streams[1].launch(lambda: devices[1].copy_(hosts[1], non_blocking=True))

    rates = {}
    for kind, ways in {"to the host": [out], "to the device": [back], "both ways": [out, back]}.items():
        times = []
        for _ in range(ROUNDS):
            tiers.device.synchronize()
            began = time.perf_counter()
            for way in ways:
                way()
            tiers.device.synchronize()
            times.append(time.perf_counter() - began)
        rates[kind] = len(ways) * size / statistics.median(times)
    return rates


def beside_decode(report: Report) -> None:
    """Decode steps of an 8B model with both links saturated, against the same steps with none."""
    device = open_device()
    shape = TINY if DRY else LLAMA_8B
    batch, context, steps = (4, 40, 12) if DRY else (64, 1024, 200)
    decoder = random_decoder(shape, device)
    layout = decoder.layout(64)
    blocks_each = -(-(context + 3 * steps) // 64)
    swapped = 8 if DRY else 256
    total = batch * blocks_each + 2 * swapped
    pool = layout.allocate(total, device.torch_device)
    pool.normal_()
    host = PinnedPool(device, layout, 2 * swapped)
    host.wait(2 * swapped)
    runner = CudaRunner(decoder, device, pool, layout, batch, decoder.max_model_len, 256, [2])
    transfer = CudaTransfer(device, pool, host, lambda: runner.last_done)
    transfer.calibrate()
    params = SamplingParams(temperature=0)
    setups = [
        RowSetup(
            row,
            [3 + (7 * i + row) % 200 for i in range(context)],
            context,
            [list(range(row * blocks_each, (row + 1) * blocks_each))],
            params,
            row,
            0,
        )
        for row in range(batch)
    ]
    runner.launch(StepPlan(0, [], setups)).result()
    first_free = batch * blocks_each
    away = list(range(first_free, first_free + swapped))
    home = list(range(first_free + swapped, total))
    for i, index in enumerate(home):
        pool[index].fill_(float(i % 199 + 1))
    device.synchronize()
    expected = _checksums(pool, home)
    rng = random.Random(1)
    state = {"start": context - 1, "ticket": 0, "moved": 0, "trips": 0, "at": "device"}

    def decode(count: int, swapping: bool) -> list[float]:
        """Seconds of each step, over the same contexts whenever it is called."""
        state["start"] = context - 1
        seconds = []
        handles = []
        for _ in range(count):
            if swapping and transfer_is_idle():
                saturate()
            chunks = [Chunk(row, state["start"], 1, True) for row in range(batch)]
            handles.append(runner.launch(StepPlan(1, chunks)))
            state["start"] += 1
            if len(handles) == 2:
                seconds.append(handles.pop(0).result().seconds)
        seconds += [handle.result().seconds for handle in handles]
        return seconds

    pending: set[int] = set()

    def transfer_is_idle() -> bool:
        for done in transfer.poll():
            assert done.ok
            pending.discard(done.ticket)
            state["moved"] += 1
        return not pending

    def saturate() -> None:
        """Blocks with a pattern go away, others come; the next time round the pattern comes back."""
        to_host = state["at"] == "device"
        hosts = list(range(swapped))
        others = list(range(swapped, 2 * swapped))
        rng.shuffle(others)
        ops = [
            CopyOp(state["ticket"] + i, to_host, d, h)
            for i, (d, h) in enumerate(zip(home, hosts, strict=True))
        ]
        first = state["ticket"] + len(ops)
        ops += [
            CopyOp(first + i, not to_host, d, h) for i, (d, h) in enumerate(zip(away, others, strict=True))
        ]
        state["ticket"] += len(ops)
        state["at"] = "host" if to_host else "device"
        state["trips"] += not to_host
        pending.update(op.ticket for op in ops)
        transfer.submit(ops)

    decode(8, swapping=False)
    alone = decode(steps, swapping=False)
    began = time.perf_counter()
    beside = decode(steps, swapping=True)
    elapsed = time.perf_counter() - began
    moved = state["moved"] * layout.block_bytes
    deadline = time.monotonic() + 20
    while not transfer_is_idle():
        assert time.monotonic() < deadline, "copies never end"
        transfer.wait(0.5)
    if state["at"] == "host":
        saturate()
        while not transfer_is_idle():
            assert time.monotonic() < deadline, "copies never end"
            transfer.wait(0.5)
    again = decode(steps // 2, swapping=False)
    name = f"decode of {shape.architecture}, batch {batch}, under saturated swap"
    quantile = lambda values, q: sorted(values)[int(q * (len(values) - 1))]  # noqa: E731
    calm = alone + again
    for q, goal in ((0.5, 1.03), (0.99, 1.10)):
        ratio = quantile(beside, q) / quantile(calm, q)
        note = f"{quantile(beside, q) * 1e3:.3f} ms against {quantile(calm, q) * 1e3:.3f}"
        report.figure(f"{name}, p{q * 100:g}", ratio, "times", goal, note=note)
    report.figure("  moved meanwhile, both ways", moved / elapsed / 1e9, "GB/s")
    wrong = sum(a != b for a, b in zip(_checksums(pool, home), expected, strict=True))
    report.check(f"blocks that came back changed, of {swapped} x {state['trips']} round trips", wrong, 0)
    runner.close()
    transfer.close()


def _checksums(pool: torch.Tensor, indices: Sequence[int]) -> list[int]:
    words = pool.view(torch.uint8).flatten(1).view(torch.int32)
    return [int(words[index].sum(dtype=torch.int64)) for index in indices]


class Trips:
    """Blocks that a kernel writes go to the host and come back elsewhere, where another step reads and writes
    until they arrive.
    """

    def __init__(self, device: Device, fenced: bool) -> None:
        layout = BlockLayout(1, 2, 64, 16 if DRY else 64, torch.bfloat16)
        self.count = 2048 if not DRY else 8
        self.device = device
        self.pool = layout.allocate(2 * self.count, device.torch_device)
        self.words = self.pool.view(torch.uint8).flatten(1).view(torch.int32)
        self.host = PinnedPool(device, layout, self.count)
        self.host.wait(self.count)
        self.stream, self.done = device.stream(), device.event()
        self.transfer = CudaTransfer(device, self.pool, self.host, lambda: self.done if fenced else None)
        self.wrong = torch.zeros((), dtype=torch.int64, device=device.torch_device)
        self._rng = random.Random(0)
        self._ticket = 0
        device.synchronize()

    def round(self, number: int) -> None:
        slots = self._rng.sample(range(2 * self.count), 2 * self.count)
        hosts = self._rng.sample(range(self.count), self.count)
        sources, targets = slots[: self.count], slots[self.count :]
        device = self.device.torch_device
        from_P, to_P = (torch.tensor(places, device=device) for places in (sources, targets))
        words_W = torch.arange(self.words.shape[1], dtype=torch.int32, device=device)
        pattern_PW = (from_P.int()[:, None] + number) * 0x9E3779B1 + words_W * 0x85EBCA77
        self.device.synchronize()

        def write() -> None:
            if not DRY and number < 8:
                # A step that is still at work when the copies are ordered: what the fence is for.
                torch.cuda._sleep(20_000_000)
            self.words.fill_(-1)
            self.words[from_P] = pattern_PW

        def check() -> None:
            self.wrong.add_((self.words[to_P] != pattern_PW).any(1).sum())

        self.stream.launch(write)
        self.done.record(self.stream)
        self._move(True, sources, hosts)
        # Another step reads the targets while the blocks are on their way to them.
        self.stream.launch(write)
        self.done.record(self.stream)
        self._move(False, targets, hosts)
        self.stream.launch(check)
        self.done.record(self.stream)

    def _move(self, to_host: bool, devices: list[int], hosts: list[int]) -> None:
        first = self._ticket
        self._ticket += self.count
        pairs = enumerate(zip(devices, hosts, strict=True))
        self.transfer.submit([CopyOp(first + i, to_host, d, h) for i, (d, h) in pairs])
        pending = self.count
        while pending:
            self.transfer.wait(1.0)
            pending -= len(self.transfer.poll())

    def close(self) -> int:
        """How many blocks came back changed."""
        self.device.synchronize()
        self.transfer.close()
        return int(self.wrong)


def round_trips(report: Report) -> None:
    """A million, or as many as the time allows; and a few without the fence, which must go wrong."""
    device = open_device()
    trips = Trips(device, fenced=True)
    rounds, deadline = 0, time.monotonic() + TRIP_SECONDS
    while rounds * trips.count < TRIPS and time.monotonic() < deadline:
        trips.round(rounds)
        rounds += 1
    report.check(f"blocks changed, of {rounds * trips.count} round trips", trips.close(), 0)
    report.figure("  round trips", rounds * trips.count, "blocks", TRIPS, at_most=False)
    unfenced = Trips(device, fenced=False)
    for number in range(3 if not DRY else 30):
        unfenced.round(number)
    report.check("no block changed with the fence taken out", float(unfenced.close() == 0), 0)


def launches_beside_pinning(report: Report) -> None:
    """How long the longest launch and wait of a small kernel takes while memory is pinned."""
    device = open_device()
    layout = BlockLayout(32, 8, 128, 64, torch.bfloat16)
    x = torch.ones(1024, device=device.torch_device)
    stream, event = device.stream(), device.event()

    def longest(until: threading.Event) -> tuple[float, int]:
        worst, count = 0.0, 0
        while not until.is_set() or count < 100:
            began = time.perf_counter()
            stream.launch(lambda: x.add_(1.0))
            event.record(stream)
            event.synchronize()
            worst, count = max(worst, time.perf_counter() - began), count + 1
        return worst, count

    done = threading.Event()
    done.set()
    longest(done)
    calm, _ = longest(done)
    done.clear()
    pool = PinnedPool(device, layout, HOST_BYTES // layout.block_bytes)

    def wait() -> None:
        pool.wait(pool.num_blocks)
        done.set()

    waiter = threading.Thread(target=wait)
    waiter.start()
    busy, count = longest(done)
    waiter.join()
    pool.close()
    report.figure(
        "longest small launch while the host pool is pinned",
        busy * 1e3,
        "ms",
        1.0,
        note=f"{calm * 1e3:.3f} ms without, {count} launches",
    )


if __name__ == "__main__":
    sys.exit(
        run_part(
            [
                ("bandwidth", bandwidth),
                ("beside decode", beside_decode),
                ("round trips", round_trips),
                ("launches beside pinning", launches_beside_pinning),
            ]
        )
    )
