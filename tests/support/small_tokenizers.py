"""Tokenizers small enough to make in a test, of the two kinds that checkpoints have."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SAMPLE = (
    "The tide comes in and the tide goes out. Ebbe und Flut, Prüfung, naïve café. "
    "潮が満ちて、潮が引く。 Прилив и отлив. 👩‍🚀🌊🚢 e\u0301 \t\n"
)
EOS = "<|end|>"
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('unknown role ' + m['role']) }}{% endif %}"
    "<|start|>{{ m['role'] }}: {{ m['content'] + '' }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant: {% endif %}"
)


def byte_level_tokenizer() -> Tokenizer:
    """A byte-level BPE with few merges, so that most characters beyond ASCII take several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["<|start|>", EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SAMPLE] * 4, trainer)
    tokenizer.add_tokens([AddedToken("Flut-Ebbe 潮", normalized=False)])
    return tokenizer


def byte_fallback_tokenizer() -> Tokenizer:
    """In the manner of SentencePiece: a space is part of a word, unknown characters are byte tokens."""
    words = ["▁", "▁the", "▁tide", "▁comes", "s", "in", "▁out", ".", "a", "b", "t", "h", "e"]
    vocab = {"<unk>": 0, EOS: 1} | {f"<0x{byte:02X}>": byte + 2 for byte in range(256)}
    for word in words:
        vocab[word] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    tokenizer.add_special_tokens([EOS])
    return tokenizer


def letter_tokenizer() -> Tokenizer:
    """Six tokens that spell ``a``, ``b``, ``c``, ``ab``, ``ca`` and nothing."""
    vocab = {"a": 0, "b": 1, "c": 2, "ab": 3, "ca": 4, "": 5}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=""))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer
