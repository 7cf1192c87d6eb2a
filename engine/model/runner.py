"""Computes steps: rows of tokens and block tables in, sampled tokens out.

With ``depth`` 2 steps run one after the other on a thread of their own, so that the next step can be
planned meanwhile; a step reads the tokens that the one before it sampled from the row, where no one has
had to look at them in between.

Shapes: ``S`` chunks of the step, ``T`` their packed tokens, ``R`` chunks that sample, ``P`` scored tokens of
prompts, ``H`` hidden size, ``V`` vocabulary, ``G`` KV groups, ``X`` rows, ``M`` blocks of a row; the pool's
``NLCKBD`` stands in ``engine.memory.layout``.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch

from tidegate.engine import failpoints
from tidegate.engine.memory.groups import FULL_ATTENTION, KVGroup
from tidegate.engine.memory.layout import BlockLayout
from tidegate.engine.messages import PositionLogprobs
from tidegate.engine.model.sampler import Argmax, Sampler, position_logprobs, torch_argmax
from tidegate.engine.model.scoring import Scores, scores_of, slices
from tidegate.engine.step import StepHandle, StepPlan, StepResult
from tidegate.kernels.attention import AttentionBatch


class Model(Protocol):
    """What the runner needs of a decoder."""

    vocab_size: int

    def forward(
        self,
        token_ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        pool_NLCKBD: torch.Tensor,
        batches: Sequence[AttentionBatch],
        rows_R: torch.Tensor,
    ) -> torch.Tensor:
        """Write the tokens' KV to the pool; hidden states RH of the tokens ``rows_R``, which may be none.

        ``batches``: one for each KV group.
        """

    def logits(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        """RV, of any rows of hidden states."""


class ModelRunner:
    """The CPU device's ``engine.step.Runner``.

    A plan belongs to the runner once it is launched: its lists must not change afterwards. A step that
    raises does so from its handle's ``result``; later steps still run.
    """

    def __init__(
        self,
        model: Model,
        pool_NLCKBD: torch.Tensor,
        layout: BlockLayout,
        max_rows: int,
        max_model_len: int,
        eos_token_ids: Sequence[int],
        depth: int,
        groups: Sequence[KVGroup] = FULL_ATTENTION,
        argmax: Argmax = torch_argmax,
    ) -> None:
        self._model = model
        self._pool_NLCKBD = pool_NLCKBD
        self._block_size = layout.block_size
        self._sampler = Sampler(max_rows, eos_token_ids, argmax)
        self._tokens = np.zeros((max_rows, max_model_len), np.int32)
        self._groups = groups
        self._tables_GXM = np.zeros((len(groups), max_rows, -(-max_model_len // layout.block_size)), np.int32)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="tidegate-steps") if depth > 1 else None

    def launch(self, plan: StepPlan) -> StepHandle:
        """Start the step, behind those launched before; with depth 1, finish it."""
        if self._executor is not None:
            return self._executor.submit(self._compute, plan)
        handle: Future[StepResult] = Future()
        try:
            handle.set_result(self._compute(plan))
        except Exception as error:  # noqa: BLE001 - the handle raises it, as with a thread
            handle.set_exception(error)
        return handle

    def close(self) -> None:
        """Wait for the steps under way and end the thread."""
        if self._executor is not None:
            self._executor.shutdown()

    def _compute(self, plan: StepPlan) -> StepResult:
        began = time.perf_counter()
        self._copy_blocks(plan)
        self._update_rows(plan)
        if not plan.chunks:
            return StepResult([], [], [], time.perf_counter() - began)

        fields = [(chunk.row, chunk.start, chunk.count, chunk.samples) for chunk in plan.chunks]
        rows_S, starts_S, counts_S, samples_S = np.array(fields, np.int64).T
        ends_S = starts_S + counts_S
        query_ends_S = counts_S.cumsum()
        num_blocks = -(-int(ends_S.max()) // self._block_size)
        batches = [
            AttentionBatch.build(
                # To attention a decode is one query token, whatever the plan calls it.
                num_decodes=int((counts_S == 1).cumprod().sum()),
                query_starts=[0, *query_ends_S.tolist()],
                context_lens=ends_S.tolist(),
                block_tables_SM=torch.from_numpy(tables_XM[rows_S, :num_blocks]),
                kv_NCKBD=BlockLayout.layer(self._pool_NLCKBD, 0),
                window=group.window,
            )
            for group, tables_XM in zip(self._groups, self._tables_GXM, strict=True)
        ]
        positions_T = batches[0].positions_T
        token_ids_T = self._tokens[rows_S.repeat(counts_S), positions_T.numpy()]
        if failpoints.ARMED:
            failpoints.reach("step", token_ids_T.tolist())
        sampling, scores = np.flatnonzero(samples_S), scores_of(plan.chunks)
        hidden_RH = self._model.forward(
            torch.from_numpy(token_ids_T.astype(np.int64)),
            positions_T,
            self._pool_NLCKBD,
            batches,
            torch.from_numpy(np.concatenate((query_ends_S[sampling] - 1, scores.rows_P))),
        )
        prompt_logprobs = self._score(hidden_RH[len(sampling) :], scores)
        if not len(sampling):
            return StepResult([], [], [], time.perf_counter() - began, prompt_logprobs)

        logits_RV = self._model.logits(hidden_RH[: len(sampling)])
        rows_R, positions_R = rows_S[sampling], ends_S[sampling]
        sampled = self._sampler.sample(logits_RV, rows_R, positions_R, self._tokens, plan.masks)
        fits = positions_R < self._tokens.shape[1]
        self._tokens[rows_R[fits], positions_R[fits]] = sampled.token_ids[fits]
        return StepResult(
            sampled.token_ids.tolist(),
            sampled.finite.tolist(),
            sampled.logprobs,
            time.perf_counter() - began,
            prompt_logprobs,
        )

    @torch.inference_mode()
    def _score(self, hidden_PH: torch.Tensor, scores: Scores) -> list[PositionLogprobs]:
        found: list[PositionLogprobs] = []
        for some in slices(len(scores), self._model.vocab_size):
            logits_PV = self._model.logits(hidden_PH[some]).float()
            token_ids, counts = scores.token_ids_P[some].tolist(), scores.counts_P[some]
            found += map(position_logprobs, logits_PV, token_ids, counts)
        return found

    def _copy_blocks(self, plan: StepPlan) -> None:
        for source, target in plan.block_copies:
            self._pool_NLCKBD[target].copy_(self._pool_NLCKBD[source])

    def _update_rows(self, plan: StepPlan) -> None:
        for setup in plan.setups:
            self._tokens[setup.row, : len(setup.token_ids)] = setup.token_ids
            for tables_XM, block_ids in zip(self._tables_GXM, setup.block_ids, strict=True):
                tables_XM[setup.row, : len(block_ids)] = block_ids
        for row, group, index, block_id in plan.new_blocks:
            self._tables_GXM[group, row, index] = block_id
        # Last: should one of them fail, the step behind this one still writes to its own blocks alone.
        for setup in plan.setups:
            self._sampler.set_row(setup)
