"""From logits to tokens, for a whole batch at once; a row pays only for what its request asks for.

The order of the operations is that of transformers: masks, ``logit_bias``, penalties, ``min_tokens``,
temperature, ``top_k``, ``top_p``, ``min_p``. Each filter comes down to a *cut*, and a row keeps every token
whose score is at least its highest cut: tokens that tie at a cut stay together, so no sort order can matter.
Of those kept the largest score plus Gumbel noise wins, which draws from their softmax (Gumbel-max). Noise is
keyed by request and position (``kernels.noise``): the draw is the same in any batch. Wherever tokens tie, the
lowest id wins.

Shapes: ``R`` rows of the batch, ``V`` vocabulary, ``W`` longest history, ``E`` survivors of the filters of
all rows together. Other leading letters number a subset of the rows: ``A`` adjusted, ``D`` drawn at
random, ``F`` filtered, ``L`` with logprobs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tidegate.engine.constraint import Mask, allowed_tokens
from tidegate.engine.messages import Logprob, PositionLogprobs
from tidegate.engine.step import RowSetup
from tidegate.kernels.noise import gumbel_noise, noise_keys

# Below this temperature nothing but the best token has any weight in fp32.
_GREEDY_TEMPERATURE = 1e-5
# top_p looks at this many of the best tokens first, then at 16 times as many.
_FIRST_CANDIDATES = 64
# Noise for rows without filters is made for about this many tokens at a time: they stay in the cache.
_NOISE_ELEMENTS = 2**18

_NO_LOGPROBS = -1

_PARAMETERS = np.dtype(
    [
        ("temperature", np.float32),
        ("top_k", np.int64),
        ("top_p", np.float64),
        ("min_p", np.float32),
        ("presence", np.float32),
        ("frequency", np.float32),
        ("repetition", np.float32),
        ("seed", np.uint64),
        ("sample_index", np.int64),
        ("num_prompt_tokens", np.int64),
        ("min_tokens", np.int64),
        ("logprobs", np.int64),
        ("greedy", np.bool_),
        ("biased", np.bool_),
        ("penalized", np.bool_),
        ("plain", np.bool_),
    ]
)


@dataclass(frozen=True, slots=True)
class Sampled:
    """One entry for each row of the batch."""

    token_ids: npt.NDArray[np.int64]
    finite: npt.NDArray[np.bool_]
    """False where the logits held NaN or infinity; that token is a valid id without a meaning."""
    logprobs: list[PositionLogprobs | None]


Greedy = tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]
"""For each row the token with the best logit, and whether all of its logits are finite."""

Argmax = Callable[[torch.Tensor], Greedy]


def torch_argmax(logits_RV: torch.Tensor) -> Greedy:
    logits_RV = logits_RV.float()
    return logits_RV.argmax(1).numpy(), _finite(logits_RV)


class Sampler:
    """Keeps the sampling parameters of every row, as arrays, and samples from logits with them.

    ``argmax`` serves the steps in which nobody wants more than the best token.
    """

    def __init__(
        self,
        max_rows: int,
        eos_token_ids: Sequence[int],
        argmax: Argmax = torch_argmax,
    ) -> None:
        self._argmax = argmax
        self._eos_token_ids = tuple(eos_token_ids)
        self._parameters = np.zeros(max_rows, _PARAMETERS)
        self._stop_ids: list[tuple[int, ...]] = [()] * max_rows
        self._logit_biases: list[dict[int, float]] = [{}] * max_rows

    def set_row(self, setup: RowSetup) -> None:
        """From the next ``sample`` on the row belongs to this sequence."""
        params = setup.params
        greedy = params.temperature < _GREEDY_TEMPERATURE
        logprobs = _NO_LOGPROBS if params.logprobs is None else params.logprobs
        self._parameters[setup.row] = (
            params.temperature,
            params.top_k,
            params.top_p,
            params.min_p,
            params.presence_penalty,
            params.frequency_penalty,
            params.repetition_penalty,
            setup.seed,
            setup.sample_index,
            setup.num_prompt_tokens,
            params.min_tokens,
            logprobs,
            greedy,
            bool(params.logit_bias),
            params.has_penalties,
            greedy
            and not params.logit_bias
            and not params.has_penalties
            and not params.min_tokens
            and logprobs == _NO_LOGPROBS,
        )
        self._logit_biases[setup.row] = params.logit_bias
        eos_token_ids = () if params.ignore_eos else self._eos_token_ids
        self._stop_ids[setup.row] = params.stop_token_ids + eos_token_ids

    @torch.inference_mode()
    def sample(
        self,
        logits_RV: torch.Tensor,
        rows_R: npt.NDArray[np.int64],
        positions_R: npt.NDArray[np.int64],
        tokens: npt.NDArray[np.int32],
        masks: Mapping[int, Mask] | None = None,
    ) -> Sampled:
        """The token of each row for ``positions_R``, its place in the sequence.

        ``tokens`` is the table of all rows' tokens, known up to that position; ``masks`` have, by row, the
        tokens that may be chosen, where not all may. May overwrite the logits.
        """
        parameters_R = self._parameters[rows_R]
        if not masks and parameters_R["plain"].all():
            return Sampled(*self._argmax(logits_RV), [None] * len(rows_R))

        logits_RV = logits_RV.float()
        finite_R = _finite(logits_RV)
        reported = np.flatnonzero(parameters_R["logprobs"] != _NO_LOGPROBS)
        raw_LV = logits_RV[reported]
        if masks:
            _apply_masks(logits_RV, rows_R, masks)
        self._adjust(logits_RV, parameters_R, rows_R, positions_R, tokens)

        token_ids_R = np.empty(len(rows_R), np.int64)
        greedy = np.flatnonzero(parameters_R["greedy"])
        if len(greedy):
            token_ids_R[greedy] = logits_RV[greedy].argmax(1).numpy()
        drawn = np.flatnonzero(~parameters_R["greedy"])
        if len(drawn):
            token_ids_R[drawn] = _draw(logits_RV[drawn], parameters_R[drawn], positions_R[drawn]).numpy()

        logprobs: list[PositionLogprobs | None] = [None] * len(rows_R)
        for i, raw_V in zip(reported.tolist(), raw_LV, strict=True):
            logprobs[i] = position_logprobs(raw_V, int(token_ids_R[i]), int(parameters_R["logprobs"][i]))
        return Sampled(token_ids_R, finite_R, logprobs)

    def _adjust(
        self,
        logits_RV: torch.Tensor,
        parameters_R: np.ndarray,
        rows_R: npt.NDArray[np.int64],
        positions_R: npt.NDArray[np.int64],
        tokens: npt.NDArray[np.int32],
    ) -> None:
        """Apply ``logit_bias``, penalties and ``min_tokens`` in place."""
        for i in np.flatnonzero(parameters_R["biased"]).tolist():
            logit_bias = self._logit_biases[rows_R[i]]
            logits_RV[i, list(logit_bias)] += torch.tensor(list(logit_bias.values()))
        penalized = np.flatnonzero(parameters_R["penalized"])
        if len(penalized):
            logits_RV[penalized] = _penalize(
                logits_RV[penalized],
                parameters_R[penalized],
                positions_R[penalized],
                tokens[rows_R[penalized], : positions_R[penalized].max()],
            )
        num_outputs_R = positions_R - parameters_R["num_prompt_tokens"]
        for i in np.flatnonzero(num_outputs_R < parameters_R["min_tokens"]).tolist():
            stop_ids = [token for token in self._stop_ids[rows_R[i]] if token < logits_RV.shape[1]]
            logits_RV[i, stop_ids] = -torch.inf


def _apply_masks(logits_RV: torch.Tensor, rows_R: npt.NDArray[np.int64], masks: Mapping[int, Mask]) -> None:
    """In place."""
    for i, row in enumerate(rows_R.tolist()):
        if row in masks:
            allowed_V = allowed_tokens(masks[row], logits_RV.shape[1])
            logits_RV[i].masked_fill_(torch.from_numpy(~allowed_V), -torch.inf)


def _finite(logits_RV: torch.Tensor) -> npt.NDArray[np.bool_]:
    """A sum is as finite as its terms, and much cheaper than looking at each."""
    finite_R: npt.NDArray[np.bool_] = logits_RV.sum(1).isfinite().numpy()
    return finite_R


def _penalize(
    scores_AV: torch.Tensor,
    parameters_A: np.ndarray,
    positions_A: npt.NDArray[np.int64],
    tokens_AW: npt.NDArray[np.int32],
) -> torch.Tensor:
    """Repetition counts prompt and output, presence and frequency the output alone."""
    place_W = np.arange(tokens_AW.shape[1])
    known_AW = place_W < positions_A[:, None]
    output_AW = known_AW & (place_W >= parameters_A["num_prompt_tokens"][:, None])
    ids_AW = torch.from_numpy(tokens_AW.astype(np.int64))

    def count(which_AW: npt.NDArray[np.bool_]) -> torch.Tensor:
        return torch.zeros_like(scores_AV).scatter_add_(1, ids_AW, torch.from_numpy(which_AW).float())

    repetition, presence, frequency = (
        torch.from_numpy(parameters_A[name].copy())[:, None]
        for name in ("repetition", "presence", "frequency")
    )
    repeated_AV = torch.where(scores_AV > 0, scores_AV / repetition, scores_AV * repetition)
    scores_AV = torch.where(count(known_AW) > 0, repeated_AV, scores_AV)
    outputs_AV = count(output_AW)
    return scores_AV - frequency * outputs_AV - presence * (outputs_AV > 0)


def _draw(
    scores_DV: torch.Tensor, parameters_D: np.ndarray, positions_D: npt.NDArray[np.int64]
) -> torch.Tensor:
    """A token for each row from the softmax of what its filters keep. Overwrites the scores."""
    vocab_size = scores_DV.shape[1]
    # With the best score moved to 0 no temperature can overflow, and min_p is a constant.
    scores_DV -= scores_DV.amax(1, keepdim=True)
    scores_DV /= torch.from_numpy(parameters_D["temperature"].copy())[:, None]
    keys_D = torch.from_numpy(noise_keys(parameters_D["seed"], parameters_D["sample_index"], positions_D))
    cuts_D = _cuts(scores_DV, parameters_D)

    token_ids_D = torch.empty(len(scores_DV), dtype=torch.int64)
    filtered_D = cuts_D > -torch.inf
    filtered, whole = filtered_D.nonzero()[:, 0], (~filtered_D).nonzero()[:, 0]
    if len(filtered):
        token_ids_D[filtered] = _best_of_kept(scores_DV[filtered], cuts_D[filtered], keys_D[filtered])
    all_ids_V = torch.arange(vocab_size, dtype=torch.int32)
    at_once = max(1, _NOISE_ELEMENTS // vocab_size)
    for start in range(0, len(whole), at_once):
        some = whole[start : start + at_once]
        noise = gumbel_noise(keys_D[some, None], all_ids_V)
        token_ids_D[some] = noise.add_(scores_DV[some]).argmax(1)
    return token_ids_D


def _best_of_kept(scores_FV: torch.Tensor, cuts_F: torch.Tensor, keys_F: torch.Tensor) -> torch.Tensor:
    """Gumbel-max over the tokens at or above each row's cut, with noise for those alone."""
    rows_E, ids_E = (scores_FV >= cuts_F[:, None]).nonzero(as_tuple=True)
    noisy_E = scores_FV[rows_E, ids_E] + gumbel_noise(keys_F[rows_E], ids_E.int())
    best_F = torch.full_like(cuts_F, -torch.inf).scatter_reduce_(0, rows_E, noisy_E, "amax")
    wins_E = noisy_E == best_F[rows_E]
    # A row of NaN keeps no token at all, and its id must be a valid one.
    last_id_F = torch.full((len(cuts_F),), scores_FV.shape[1] - 1)
    return last_id_F.scatter_reduce_(0, rows_E[wins_E], ids_E[wins_E], "amin")


