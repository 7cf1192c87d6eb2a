"""Train the demo checkpoint from text that ``text.py`` makes.

    python engine/demo/train.py OUT [--steps N] [--documents N] [--device cuda|cpu]

OUT becomes a Hugging Face folder. The loss is printed on the way; at the end, the share of questions that the
saved checkpoint answers rightly about stories that it told itself.

Shape letters: B = rows of a batch, T = tokens of a row, N = tokens that carry loss, H = hidden size,
V = vocabulary.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from array import array
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

if not __package__:  # Run as a plain script, maybe from a checkout in which the package is not installed.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / ".src"))

from tidegate.engine.demo import text

VOCABULARY = 2048
CONTEXT = 2048
ROWS = 16
"""Rows of CONTEXT tokens in a batch: many small steps teach copying sooner than few large ones."""

PEAK_LEARNING_RATE = 3e-3
WARM_UP_STEPS = 100
SHARD = 5_000
"""Documents that one worker makes at a time."""

HELD_OUT_SEED = 1_000_000_000
"""Seeds from here on are never trained on."""

# The space before a capital is a piece of its own: a name is then the same token at the start of an answer
# and in the middle of a story, which makes copying it easy.
PIECES = r"[A-Z][a-z]*| ?[a-z]+|\s+(?=[A-Z])|[^\sA-Za-z]+|\s+"

# A system message in front is left out: the model never saw one, and clients often send one unasked.
CHAT_TEMPLATE = """
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] in ['user', 'assistant'] -%}
{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}
{%- elif message['role'] != 'system' or not loop.first -%}
{{- raise_exception("the demo model knows the roles 'user' and 'assistant' (and skips a first 'system')") -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
""".strip()


def train_tokenizer(documents: int) -> Tokenizer:
    """A byte-level BPE over the training text; the four markers are single tokens, ids 0 to 3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    markers = [text.BEGIN, text.USER, text.ASSISTANT, text.END]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=markers,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    contents = (message["content"] for seed in range(documents) for message in text.dialogue(Random(seed)))
    tokenizer.train_from_iterator(contents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{text.BEGIN} $A", special_tokens=[(text.BEGIN, tokenizer.token_to_id(text.BEGIN))]
    )
    return tokenizer


def _encode_shard(tokenizer_json: str, first_seed: int, documents: int) -> bytes:
    """Make and tokenize documents; their ids as one run of 16-bit integers."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # The shards are the parallelism.
    tokenizer = Tokenizer.from_str(tokenizer_json)
    ids = array("h")
    for seed in range(first_seed, first_seed + documents):
        ids.extend(tokenizer.encode(text.document(Random(seed)), add_special_tokens=False).ids)
    return ids.tobytes()


def encode_documents(tokenizer: Tokenizer, first_seed: int, documents: int) -> torch.Tensor:
    """Token ids of so many documents, one after the other, as an int16 vector."""
    seeds = range(first_seed, first_seed + documents, SHARD)
    counts = [min(SHARD, first_seed + documents - seed) for seed in seeds]
    with ProcessPoolExecutor(min(len(counts), os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        shards = pool.map(_encode_shard, repeat(tokenizer.to_str()), seeds, counts)
        return torch.frombuffer(bytearray().join(shards), dtype=torch.int16)


class Corpus:
    """Training tokens on the device, and which of them carry loss."""

    def __init__(self, ids: torch.Tensor, device: torch.device) -> None:
        self.ids = ids.to(device, torch.int32)
        positions = torch.arange(len(ids), device=device)
        is_marker = self.ids < 3  # begin, user, assistant: what follows belongs to whoever they name
        speaker = self.ids[torch.where(is_marker, positions, 0).cummax(0).values]
        # Learn to speak as the assistant, or in a bare story; never as the user.
        self.counts = ~is_marker & (speaker != 1)
        # Every row starts with a document, as every prompt does. Rows are cut off wherever they end.
        begins = (self.ids == 0).nonzero()[:, 0].cpu()
        starts, at = [], 0
        while at + CONTEXT + 1 <= len(ids):
            starts.append(at)
            following = int(torch.searchsorted(begins, at + CONTEXT))
            if following == len(begins):
                break
            at = int(begins[following])
        self.starts = torch.tensor(starts, device=device)

    def batch(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Inputs, targets, and the mask of targets that carry loss; each [B, T]."""
        index_BT = self.starts[rows][:, None] + torch.arange(CONTEXT, device=self.ids.device)
        return self.ids[index_BT], self.ids[index_BT + 1].long(), self.counts[index_BT + 1]


def loss_of(model: LlamaForCausalLM, corpus: Corpus, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats over the tokens that carry loss."""
    ids_BT, targets_BT, counts_BT = corpus.batch(rows)
    device = corpus.ids.device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        hidden_BTH = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
        logits_NV = model.lm_head(hidden_BTH[counts_BT])
        return F.cross_entropy(logits_NV.float(), targets_BT[counts_BT])


def new_model(device: torch.device) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=576,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=3,
        pad_token_id=None,
    )
    with device:
        return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, corpus: Corpus, steps: int) -> None:
    """AdamW under a cosine schedule with warm-up; prints the mean loss of every hundred steps."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=PEAK_LEARNING_RATE,
        betas=(0.9, 0.95),
        fused=True,
    )

    def share_of_peak(step: int) -> float:
        warm = min(1.0, (step + 1) / WARM_UP_STEPS)
        return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_peak)
    order = torch.randperm(len(corpus.starts), device=corpus.ids.device)
    since, losses = time.monotonic(), torch.zeros((), device=corpus.ids.device)
    for step in range(steps):
        rows = torch.arange(step * ROWS, (step + 1) * ROWS, device=order.device) % len(order)
        loss = loss_of(model, corpus, order[rows])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses += loss.detach()
        every = min(100, steps)
        if (step + 1) % every == 0:
            mean = losses.item() / every  # Waits for the device, so the time is taken after it.
            speed = every * ROWS * CONTEXT / (time.monotonic() - since)
            print(f"step {step + 1:5d}  loss {mean:.4f}  {speed:,.0f} tokens/s", flush=True)
            since, losses = time.monotonic(), torch.zeros_like(losses)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, corpus: Corpus) -> float:
    rows = torch.arange(len(corpus.starts), device=corpus.ids.device)
    return sum(loss_of(model, corpus, part).item() for part in rows.split(ROWS)) / len(rows.split(ROWS))


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write the folder: weights in bfloat16, tokenizer, chat template, generation defaults."""
    model.bfloat16()
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=3)
    model.save_pretrained(out)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=text.BEGIN,
        eos_token=text.END,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    ).save_pretrained(out, save_jinja_files=False)


class Chat:
    """Replies from a saved checkpoint."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        # Any: the annotations of transformers do not tell what these two return.
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left", pad_token=text.END)
        model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._model: Any = model.to(device)

    def reply(self, talks: list[list[text.Message]], *, sample: bool = False) -> list[str]:
        """The next reply in each of these conversations: greedy, or sampled at temperature 1."""
        settings = {"do_sample": True, "top_k": 0} if sample else {"do_sample": False}
        replies: list[str] = []
        for at in range(0, len(talks), 256):
            inputs = self._tokenizer.apply_chat_template(
                talks[at : at + 256],
                add_generation_prompt=True,
                padding=True,
                return_tensors="pt",
                return_dict=True,
            ).to(self._model.device)
            ids_BT = self._model.generate(
                **inputs, **settings, max_new_tokens=320, pad_token_id=self._tokenizer.pad_token_id
            )
            prompt_length = inputs["input_ids"].shape[1]
            replies += self._tokenizer.batch_decode(ids_BT[:, prompt_length:], skip_special_tokens=True)
        return replies


