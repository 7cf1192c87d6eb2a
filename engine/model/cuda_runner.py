"""Computes steps on a GPU: the CUDA device's ``engine.step.Runner``.

A launch gives the device its work and returns; nothing in it waits for the device. Rows live on the device:
tokens, block tables and sampling parameters. What a step samples is written to its rows there, so the next
step reads it before anybody has looked, and to pinned memory, where the host finds it once the step's event
has passed. A step of decodes alone is the replay of a CUDA graph (``cuda_graphs.py``); one with prompts in it
is launched operation by operation, which its longer work hides.

Shapes: ``S`` chunks of the step, ``T`` their packed tokens, ``R`` chunks that sample, ``P`` scored tokens of
prompts, ``H`` hidden size, ``V`` vocabulary, ``X`` rows, ``L`` positions of a row, ``M`` blocks of a row; the
pool's ``NLCKBD`` stands in ``engine.memory.layout``.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import structlog
import torch

from tidegate.engine.constraint import Mask
from tidegate.engine.device.streams import Device, Event
from tidegate.engine.memory.groups import FULL_ATTENTION, KVGroup
from tidegate.engine.memory.layout import BlockLayout
from tidegate.engine.model.cuda_graphs import DecodeGraphs
from tidegate.engine.model.cuda_results import LaunchedStep, Part, Places
from tidegate.engine.model.cuda_sampling import (
    REPORT_WORDS,
    Extras,
    ExtraSampling,
    line_words,
    parameters,
    report,
    sample_with_extras,
)
from tidegate.engine.model.cuda_state import PADDING_ROW, DeviceState
from tidegate.engine.model.scoring import Scores, scores_of, slices
from tidegate.engine.step import Chunk, DeviceLost, StepHandle, StepOutOfMemory, StepPlan
from tidegate.kernels.triton.attention import AttentionBatch
from tidegate.kernels.triton.prefill_attention import PREFILL_TILE_FIELDS, prefill_tiles
from tidegate.kernels.triton.sampling import sample
from tidegate.kernels.triton.sampling_rows import sampling_rows
from tidegate.kernels.triton.step_inputs import (
    TokenInputs,
    copy_blocks,
    gather_tables,
    store_sampled,
    store_words,
    token_inputs,
)

_STEPS = 4
"""Steps whose results may be outstanding; a fifth waits for the first."""
_CLEAN_STEPS = 64
"""After so many steps without running out of memory, steps may be twice as large again."""

log = structlog.get_logger(__name__)


class CudaModel(Protocol):
    """What the runner needs of a decoder."""

    vocab_size: int
    group: int
    """Query heads a KV head."""

    def forward(
        self,
        token_ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        pool_NLCKBD: torch.Tensor,
        batches: Sequence[AttentionBatch],
        rows_R: torch.Tensor | None,
    ) -> torch.Tensor:
        """Write the tokens' KV to the pool; hidden states RH of the tokens ``rows_R``, None for all.

        ``batches``: one for each KV group.
        """

    def logits(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        """RV, of any rows of hidden states."""


class CudaRunner:
    """A plan belongs to the runner once it is launched: its lists must not change afterwards. A step that
    raises does so from its handle's ``result``; later steps still run, unless that is ``DeviceLost``.
    """

    def __init__(
        self,
        model: CudaModel,
        device: Device,
        pool_NLCKBD: torch.Tensor,
        layout: BlockLayout,
        max_rows: int,
        max_model_len: int,
        max_step_tokens: int,
        eos_token_ids: Sequence[int],
        groups: Sequence[KVGroup] = FULL_ATTENTION,
    ) -> None:
        self._model = model
        self._groups = groups
        self._device = device
        self._pool_NLCKBD = pool_NLCKBD
        self._kv_NCKBD = BlockLayout.layer(pool_NLCKBD, 0)
        self._block_size = layout.block_size
        self._max_rows = max_rows
        self._most_tokens = max_step_tokens + max_rows
        self._token_limit = self._most_tokens
        self._clean_steps = 0
        self.stream = device.stream()

        self._state = DeviceState(
            device,
            self.stream,
            max_rows,
            max_model_len,
            layout.block_size,
            self._most_tokens,
            len(groups),
            model.vocab_size,
        )
        self._extras = ExtraSampling(max_rows, model.vocab_size, eos_token_ids)
        self._adjusted_XV: torch.Tensor | None = None
        self._graphs = DecodeGraphs(device, self.stream, max_rows)

        reports = 2 * max_rows
        self._first = Places(0, reports, reports + REPORT_WORDS * max_rows)
        self._ring_words = self._first.scores + REPORT_WORDS * self._most_tokens
        self._ring = device.pinned(_STEPS * self._ring_words)
        self._ring_on_host = self._ring.numpy()
        self._events = [(device.event(), device.event()) for _ in range(_STEPS)]
        self._steps: list[LaunchedStep | None] = [None] * _STEPS
        self._next = 0
        self.last_done: Event | None = None
        """Behind the last step launched: copies wait for it."""
        # Model and rows were made on another stream.
        device.synchronize()

    def launch(self, plan: StepPlan) -> StepHandle:
        """Give the device the step, behind those launched before."""
        index, self._next = self._next, (self._next + 1) % _STEPS
        before = self._steps[index]
        began, done = self._events[index]
        first_word = index * self._ring_words
        words = self._ring_on_host[first_word : first_word + self._ring_words]
        step = LaunchedStep(began, done, words, self._first, first_word, self._device.is_lost)
        try:
            if before is not None:
                before.settle()
            began.record(self.stream)
            self._update_rows(plan)
            if plan.chunks:
                self._compute(plan.chunks, plan.masks, step)
        except torch.OutOfMemoryError as error:
            step.error = StepOutOfMemory(f"no memory for one token of a step of {plan.num_tokens}: {error}")
        except Exception as error:  # noqa: BLE001 - the handle raises it
            step.error = DeviceLost(str(error)) if self._device.is_lost(error) else error
        if not isinstance(step.error, DeviceLost):
            # Of a step that raised, too: part of it may be under way, and copies must wait for that.
            done.record(self.stream)
            self.last_done = done
        self._steps[index] = step
        return step

    def close(self) -> None:
        """Wait for the steps under way, and give back what the graphs hold."""
        self._device.synchronize()
        self._graphs.clear()

    def _update_rows(self, plan: StepPlan) -> None:
        state = self._state
        state.inbox.clear()
        for setup in plan.setups:
            state.set_row(setup.row, setup.token_ids, setup.block_ids)
        for row, group, index, block_id in plan.new_blocks:
            state.set_block(row, group, index, block_id)
        sources_P = targets_P = None
        if plan.block_copies:
            sources_P, targets_P = state.inbox.put(np.array(plan.block_copies, np.int32).T)
        state.inbox.send()
        if sources_P is not None and targets_P is not None:
            pool_NX = self._pool_NLCKBD.flatten(1).view(torch.int32)
            sources, targets = sources_P, targets_P
            self.stream.launch(lambda: copy_blocks(pool_NX, sources, targets))
        # Last: should one of them fail, the step behind this one still writes to its own blocks alone.
        for setup in plan.setups:
            state.set_parameters(setup.row, parameters(setup, self._model.vocab_size))
            self._extras.set_row(setup)
        state.inbox.send()

    def _compute(self, chunks: Sequence[Chunk], masks: Mapping[int, Mask], step: LaunchedStep) -> None:
        """The chunks together; in two halves, or more, where memory does not suffice."""
        pending = cut(chunks, self._token_limit)
        while pending:
            part = pending.pop(0)
            try:
                self._compute_part(part, masks, step)
            except torch.OutOfMemoryError:
                num_tokens = sum(chunk.count for chunk in part)
                if num_tokens == 1:
                    raise
                self._device.release_cache()
                self._clean_steps = 0
                self._token_limit = -(-num_tokens // 2)
                log.warning("step_out_of_memory", tokens=num_tokens, token_limit=self._token_limit)
                rest = [chunk for chunks in (part, *pending) for chunk in chunks]
                pending = cut(rest, self._token_limit)
        self._clean_steps += 1
        if self._clean_steps >= _CLEAN_STEPS and self._token_limit < self._most_tokens:
            self._clean_steps, self._token_limit = 0, min(2 * self._token_limit, self._most_tokens)

    def _compute_part(self, chunks: Sequence[Chunk], masks: Mapping[int, Mask], step: LaunchedStep) -> None:
        # Behind whatever still reads it: the stream has been given that before.
        self._state.inbox.clear()
        fields = [(chunk.row, chunk.start, chunk.count, chunk.samples) for chunk in chunks]
        rows_S, starts_S, counts_S, samples_S = np.array(fields, np.int32).T
        sampling = np.flatnonzero(samples_S)
        rows_R, positions_R = rows_S[sampling], (starts_S + counts_S)[sampling]
        extras = None
        if len(sampling):
            extras = self._extras.of(rows_R, positions_R, masks, self._state.inbox.put)
        scores = scores_of(chunks)
        if len(sampling) == counts_S.sum():
            self._launch_decodes(rows_S, starts_S, extras, step.places)
        else:
            self._launch_chunks(rows_S, starts_S, counts_S, sampling, extras, scores, step.places)
        step.parts.append(Part(len(sampling), extras, scores))

    def _launch_decodes(
        self,
        rows_S: npt.NDArray[np.int32],
        starts_S: npt.NDArray[np.int32],
        extras: Extras | None,
        places: Places,
    ) -> None:
        state = self._state
        size = self._graphs.bucket(len(rows_S))
        padding = size - len(rows_S)
        state.set_decodes(
            places.samples,
            np.pad(rows_S, (0, padding), constant_values=PADDING_ROW),
            np.pad(starts_S, (0, padding)),
        )
        state.inbox.send()
        if extras is not None and self._adjusted_XV is None:
            self._adjusted_XV = torch.empty(
                (self._max_rows, self._model.vocab_size), device=self._device.torch_device
            )
        self._graphs.launch(size, extras is None, self._decode)
        if extras is not None:
            rows_R, positions_R = state.decode_rows[:size], state.decode_starts[:size]
            self.stream.launch(
                lambda: self._sample(
                    self._adjusted(size), rows_R, positions_R + 1, state.decode_place, extras, places.reports
                )
            )

    @torch.inference_mode()
    def _decode(self, size: int, samples: bool) -> None:
        """One token for each of the rows in ``decode_rows``: what a CUDA graph captures."""
        state = self._state
        rows_S, width = state.decode_rows[:size], state.tables_GXM.shape[2]
        inputs = self._inputs(rows_S, state.decode_starts[:size])
        ends_S = inputs[0].context_lens_T
        batches = self._batches(
            inputs, size, rows_S, ends_S, width, rows_S.new_empty((0, PREFILL_TILE_FIELDS))
        )
        hidden_SH = self._model.forward(
            inputs[0].token_ids_T, inputs[0].positions_T, self._pool_NLCKBD, batches, None
        )
        logits_SV = self._model.logits(hidden_SH)
        if samples:
            self._sample(logits_SV, rows_S, ends_S, state.decode_place, None, 0)
        else:
            # A kernel, not a copy: what follows is no part of the graph, whose memory is anybody's then.
            torch.mul(logits_SV, 1.0, out=self._adjusted(size))

    def _inputs(self, rows_T: torch.Tensor, positions_T: torch.Tensor) -> list[TokenInputs]:
        """For each KV group; they differ in the tokens' slots alone."""
        state = self._state
        return [
            token_inputs(rows_T, positions_T, state.tokens_XL, tables_XM, self._block_size)
            for tables_XM in state.tables_GXM
        ]

    def _batches(
        self,
        inputs: Sequence[TokenInputs],
        num_decodes: int,
        rows_S: torch.Tensor,
        ends_S: torch.Tensor,
        width: int,
        tiles_P5: torch.Tensor,
    ) -> list[AttentionBatch]:
        """For each KV group."""
        return [
            AttentionBatch.on_device(
                num_decodes,
                ends_S,
                gather_tables(rows_S, ends_S, tables_XM, width, self._block_size),
                tokens.positions_T,
                tokens.slot_blocks_T,
                tokens.slot_offsets_T,
                tiles_P5,
                self._kv_NCKBD,
                group.window,
            )
            for group, tokens, tables_XM in zip(self._groups, inputs, self._state.tables_GXM, strict=True)
        ]

    def _adjusted(self, size: int) -> torch.Tensor:
        if self._adjusted_XV is None:
            raise RuntimeError("logits to adjust have no place")
        return self._adjusted_XV[:size]

    def _launch_chunks(
        self,
        rows_S: npt.NDArray[np.int32],
        starts_S: npt.NDArray[np.int32],
        counts_S: npt.NDArray[np.int32],
        sampling: npt.NDArray[np.int64],
        extras: Extras | None,
        scores: Scores,
        places: Places,
    ) -> None:
        put = self._state.inbox.put
        ends_S = starts_S + counts_S
        query_ends_S = counts_S.cumsum(dtype=np.int32)
        query_starts_T = (query_ends_S - counts_S).repeat(counts_S)
        # To attention a decode is one query token, whatever the plan calls it.
        num_decodes = int((counts_S == 1).cumprod().sum())
        tiles_P5 = prefill_tiles(
            np.concatenate(([0], query_ends_S))[num_decodes:].astype(np.int64),
            ends_S[num_decodes:].astype(np.int64),
            self._model.group,
            self._kv_NCKBD.shape[-1],
            self._kv_NCKBD.dtype,
            self._device.torch_device,
        )
        width = -(-int(ends_S.max()) // self._block_size)
        token_rows_T = put(rows_S.repeat(counts_S).astype(np.int32))
        places_T = np.arange(len(query_starts_T), dtype=np.int32) - query_starts_T
        positions_T = put((starts_S.repeat(counts_S) + places_T).astype(np.int32))
        rows, ends, tiles = put(rows_S), put(ends_S), put(tiles_P5)
        wanted = put(np.concatenate((query_ends_S[sampling] - 1, scores.rows_P)))
        scored_P = put(scores.token_ids_P)
        rows_R, positions_R = put(rows_S[sampling]), put(ends_S[sampling])
        place_1 = put(np.array([places.samples], np.int32))
        self._state.inbox.send()

        def work() -> None:
            inputs = self._inputs(token_rows_T, positions_T)
            batches = self._batches(inputs, num_decodes, rows, ends, width, tiles)
            hidden_RH = self._model.forward(
                inputs[0].token_ids_T, inputs[0].positions_T, self._pool_NLCKBD, batches, wanted
            )
            if count := len(sampling):
                logits_RV = self._model.logits(hidden_RH[:count])
                self._sample(logits_RV, rows_R, positions_R, place_1, extras, places.reports)
            self._score(hidden_RH[len(sampling) :], scored_P, scores.counts_P, places.scores)

        self.stream.launch(work)

    @torch.inference_mode()
    def _score(
        self, hidden_PH: torch.Tensor, token_ids_P: torch.Tensor, counts_P: Sequence[int], place: int
    ) -> None:
        """Leave the logprobs of prompts' tokens in the ring, from this word on."""
        most, size = max(counts_P, default=0), line_words(counts_P)
        for some in slices(len(counts_P), self._model.vocab_size):
            logits_PV = self._model.logits(hidden_PH[some]).float()
            report_PX = report(logits_PV, token_ids_P[some].long(), most)
            store_words(self._ring, place + some.start * size, report_PX.reshape(-1))

    @torch.inference_mode()
    def _sample(
        self,
        logits_RV: torch.Tensor,
        rows_R: torch.Tensor,
        positions_R: torch.Tensor,
        place_1: torch.Tensor,
        extras: Extras | None,
        report_place: int,
    ) -> None:
        """Draw each row's token for its position, and leave it where it is wanted."""
        state = self._state
        rows = sampling_rows(state.parameters_XW, rows_R, positions_R)
        if extras is None:
            sampled = sample(logits_RV, rows)
        else:
            sampled = sample_with_extras(logits_RV, rows, extras, state.tokens_XL, self._ring, report_place)
        store_sampled(
            sampled.token_ids_R,
            sampled.finite_R,
            rows_R,
            positions_R,
            state.tokens_XL,
            self._ring,
            place_1,
        )


def cut(chunks: Sequence[Chunk], most: int) -> list[list[Chunk]]:
    """The chunks in their order, in parts of up to ``most`` tokens each."""
    parts: list[list[Chunk]] = []
    room = 0
    for chunk in chunks:
        start, left = chunk.start, chunk.count
        while left:
            if room == 0:
                parts.append([])
                room = most
            count = min(left, room)
            left -= count
            scored = chunk.scored and chunk.scored.within(start, start + count)
            parts[-1].append(Chunk(chunk.row, start, count, chunk.samples and not left, scored))
            start += count
            room -= count
    return parts
