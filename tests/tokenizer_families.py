"""Small tokenizers of each family, trained on made-up prose."""

from __future__ import annotations

import random
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SYLLABLES = [a + b for a in "bcdlmnrst" for b in ("a", "e", "io", "us", "ing", "er")]


def prose(words: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    return " ".join(
        "".join(draw.choices(SYLLABLES, k=draw.randint(1, 4))) + draw.choice(["", "", "", ",", ".\n", "'s"])
        for _ in range(words)
    )


def byte_level() -> Tokenizer:
    """As GPT-2 and SmolLM2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    train(tokenizer, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False))
    return tokenizer


def unsplit_bpe() -> Tokenizer:
    """As Llama 2 and Gemma: the text is one word, with a mark put before it and unknown characters fused."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    train(tokenizer, trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>"], show_progress=False))
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def unigram() -> Tokenizer:
    """As T5 and XLM-RoBERTa."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    train(
        tokenizer,
        trainers.UnigramTrainer(vocab_size=400, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False),
    )
    return tokenizer


def word_piece() -> Tokenizer:
    """As BERT."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    train(tokenizer, trainers.WordPieceTrainer(vocab_size=500, special_tokens=["<unk>"], show_progress=False))
    return tokenizer


def counting() -> Tokenizer:
    """Cuts words of 7 characters, counted from the text's beginning: pieces of it never agree but by luck."""
    tokenizer = Tokenizer(
        models.WordLevel({"<unk>": 0, **{f"{letter}": i for i, letter in enumerate("abc", 1)}}, "<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.FixedLength(length=7)
    return tokenizer


def train(tokenizer: Tokenizer, trainer: Any) -> None:
    tokenizer.train_from_iterator([prose(3000, seed) for seed in range(3)], trainer)
