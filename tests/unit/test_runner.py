"""The step runner: what a sequence gets must not depend on how its steps were cut, batched or overlapped."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint

from tidegate.engine.memory.layout import BlockLayout
from tidegate.engine.model.decoder import Decoder
from tidegate.engine.model.runner import ModelRunner
from tidegate.engine.model.weights import load_model
from tidegate.engine.request import SamplingParams
from tidegate.engine.step import Chunk, RowSetup, StepPlan, StepResult
from tidegate.kernels.attention import AttentionBatch, paged_attention, write_kv

VOCAB, MAX_LEN, BLOCK, ROWS, BLOCKS = 97, 160, 8, 6, 64
GREEDY = SamplingParams(temperature=0)
SEEDED = SamplingParams(temperature=1.2, top_p=0.95, repetition_penalty=1.2)


class TinyModel:
    """One attention layer with random weights: its logits depend on every token before, and on order."""

    layout = BlockLayout(num_layers=2, num_kv_heads=2, head_dim=16, block_size=BLOCK, dtype=torch.float32)

    vocab_size = VOCAB

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.token_qkv = torch.randn(VOCAB, 8, 16, generator=generator)
        self.place_qkv = torch.randn(MAX_LEN, 8, 16, generator=generator)
        self.head = torch.randn(64, VOCAB, generator=generator)
        self.release: threading.Event | None = None
        self.fail = False

    def forward(
        self,
        token_ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        pool_NLCKBD: torch.Tensor,
        batches: Sequence[AttentionBatch],
        rows_R: torch.Tensor,
    ) -> torch.Tensor:
        if self.release is not None:
            assert self.release.wait(10)
        if self.fail:
            self.fail = False
            raise RuntimeError("planted")
        (batch,) = batches
        qkv = self.token_qkv[token_ids_T] + self.place_qkv[positions_T]
        kv = BlockLayout.layer(pool_NLCKBD, 1)
        write_kv(qkv[:, 4:6], qkv[:, 6:], kv, batch)
        return paged_attention(qkv[:, :4], kv, batch, 0.25)[rows_R].flatten(1)

    def logits(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        return hidden_RH @ self.head


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = make_checkpoint(tmp_path_factory.mktemp("checkpoint"), "qwen2")
    return load_model(folder, dtype="float32", device=torch.device("cpu"), progress=False)


@pytest.fixture(params=["tiny", "decoder"])
def model(request: pytest.FixtureRequest) -> TinyModel | Decoder:
    return TinyModel() if request.param == "tiny" else request.getfixturevalue("decoder")


@pytest.fixture(params=[1, 2], ids=["depth 1", "depth 2"])
def depth(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def tiny() -> TinyModel:
    return TinyModel()


@pytest.fixture
def runner(tiny: TinyModel) -> Iterator[ModelRunner]:
    """Depth 2 over the tiny model."""
    runner = make_runner(tiny, 2)
    yield runner
    runner.close()


def make_runner(model: TinyModel | Decoder, depth: int) -> ModelRunner:
    layout = model.layout(BLOCK) if isinstance(model, Decoder) else model.layout
    pool = layout.allocate(BLOCKS, torch.device("cpu")).fill_(torch.nan)
    return ModelRunner(model, pool, layout, ROWS, MAX_LEN, eos_token_ids=[0], depth=depth)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, VOCAB, length).tolist()


def setup(
    row: int, tokens: list[int], params: SamplingParams = GREEDY, blocks: int | None = None
) -> RowSetup:
    """A row with blocks of its own for its whole length, in falling order; or for the prompt alone."""
    per_row = BLOCKS // ROWS
    count = per_row if blocks is None else blocks
    ids = [per_row * (row + 1) - 1 - i for i in range(count)]
    return RowSetup(row, list(tokens), len(tokens), [ids], params, seed=row + 11, sample_index=0)


def generate(
    model: TinyModel | Decoder,
    prompts: dict[int, list[int]],
    params: SamplingParams = GREEDY,
    steps: int = 12,
    chunk: int = MAX_LEN,
    depth: int = 1,
) -> dict[int, list[int]]:
    """Output tokens of each row; prefilled in chunks, one row after the other, while others decode."""
    runner = make_runner(model, depth)
    outputs: dict[int, list[int]] = {row: [] for row in prompts}
    done = dict.fromkeys(prompts, 0)
    collected = []
    setups = [setup(row, tokens, params) for row, tokens in prompts.items()]
    try:
        while any(done[row] < len(tokens) + steps - 1 for row, tokens in prompts.items()):
            decodes, prefills, budget = [], [], chunk
            for row, tokens in prompts.items():
                if len(tokens) <= done[row] < len(tokens) + steps - 1:
                    decodes.append(Chunk(row, done[row], 1, True))
                elif done[row] < len(tokens) and budget:
                    count = min(budget, len(tokens) - done[row])
                    prefills.append(Chunk(row, done[row], count, done[row] + count == len(tokens)))
                    budget -= count
            plan = StepPlan(len(collected), decodes + prefills, setups)
            setups = []
            for c in plan.chunks:
                done[c.row] += c.count
            collected.append((plan, runner.launch(plan)))
        for plan, handle in collected:
            result = handle.result()
            assert all(result.finite)
            sampled = [c.row for c in plan.chunks if c.samples]
            for row, token in zip(sampled, result.token_ids, strict=True):
                outputs[row].append(token)
    finally:
        runner.close()
    return outputs


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunked_prefill_equals_whole(model, params, chunk):
    prompts = {0: prompt(75), 3: prompt(9, 1), 4: prompt(1, 2)}
    assert generate(model, prompts, params, chunk=chunk) == generate(model, prompts, params)


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_overlapped_steps_equal_steps_one_by_one(model, params):
    """At depth 2 every step is launched before any result is looked at."""
    prompts = {1: prompt(30), 2: prompt(17, 1)}
    assert generate(model, prompts, params, chunk=11, depth=2) == generate(model, prompts, params, chunk=11)


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_a_batch_equals_each_alone(model, params, depth):
    prompts = {row: prompt(length, row) for row, length in enumerate((40, 3, 8, 64, 1, 25))}
    together = generate(model, prompts, params, depth=depth)
    for row, tokens in prompts.items():
        assert generate(model, {row: tokens}, params)[row] == together[row]
    assert len({tuple(tokens) for tokens in together.values()}) == len(prompts)


def test_each_token_is_the_one_that_follows_all_before_it(model, depth):
    """A sampled token is read by the next step: outputs equal those of prefilling what came before."""
    tokens = prompt(11)
    outputs = generate(model, {0: tokens}, SEEDED, steps=6, depth=depth)[0]
    for count, token in enumerate(outputs):
        known = tokens + outputs[:count]
        runner = make_runner(model, 1)
        resumed = RowSetup(0, known, len(tokens), [[9, 3, 5]], SEEDED, seed=11, sample_index=0)
        result = runner.launch(StepPlan(0, [Chunk(0, 0, len(known), True)], [resumed])).result()
        assert result.token_ids == [token]


def test_a_row_changes_hands_while_an_earlier_step_that_uses_it_waits(tiny, runner):
    """The earlier step still reads the old sequence, the later one the new."""
    old, new = prompt(20), prompt(13, 1)
    tiny.release = threading.Event()
    runner.launch(StepPlan(0, [Chunk(1, 0, 4, True)], [setup(0, old), setup(1, prompt(4))]))
    with_old = runner.launch(StepPlan(1, [Chunk(0, 0, 20, True)]))
    with_new = runner.launch(StepPlan(2, [Chunk(0, 0, 13, True)], [setup(0, new, SEEDED)]))
    assert not with_old.done()
    tiny.release.set()
    assert with_old.result().token_ids == generate(TinyModel(), {0: old}, steps=1)[0]
    assert with_new.result().token_ids == generate(TinyModel(), {0: new}, SEEDED, steps=1)[0]


def test_launch_returns_while_the_step_computes(tiny, runner):
    tiny.release = threading.Event()
    handle = runner.launch(StepPlan(0, [Chunk(0, 0, 4, True)], [setup(0, prompt(4))]))
    assert not handle.done()
    tiny.release.set()
    assert len(handle.result().token_ids) == 1
    assert handle.done()


def test_blocks_added_later_hold_the_tokens_that_follow(tiny, depth):
    """A row starts with one block and gets its next one in the step that first needs it."""
    tokens = prompt(7)
    runner = make_runner(tiny, depth)
    handles = [runner.launch(StepPlan(0, [Chunk(2, 0, 7, True)], [setup(2, tokens, blocks=1)]))]
    for position in range(7, 20):
        new_blocks = [(2, 0, position // BLOCK, 40 + position // BLOCK)] if position % BLOCK == 0 else []
        handles.append(runner.launch(StepPlan(position, [Chunk(2, position, 1, True)], [], new_blocks)))
    outputs = [handle.result().token_ids[0] for handle in handles]
    runner.close()
    assert outputs == generate(tiny, {2: tokens}, steps=14)[2]


def test_a_row_goes_on_from_a_block_that_it_shares(tiny, depth):
    """The step copies the block when its turn comes: behind the step that fills it, before it writes."""
    runner = make_runner(tiny, depth)
    tokens = prompt(12)
    runner.launch(StepPlan(0, [Chunk(0, 0, 12, False)], [setup(0, tokens, blocks=2)]))
    blocks = [[setup(0, tokens).block_ids[0][0], 50]]
    copies = [(setup(0, tokens).block_ids[0][1], 50)]
    sharer = replace(setup(1, [*tokens, 7]), block_ids=blocks)
    forked = runner.launch(StepPlan(1, [Chunk(1, 12, 1, True)], [sharer], block_copies=copies))
    assert forked.result().token_ids == generate(tiny, {1: [*tokens, 7]}, steps=1)[1]
    runner.close()


def test_a_step_that_raises_does_so_from_its_handle_and_the_next_still_runs(tiny, depth):
    runner = make_runner(tiny, depth)
    tokens = prompt(5)
    tiny.fail = True
    failed = runner.launch(StepPlan(0, [Chunk(0, 0, 5, True)], [setup(0, tokens)]))
    again = runner.launch(StepPlan(1, [Chunk(0, 0, 5, True)]))
    with pytest.raises(RuntimeError, match="planted"):
        failed.result()
    assert again.result().token_ids == generate(tiny, {0: tokens}, steps=1)[0]
    runner.close()


def test_a_setup_that_raises_leaves_the_other_rows_of_its_step_with_their_own_blocks(tiny, depth):
    """The step behind it is launched already, and writes to the blocks that its rows name."""
    runner = make_runner(tiny, depth)
    tokens = prompt(5)
    broken = replace(setup(0, prompt(5)), seed=-1)
    chunks = [Chunk(0, 0, 5, True), Chunk(1, 0, 5, True)]
    failed = runner.launch(StepPlan(0, chunks, [broken, setup(1, tokens)]))
    again = runner.launch(StepPlan(1, [Chunk(1, 0, 5, True)]))
    with pytest.raises(OverflowError):
        failed.result()
    assert again.result().token_ids == generate(tiny, {1: tokens}, steps=1)[1]
    runner.close()


def test_steps_without_a_sampling_chunk_give_no_tokens(tiny, depth):
    """One that only prefills, and one that only gives out rows."""
    runner = make_runner(tiny, depth)
    tokens = prompt(12)
    only_rows = runner.launch(StepPlan(0, [], [setup(0, tokens)])).result()
    only_prefill = runner.launch(StepPlan(1, [Chunk(0, 0, 8, False)])).result()
    for result in (only_rows, only_prefill):
        assert (result.token_ids, result.finite, result.logprobs) == ([], [], [])
        assert result.seconds >= 0
    last = runner.launch(StepPlan(2, [Chunk(0, 8, 4, True)])).result()
    assert last.token_ids == generate(tiny, {0: tokens}, steps=1)[0]
    runner.close()


def test_the_last_position_samples_a_token_that_fits_no_row(tiny, depth):
    """A full sequence yields the token behind its end, and its neighbour's row stays as it was."""
    runner = make_runner(tiny, depth)
    layout_blocks = [list(range(MAX_LEN // BLOCK))]
    full = RowSetup(0, prompt(MAX_LEN), MAX_LEN, layout_blocks, GREEDY, 1, 0)
    other = RowSetup(1, prompt(5, 1), 5, [[BLOCKS - 1]], GREEDY, 1, 0)
    result = runner.launch(StepPlan(0, [Chunk(0, 0, MAX_LEN, True)], [full, other])).result()
    assert len(result.token_ids) == 1
    after = runner.launch(StepPlan(1, [Chunk(1, 0, 5, True)])).result()
    assert after.token_ids == generate(tiny, {0: prompt(5, 1)}, steps=1)[0]
    runner.close()


def test_logits_that_are_not_finite_are_marked_and_harm_nobody_else(tiny, depth):
    """A poisoned sequence goes on being marked; the other's tokens are those it gets alone."""
    poisoned, healthy = [5, 7, 9], prompt(6, 1)
    expected = generate(tiny, {1: healthy}, steps=2)[1]
    assert 7 not in (*healthy, *expected)
    tiny.token_qkv[7] = torch.nan
    runner = make_runner(tiny, depth)
    plan = StepPlan(
        0, [Chunk(0, 0, 3, True), Chunk(1, 0, 6, True)], [setup(0, poisoned, SEEDED), setup(1, healthy)]
    )
    first = runner.launch(plan)
    second = runner.launch(StepPlan(1, [Chunk(0, 3, 1, True), Chunk(1, 6, 1, True)]))
    results: list[StepResult] = [first.result(), second.result()]
    runner.close()
    assert [result.finite for result in results] == [[False, True], [False, True]]
    assert [result.token_ids[1] for result in results] == expected
    assert all(0 <= result.token_ids[0] < VOCAB for result in results)


def test_close_finishes_the_steps_under_way_and_ends_the_thread(tiny):
    before = threading.active_count()
    runner = make_runner(tiny, 2)
    handles = [runner.launch(StepPlan(0, [Chunk(0, 0, 4, True)], [setup(0, prompt(4))]))]
    handles += [runner.launch(StepPlan(i, [Chunk(0, 3 + i, 1, True)])) for i in range(1, 5)]
    runner.close()
    assert all(handle.done() for handle in handles)
    assert threading.active_count() == before
