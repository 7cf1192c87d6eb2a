"""What a few requests ask of the sampler beside temperature and filters, on the GPU: masks, ``logit_bias``,
penalties, ``min_tokens`` and logprobs. The CPU's ``engine.model.sampler`` says what each means.

A row pays only for what its request asks for: the rest of the batch goes through the same kernels as ever.

Legend: R rows of the step, V vocabulary, W longest history, U words of a mask. Other leading letters number a
subset of the rows: A penalized, M masked, P reported with logprobs; or pairs of a row and a token: B with a
bias, E that may not come yet.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tidegate.engine.constraint import Mask
from tidegate.engine.messages import Logprob, PositionLogprobs
from tidegate.engine.request import MAX_LOGPROBS, SamplingParams
from tidegate.engine.step import RowSetup
from tidegate.kernels.noise import noise_state
from tidegate.kernels.triton.sampling import SampledRows, SamplingRows, sample
from tidegate.kernels.triton.sampling_rows import PARAMETERS
from tidegate.kernels.triton.step_inputs import store_words

GREEDY_TEMPERATURE = 1e-5
"""Below it nothing but the best token has any weight in fp32."""
REPORT_WORDS = 2 + 2 * MAX_LOGPROBS
"""At most, of one row: the chosen token's logprob and rank, then ids and logprobs of the best."""

Put = Callable[[npt.NDArray[np.int32]], torch.Tensor]
"""Sends words to the device behind the step before; see ``Inbox.put``."""


def parameters(setup: RowSetup, vocab_size: int) -> npt.NDArray[np.int32]:
    """The row's record of ``PARAMETERS``, as words."""
    params = setup.params
    record = np.zeros(1, PARAMETERS)
    record["temperature"] = 0 if params.temperature < GREEDY_TEMPERATURE else params.temperature
    record["top_k"] = vocab_size if params.top_k == 0 else min(params.top_k, vocab_size)
    record["top_p"] = params.top_p
    # By torch, as on the CPU: numpy's logarithm may differ in the last bit.
    record["log_min_p"] = torch.tensor([params.min_p]).log_().numpy()
    seeds, indices = np.array([setup.seed], np.uint64), np.array([setup.sample_index])
    record["noise_state"] = noise_state(seeds, indices)
    return record.view(np.int32)


@dataclass(slots=True)
class _Row:
    params: SamplingParams
    num_prompt_tokens: int
    stop_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Extras:
    """What the rows of one step ask for, with its numbers on the device."""

    masked_M: torch.Tensor | None
    """int32 index into R; None where every row may choose any token."""
    masks_MU: torch.Tensor | None
    biased_B2: torch.Tensor | None
    """int32: index into R, token id; None where no row has a bias."""
    biases_B: torch.Tensor | None
    """fp32 as words."""
    penalized_A: torch.Tensor | None
    """int32 index into R; None where no row is."""
    table_rows_A: torch.Tensor | None
    history: int
    """W."""
    spans_A2: torch.Tensor | None
    """int32: first output position, and the number of known ones."""
    penalties_A3: torch.Tensor | None
    """fp32 as words: repetition, presence, frequency."""
    banned_E2: torch.Tensor | None
    """int32: index into R, token id."""
    reported_P: torch.Tensor | None
    counts_P: Sequence[int]
    """Logprobs that each reported row asks for."""
    reported: Sequence[int]
    """``reported_P``, on the host."""

    @property
    def report_words(self) -> int:
        """Of all rows' reports."""
        return len(self.reported) * line_words(self.counts_P)


def line_words(counts_P: Sequence[int]) -> int:
    """Of the report of one row, among others that ask for so many logprobs."""
    return 2 + 2 * max(counts_P, default=0)


