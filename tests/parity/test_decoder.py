"""The decoder against transformers: the same logits in fp32, and in bf16 no larger an error."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import VARIANTS, VOCAB_SIZE
from transformers import AutoModelForCausalLM

from tidegate.engine.memory.layout import BlockLayout
from tidegate.engine.model.decoder import Decoder
from tidegate.engine.model.weights import load_model
from tidegate.kernels.attention import AttentionBatch

BLOCK_SIZE = 8


class Paged:
    """Sequences on one pool whose blocks lie in any order; poisoned, so that a read before a write shows."""

    def __init__(self, decoder: Decoder, num_blocks: int = 64) -> None:
        self.decoder = decoder
        layout = decoder.layout(BLOCK_SIZE)
        num_groups = len(decoder.groups)
        self.pool = layout.allocate(num_groups * num_blocks, decoder.device).fill_(torch.nan)
        self.firsts = range(0, num_groups * num_blocks, num_blocks)
        """Each group's part of the pool, in which it has the same blocks."""
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1))
        self.free: list[int] = order.tolist()
        self.tables: list[list[int]] = []
        self.lens: list[int] = []

    def add(self) -> int:
        self.tables.append([])
        self.lens.append(0)
        return len(self.lens) - 1

    def step(self, chunks: list[tuple[int, torch.Tensor]], every_row: bool = False) -> torch.Tensor:
        """Append tokens to sequences, single ones first; logits of each chunk's last token, or of all."""
        starts = [0]
        positions: list[int] = []
        for sequence, tokens in chunks:
            begin, end = self.lens[sequence], self.lens[sequence] + len(tokens)
            positions += range(begin, end)
            starts.append(starts[-1] + len(tokens))
            self.lens[sequence] = end
            while len(self.tables[sequence]) * BLOCK_SIZE < end:
                self.tables[sequence].append(self.free.pop())
        width = max(len(self.tables[sequence]) for sequence, _ in chunks)
        rows = [self.tables[sequence] + [0] * (width - len(self.tables[sequence])) for sequence, _ in chunks]
        batches = [
            AttentionBatch.build(
                num_decodes=sum(len(tokens) == 1 for _, tokens in chunks),
                query_starts=starts,
                context_lens=[self.lens[sequence] for sequence, _ in chunks],
                block_tables_SM=torch.tensor(rows, dtype=torch.int32) + first,
                kv_NCKBD=BlockLayout.layer(self.pool, 0),
                window=group.kind.window,
            )
            for first, group in zip(self.firsts, self.decoder.groups, strict=True)
        ]
        sampled = range(starts[-1]) if every_row else [end - 1 for end in starts[1:]]
        hidden = self.decoder.forward(
            torch.cat([tokens for _, tokens in chunks]),
            torch.tensor(positions),
            self.pool,
            batches,
            torch.tensor(list(sampled), dtype=torch.int64),
        )
        return self.decoder.logits(hidden)