@dataclass(frozen=True)
class FollowUp:
    """A question about a story that the model told itself."""

    messages: list[text.Message]
    """The request, the model's story, the question."""
    wanted: str
    answer: str

    def __str__(self) -> str:
        verdict = "" if self.answer == self.wanted else f"   [wanted: {self.wanted}]"
        lines = [f"{message['role']}: {message['content']}" for message in self.messages]
        return "\n".join(["---", *lines, f"assistant: {self.answer}{verdict}"])


def follow_ups(chat: Chat, conversations: int, *, sample: bool = False) -> list[FollowUp]:
    """Let the model tell stories, read their facts, ask about one of each, and collect the greedy answers.

    A story without a readable fact, or with two that contradict each other, is left out.
    """
    rng = Random(HELD_OUT_SEED)
    talks: list[list[text.Message]] = []
    for _ in range(conversations):
        request, _, _ = text.story_request(rng)
        talks.append([{"role": "user", "content": request}])
    asked: list[list[text.Message]] = []
    wanted: list[str] = []
    for talk, story in zip(talks, chat.reply(talks, sample=sample), strict=True):
        facts = text.read_facts(story)
        pair = text.ask_about_story(facts, rng) if facts else None
        if pair:
            asked.append(
                [*talk, {"role": "assistant", "content": story}, {"role": "user", "content": pair[0]}]
            )
            wanted.append(pair[1])
    return [FollowUp(*each) for each in zip(asked, wanted, chat.reply(asked), strict=True)]


def evaluate(chat: Chat, conversations: int, *, sample: bool) -> None:
    """Print how many follow-up answers are exactly right, some conversations, and the wrong answers."""
    asked = follow_ups(chat, conversations, sample=sample)
    wrong = [follow_up for follow_up in asked if follow_up.answer != follow_up.wanted]
    right = len(asked) - len(wrong)
    print(
        f"{'sampled' if sample else 'greedy'} stories: {len(asked)} of {conversations} could be asked about;"
        f" {right} of {len(asked)} answers exact ({right / max(1, len(asked)):.1%})",
        *asked[:4],
        *wrong[:6],
        sep="\n",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo checkpoint.")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--documents", type=int, default=400_000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)

    began = time.monotonic()
    tokenizer = train_tokenizer(min(args.documents, 20_000))
    corpus = Corpus(encode_documents(tokenizer, 0, args.documents), device)
    held_out = Corpus(encode_documents(tokenizer, HELD_OUT_SEED, max(500, args.documents // 200)), device)
    print(
        f"{args.documents:,} documents, {len(corpus.ids):,} tokens in {time.monotonic() - began:.0f} s;"
        f" {len(corpus.starts):,} rows of {CONTEXT}",
        flush=True,
    )

    model = new_model(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    train(model, corpus, args.steps)
    print(f"held-out loss {held_out_loss(model, held_out):.4f} nats a token")
    save(model, tokenizer, args.out)

    chat = Chat(args.out, device)
    conversations = 500 if device.type == "cuda" else 8
    evaluate(chat, conversations, sample=False)
    evaluate(chat, conversations, sample=True)


if __name__ == "__main__":
    main()