class ExtraSampling:
    """Keeps on the host what each row asks for."""

    def __init__(self, max_rows: int, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._rows: list[_Row | None] = [None] * max_rows
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._asks = np.zeros(max_rows, np.bool_)

    def set_row(self, setup: RowSetup) -> None:
        params = setup.params
        stop_ids = params.stop_token_ids + (() if params.ignore_eos else self._eos_token_ids)
        stop_ids = tuple(token for token in stop_ids if token < self._vocab_size)
        self._rows[setup.row] = _Row(params, setup.num_prompt_tokens, stop_ids)
        self._asks[setup.row] = (
            bool(params.logit_bias)
            or params.has_penalties
            or params.min_tokens > 0
            or params.logprobs is not None
        )

    def of(
        self,
        rows_R: npt.NDArray[np.int32],
        positions_R: npt.NDArray[np.int32],
        masks: Mapping[int, Mask],
        put: Put,
    ) -> Extras | None:
        """What these rows ask for at these positions; None where they ask for nothing.

        ``masks``: by row, the tokens that may be chosen, where not all may.
        """
        masked = [i for i, row in enumerate(rows_R.tolist()) if row in masks] if masks else []
        if not masked and not self._asks[rows_R].any():
            return None
        biased: list[tuple[int, int]] = []
        biases: list[float] = []
        penalized, table_rows, spans, penalties, banned, reported, counts = [], [], [], [], [], [], []
        for i, (row, position) in enumerate(zip(rows_R.tolist(), positions_R.tolist(), strict=True)):
            asked = self._rows[row]
            if asked is None or not self._asks[row]:
                continue
            params = asked.params
            biased += [(i, token) for token in params.logit_bias]
            biases += params.logit_bias.values()
            if params.has_penalties:
                penalized.append(i)
                table_rows.append(row)
                spans.append((asked.num_prompt_tokens, position))
                penalties.append(
                    (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
                )
            if position - asked.num_prompt_tokens < params.min_tokens:
                banned += [(i, token) for token in asked.stop_ids]
            if params.logprobs is not None:
                reported.append(i)
                counts.append(params.logprobs)
        if not (masked or biased or penalized or banned or reported):
            return None

        def send(values: Sequence[object], dtype: type = np.int32) -> torch.Tensor | None:
            return put(np.array(values, dtype).view(np.int32)) if values else None

        return Extras(
            masked_M=send(masked),
            masks_MU=put(np.stack([masks[rows_R[i]] for i in masked])) if masked else None,
            biased_B2=send(biased),
            biases_B=send(biases, np.float32),
            penalized_A=send(penalized),
            table_rows_A=send(table_rows),
            history=max((known for _, known in spans), default=0),
            spans_A2=send(spans),
            penalties_A3=send(penalties, np.float32),
            banned_E2=send(banned),
            reported_P=send(reported),
            counts_P=counts,
            reported=reported,
        )


def sample_with_extras(
    logits_RV: torch.Tensor,
    rows: SamplingRows,
    extras: Extras,
    tokens_XL: torch.Tensor,
    ring: torch.Tensor,
    report_place: int,
) -> SampledRows:
    """``sample`` of the adjusted logits. What is to be reported goes to the host's ring from its word
    ``report_place`` on, row by row (see ``read_reports``). May overwrite the logits.
    """
    logits_RV = logits_RV.float()
    finite_R = logits_RV.isfinite().all(1).int()
    raw_PV = None if extras.reported_P is None else logits_RV.index_select(0, extras.reported_P)
    if extras.masked_M is not None and extras.masks_MU is not None:
        rows_M = extras.masked_M.long()
        forbidden_MV = ~_allowed(extras.masks_MU, logits_RV.shape[1])
        masked_MV = logits_RV.index_select(0, rows_M).masked_fill_(forbidden_MV, -torch.inf)
        logits_RV.index_copy_(0, rows_M, masked_MV)
    if extras.biased_B2 is not None and extras.biases_B is not None:
        places_B = extras.biased_B2.long().unbind(1)
        logits_RV.index_put_(places_B, logits_RV[places_B] + extras.biases_B.view(torch.float32))
    if (
        extras.penalized_A is not None
        and extras.table_rows_A is not None
        and extras.spans_A2 is not None
        and extras.penalties_A3 is not None
    ):
        history_AW = tokens_XL[:, : extras.history].index_select(0, extras.table_rows_A)
        penalized_AV = _penalize(
            logits_RV.index_select(0, extras.penalized_A),
            history_AW,
            extras.spans_A2,
            extras.penalties_A3.view(torch.float32),
        )
        logits_RV.index_copy_(0, extras.penalized_A.long(), penalized_AV)
    if extras.banned_E2 is not None:
        rows_E, ids_E = extras.banned_E2.long().unbind(1)
        logits_RV.index_put_((rows_E, ids_E), logits_RV.new_full((), -torch.inf))
    token_ids_R = sample(logits_RV, rows).token_ids_R
    if raw_PV is not None and extras.reported_P is not None:
        report_PX = report(raw_PV, token_ids_R.index_select(0, extras.reported_P), max(extras.counts_P))
        store_words(ring, report_place, report_PX.reshape(-1))
    return SampledRows(token_ids_R, finite_R)


def _allowed(masks_MU: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """A flag for each token, from one bit; bytes take a quarter of the room that words would."""
    bytes_MB1 = masks_MU.contiguous().view(torch.uint8)[:, :, None]
    places_8 = torch.arange(8, dtype=torch.uint8, device=masks_MU.device)
    return ((bytes_MB1 >> places_8) & 1).flatten(1)[:, :vocab_size].bool()


def _penalize(
    scores_AV: torch.Tensor, history_AW: torch.Tensor, spans_A2: torch.Tensor, penalties_A3: torch.Tensor
) -> torch.Tensor:
    """Repetition counts prompt and output, presence and frequency the output alone."""
    place_W = torch.arange(history_AW.shape[1], device=history_AW.device)
    known_AW = place_W < spans_A2[:, 1:]
    output_AW = known_AW & (place_W >= spans_A2[:, :1])
    # A place behind what is known may hold anything: it counts for nothing, under an id that exists.
    ids_AW = history_AW.long().where(known_AW, 0)

    def count(which_AW: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(scores_AV).scatter_add_(1, ids_AW, which_AW.float())

    repetition_A1, presence_A1, frequency_A1 = penalties_A3.split(1, dim=1)
    repeated_AV = torch.where(scores_AV > 0, scores_AV / repetition_A1, scores_AV * repetition_A1)
    penalized_AV = torch.where(count(known_AW) > 0, repeated_AV, scores_AV)
    outputs_AV = count(output_AW)
    penalized_AV -= frequency_A1 * outputs_AV
    penalized_AV -= presence_A1 * (outputs_AV > 0)
    return penalized_AV


def report(raw_PV: torch.Tensor, token_ids_P: torch.Tensor, most: int) -> torch.Tensor:
    """Words for the host, ``line_words`` a row: of these tokens (int64) and of the best ones, by the
    unadjusted logits in fp32. Tokens of one logit rank by their ids.
    """
    logprobs_PV = raw_PV.log_softmax(1)
    token_ids_P1 = token_ids_P[:, None]
    chosen_P1 = logprobs_PV.gather(1, token_ids_P1)
    before_PV = torch.arange(raw_PV.shape[1], device=raw_PV.device) < token_ids_P1
    ahead_PV = (logprobs_PV > chosen_P1) | ((logprobs_PV == chosen_P1) & before_PV)
    ranks_P1 = 1 + ahead_PV.sum(1, keepdim=True, dtype=torch.int32)
    parts = [chosen_P1.view(torch.int32), ranks_P1]
    if most:
        values_PV, ids_PV = logprobs_PV.sort(dim=1, descending=True, stable=True)
        parts += [ids_PV[:, :most].int(), values_PV[:, :most].contiguous().view(torch.int32)]
    return torch.cat(parts, 1)


def read_reports(
    words: npt.NDArray[np.int32], extras: Extras, token_ids: Sequence[int]
) -> list[PositionLogprobs | None]:
    """An entry for each row of the step, from what ``sample_with_extras`` left in the ring."""
    logprobs: list[PositionLogprobs | None] = [None] * len(token_ids)
    chosen = [token_ids[i] for i in extras.reported]
    for i, position in zip(extras.reported, read_lines(words, chosen, extras.counts_P), strict=True):
        logprobs[i] = position
    return logprobs


def read_lines(
    words: npt.NDArray[np.int32], token_ids: Sequence[int], counts: Sequence[int]
) -> Iterator[PositionLogprobs]:
    """What ``report`` said of these tokens."""
    size, most = line_words(counts), max(counts, default=0)
    lines = words[: len(token_ids) * size].reshape(-1, size)
    for token_id, count, line in zip(token_ids, counts, lines, strict=True):
        chosen = Logprob(token_id, float(line[:1].view(np.float32)[0]), int(line[1]))
        ids = line[2 : 2 + count].tolist()
        values = line[2 + most : 2 + most + count].view(np.float32).tolist()
        top = [
            Logprob(token, value, rank)
            for rank, (token, value) in enumerate(zip(ids, values, strict=True), 1)
        ]
        yield PositionLogprobs(chosen, top)