def reference(folder: Path, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """Logits of transformers for every token of one sequence, or of several of one length."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()

    @torch.inference_mode()
    def logits(tokens: torch.Tensor) -> torch.Tensor:
        return model(tokens.view(-1, tokens.shape[-1])).logits.view(*tokens.shape, -1)

    return logits


def random_tokens(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB_SIZE, (length,), generator=generator) for length in lengths]


def assert_same(logits_RV: torch.Tensor, expected_RV: torch.Tensor) -> None:
    """Equal to 1e-5 of their size, and the same token first wherever the reference is not in two minds."""
    expected_RV = expected_RV.float()
    torch.testing.assert_close(logits_RV, expected_RV, rtol=1e-5, atol=1e-5 * expected_RV.abs().max().item())
    best_R2 = expected_RV.topk(2).values
    clear_R = best_R2[:, 0] - best_R2[:, 1] > 1e-4
    assert torch.equal(logits_RV.argmax(-1)[clear_R], expected_RV.argmax(-1)[clear_R])


@pytest.fixture(params=VARIANTS)
def folder(request: pytest.FixtureRequest, checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint(request.param)


def test_prefill_and_decode_logits_equal_transformers(folder: Path) -> None:
    """Prompts prefilled side by side, then decoded together, against each of them alone."""
    model = reference(folder, torch.float32)
    paged = Paged(load_model(folder, torch.float32))
    lengths, decoded = (37, 5, 18), 6
    texts = random_tokens(*(length + decoded for length in lengths))
    expected_TV = [model(text) for text in texts]
    sequences = [paged.add() for _ in texts]

    prompts = [text[:length] for text, length in zip(texts, lengths, strict=True)]
    logits_RV = paged.step(list(zip(sequences, prompts, strict=True)), every_row=True)
    assert_same(
        logits_RV,
        torch.cat([rows_TV[:length] for rows_TV, length in zip(expected_TV, lengths, strict=True)]),
    )
    for step in range(decoded):
        at = [length + step for length in lengths]
        logits_RV = paged.step([(s, texts[s][at[s] : at[s] + 1]) for s in sequences])
        assert_same(logits_RV, torch.stack([expected_TV[s][at[s]] for s in sequences]))


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_prefill_in_chunks_beside_a_decode_equals_transformers(
    chunk: int, checkpoint: Callable[[str], Path]
) -> None:
    """One sequence decodes while another one's prompt comes in chunks."""
    folder = checkpoint("qwen2-tied-head-40")
    model = reference(folder, torch.float32)
    paged = Paged(load_model(folder, torch.float32))
    steady_text, prompt = random_tokens(60, 41)
    steady_TV, prompt_TV = model(steady_text), model(prompt)
    steady, growing = paged.add(), paged.add()
    paged.step([(steady, steady_text[:9])])
    for part in prompt.split(chunk):
        at = paged.lens[steady]
        logits_RV = paged.step([(steady, steady_text[at : at + 1]), (growing, part)])
        assert_same(logits_RV, torch.stack((steady_TV[at], prompt_TV[paged.lens[growing] - 1])))


def test_positions_past_the_original_length_are_scaled(checkpoint: Callable[[str], Path]) -> None:
    """Where yarn and llama3 differ most from no scaling: behind the length the model was trained for."""
    for name in ("llama-yarn", "llama-llama3", "llama-linear"):
        folder = checkpoint(name)
        (prompt,) = random_tokens(300)
        paged = Paged(load_model(folder, torch.float32))
        expected_TV = reference(folder, torch.float32)(prompt)
        assert_same(paged.step([(paged.add(), prompt)]), expected_TV[-1:])


def test_a_step_that_samples_nothing_writes_the_cache(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama")
    (prompt,) = random_tokens(20)
    paged = Paged(load_model(folder, torch.float32))
    batch_rows = paged.step([(paged.add(), prompt[:19])])[:0]
    assert batch_rows.shape == (0, VOCAB_SIZE)
    assert_same(paged.step([(0, prompt[19:])]), reference(folder, torch.float32)(prompt)[-1:])


def test_bf16_error_is_at_most_a_quarter_more_than_that_of_transformers(folder: Path) -> None:
    """Teacher-forced, prefill and decode: root-mean-square error of the logits against fp64."""
    prompts_ST = torch.stack(random_tokens(*[32] * 12, seed=2))
    exact_SRV = reference(folder, torch.float64)(prompts_ST)[:, 16:]
    theirs_SRV = reference(folder, torch.bfloat16)(prompts_ST)[:, 16:]

    paged = Paged(load_model(folder, torch.bfloat16), num_blocks=128)
    sequences = [paged.add() for _ in prompts_ST]
    paged.step(list(zip(sequences, prompts_ST[:, :16], strict=True)))
    decoded = [
        paged.step(list(zip(sequences, prompts_ST[:, at : at + 1], strict=True))) for at in range(16, 32)
    ]
    again = [paged.add() for _ in prompts_ST]
    prefilled_TV = paged.step(list(zip(again, prompts_ST, strict=True)), every_row=True)

    def error(logits_SRV: torch.Tensor) -> float:
        return (logits_SRV.double() - exact_SRV).square().mean().sqrt().item()

    allowed = 1.25 * error(theirs_SRV)
    assert error(torch.stack(decoded, dim=1)) <= allowed
    assert error(prefilled_TV.view(*prompts_ST.shape, -1)[:, 16:]) <= allowed