def _cuts(scores_DV: torch.Tensor, parameters_D: np.ndarray) -> torch.Tensor:
    """The lowest score that each row's filters keep; -inf without filters. The best score is 0."""
    vocab_size = scores_DV.shape[1]
    cuts_D = torch.from_numpy(parameters_D["min_p"].copy()).log_()
    top_k_D = np.where(parameters_D["top_k"] == 0, vocab_size, parameters_D["top_k"].clip(max=vocab_size))
    ranked = np.flatnonzero((top_k_D < vocab_size) | (parameters_D["top_p"] < 1))
    if len(ranked):
        top_p_F = torch.from_numpy(parameters_D["top_p"][ranked])
        cuts_F = _rank_cuts(scores_DV[ranked], torch.from_numpy(top_k_D[ranked]), top_p_F)
        cuts_D[ranked] = torch.maximum(cuts_D[ranked], cuts_F)
    return cuts_D


def _rank_cuts(scores_FV: torch.Tensor, top_k_F: torch.Tensor, top_p_F: torch.Tensor) -> torch.Tensor:
    """The score of the last token that ``top_k``, and ``top_p`` of what that leaves, keep of each row.

    Sums are in fp64: in fp32 the cut of a large vocabulary moves with the order of summation. Few rows
    need more than the first candidates, so the vocabulary is seldom sorted.
    """
    vocab_size = scores_FV.shape[1]
    all_kept_F = top_k_F == vocab_size
    totals_F = torch.zeros(len(scores_FV), dtype=torch.float64)
    totals_F[all_kept_F] = scores_FV[all_kept_F].exp().sum(1, dtype=torch.float64)

    cuts_F = torch.empty(len(scores_FV))
    open_rows = torch.arange(len(scores_FV))
    width = _FIRST_CANDIDATES
    while len(open_rows):
        width = min(width, vocab_size)
        best = scores_FV[open_rows].topk(width).values
        sums = best.exp().cumsum(1, dtype=torch.float64)
        last = top_k_F[open_rows].clamp(max=width)[:, None] - 1
        kept_total = torch.where(all_kept_F[open_rows, None], totals_F[open_rows, None], sums.gather(1, last))
        wanted = top_p_F[open_rows, None] * kept_total
        last = torch.minimum(last, (sums < wanted).sum(1, keepdim=True))
        enough = (top_k_F[open_rows] <= width) | (all_kept_F[open_rows] & (sums[:, -1] >= wanted[:, 0]))
        cuts_F[open_rows] = best.gather(1, last)[:, 0]
        open_rows = open_rows[~enough]
        width *= 16
    return cuts_F


def position_logprobs(raw_V: torch.Tensor, token_id: int, count: int) -> PositionLogprobs:
    """Of a token and of the ``count`` most likely ones, by the unadjusted logits in fp32.

    Tokens of one logit rank by their ids.
    """
    logprobs_V = raw_V.log_softmax(0)
    chosen = logprobs_V[token_id]
    rank = 1 + int((logprobs_V > chosen).sum()) + int((logprobs_V[:token_id] == chosen).sum())
    top: list[Logprob] = []
    if count:
        lowest = logprobs_V.topk(min(count, len(logprobs_V))).values[-1]
        ids = (logprobs_V >= lowest).nonzero()[:, 0]
        values, order = logprobs_V[ids].sort(descending=True, stable=True)
        pairs = zip(ids[order[:count]].tolist(), values[:count].tolist(), strict=True)
        top = [Logprob(token, value, i + 1) for i, (token, value) in enumerate(pairs)]
    return PositionLogprobs(Logprob(token_id, float(chosen), rank), top)
