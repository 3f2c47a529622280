"""Text in and out: texts begin and end as the model's tokenizer and configuration say, and new text is the text."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_cli import WORDS as SOME_WORDS
from test_cli import run, texts
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from longmem import Backbone, LongMem, LongMemConfig
from longmem.backbones.load import load_backbone
from longmem.data.documents import Document
from longmem.data.stream import tokenize_documents
from longmem.text import NewText, opening_tokens, sampling_options, stop_tokens

__all__ = ["texts"]  # a fixture
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_end|>"]
WORDS = {word: i for i, word in enumerate([*SPECIAL, *SOME_WORDS[:60]])}


def fast(tokenizer: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def word_tokenizer(template: str | None = None, words: dict[str, int] = WORDS, **options: Any) -> Any:
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template is not None:
        named = [(token, words[token]) for token in SPECIAL]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=named)
    return fast(tokenizer, **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | options)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose tokenizer puts "<s>" before a text and "</s>" behind it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    word_tokenizer("<s> $A </s>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.2)
    model.save_pretrained(folder)
    return folder


def untrained(backbone: Path, out: Path) -> Path:
    frozen, _ = load_backbone(str(backbone))
    config = LongMemConfig(memory_layers=(1,), segment=64, memory_tokens=64)
    LongMem(frozen, config).save_pretrained(out)
    return out


def shown(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What `longmem generate` writes."""
    capsys.readouterr()
    assert run("generate", *arguments) == 0
    return capsys.readouterr().out


# How texts begin


@pytest.mark.parametrize(
    ("tokenizer", "wanted"),
    [
        (word_tokenizer(), []),
        (word_tokenizer("<s> $A"), [1]),
        (word_tokenizer("$A </s>"), []),
        (word_tokenizer("<s> <|im_end|> $A </s> </s>"), [1, 3]),
        (word_tokenizer("<unk> $A <unk>", bos_token="<unk>", eos_token="<unk>"), [0]),
        (word_tokenizer(add_bos_token=True, add_eos_token=True), [1]),
    ],
)
def test_opening_tokens_are_those_before_a_text(tokenizer: Any, wanted: list[int]) -> None:
    assert opening_tokens(tokenizer) == wanted
    long = " ".join(SOME_WORDS[:60] * 100)
    (ids,), _ = tokenize_documents([Document("d", long)], tokenizer)
    plain = tokenizer(long, add_special_tokens=False)["input_ids"]
    assert ids.tolist() == [*wanted, *plain]
    (ids,), _ = tokenize_documents([Document("d", long)], tokenizer, add_special_tokens=False)
    assert ids.tolist() == plain


def test_a_text_that_has_them_gets_no_second_ones_and_an_empty_one_none() -> None:
    tokenizer = word_tokenizer("<s> $A")
    kept, skipped = tokenize_documents([Document("a", "<s> w1"), Document("b", " \n")], tokenizer)
    assert [ids.tolist() for ids in kept] == [[1, WORDS["w1"]]] and [item.name for item in skipped] == ["b"]


def test_special_tokens_that_cannot_be_told_apart_are_named() -> None:
    words = {word: WORDS[word] for word in SPECIAL}
    with pytest.raises(ValueError, match=r"cannot tell what .* puts before a text"):
        opening_tokens(word_tokenizer("<s> <unk> <|im_end|> $A </s>", words))


def test_every_command_reads_texts_as_the_tokenizer_begins_them(
    backbone: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[torch.Tensor] = []
    encode = Backbone.encode

    def spy(self: Backbone, tokens: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        read.append(tokens.flatten())
        return encode(self, tokens, *arguments, **options)

    monkeypatch.setattr(Backbone, "encode", spy)

    def special(*arguments: str | Path) -> set[int]:
        """The special tokens that the command read beside "<unk>"."""
        read.clear()
        assert run(*arguments) == 0
        return {1, 2, 3} & set(torch.cat(read).tolist())

    small = ["--backbone", backbone, "--data", texts, "--segment", "16", "--memory-tokens", "64", "--steps", "2"]
    probe = ["probe-layers", *small, "--rows", "2", "--layer", "1", "--score-from", "64"]
    probe += ["--document-tokens", "160", "--held-out", "2"]
    for choice, wanted in (("auto", {1}), ("none", set())):
        out = tmp_path / choice
        more = [] if choice == "auto" else ["--special-tokens", choice]
        assert special("train", *small, "--rows", "2", "--out", out, *more) == wanted
        assert json.loads((out / "config.json").read_text())["config"]["special_tokens"] == choice
        measure = ["eval", "--run", out, "--data", texts, "--score-from", "64", "--document-tokens", "160"]
        assert special(*measure) == special(*measure, "--full-context", "64") == wanted
        remember = ["generate", "--run", out, "--remember", texts / "0.txt", "--max-new-tokens", "0", "--prompt", "w1"]
        assert special(*remember) == wanted
        assert special(*remember, "--special-tokens", "auto") == {1}
        assert special(*remember, "--special-tokens", "none") == set()
        assert special(*probe, "--out", out / "probe", *more) == wanted


def test_a_run_from_before_special_tokens_goes_on_without(backbone: Path, tmp_path: Path) -> None:
    values = LongMemConfig(memory_layers=(1,)).to_dict()
    del values["special_tokens"]
    assert LongMemConfig.from_dict(values).special_tokens == "none"
    with pytest.raises(ValueError, match="special_tokens must be one of auto, none, got 'some'"):
        LongMemConfig(memory_layers=(1,), special_tokens="some").check(3)


@pytest.mark.parametrize("prompt", ["w1 w2", ""])
def test_a_prompt_is_continued_as_transformers_continues_it(
    prompt: str, backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(backbone), AutoModelForCausalLM.from_pretrained(backbone)
    ids = torch.tensor([[1, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
    out = model.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)[0]
    wanted = tokenizer.decode(out[1:])
    assert wanted.startswith(prompt) and len(wanted.split()) == len(prompt.split()) + 10
    arguments = ["--run", untrained(backbone, tmp_path / "run"), "--prompt", prompt, "--temperature", "0"]
    assert shown(capsys, *arguments, "--max-new-tokens", "10", "--ignore-eos") == wanted + "\n"


# What ends them


def test_stop_tokens_are_all_that_anybody_names() -> None:
    tokenizer = word_tokenizer(extra_special_tokens={"eot_token": "<|im_end|>"})
    assert stop_tokens(tokenizer) == {2, 3}
    assert stop_tokens(SimpleNamespace(eos_token_id=[7, 8]), SimpleNamespace(eos_token_id=None), tokenizer) == {
        2,
        3,
        7,
        8,
    }
    assert stop_tokens() == stop_tokens(word_tokenizer(eos_token=None)) == set()


def test_generation_ends_at_every_stop_token_and_stop_text(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "model"
    shutil.copytree(backbone, moved)
    arguments = ["--run", untrained(moved, tmp_path / "run"), "--prompt", "w1 w2", "--temperature", "0"]
    arguments += ["--max-new-tokens", "12"]
    free = shown(capsys, *arguments, "--ignore-eos").split(" ")
    for place in (4, 6):
        end = free[place].strip()
        first = free.index(end, 2)
        about = {"eos_token_id": [2, WORDS[end]]}
        (moved / "generation_config.json").write_text(json.dumps(about))
        assert shown(capsys, *arguments).rstrip("\n") == " ".join(free[:first]), "without the token that ended it"
        (moved / "generation_config.json").unlink()
        stopped = shown(capsys, *arguments, "--ignore-eos", "--stop", "never", "--stop", " " + end)
        assert stopped.rstrip("\n") == " ".join(free[:first])
    for wrong, message in (
        (["--stop", ""], "a stop string must not be empty"),
        (["--prompt", "w1 caf\udce9"], "the prompt is not UTF-8, from character 6"),
        (["--prompt", " ", "--special-tokens", "none"], "holds no token"),
        (["--top-k", "-1"], "'--top-k'"),
    ):
        assert run("generate", *arguments, *wrong) != 0
        assert message in capsys.readouterr().err


def test_the_generation_configuration_says_how_to_sample() -> None:
    config = SimpleNamespace(do_sample=True, temperature=0.3, top_p=None, top_k=20, repetition_penalty=1.1)
    assert sampling_options(config) == {"temperature": 0.3, "top_k": 20, "repetition_penalty": 1.1}
    assert sampling_options(config, temperature=0, top_p=0.5, top_k=None) == {
        "temperature": 0, "top_p": 0.5, "top_k": 20, "repetition_penalty": 1.1,
    }  # fmt: skip
    config.do_sample = False
    assert sampling_options(config) == {"repetition_penalty": 1.1} and sampling_options(None) == {}


# New text


def byte_level() -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*alphabet, "</s>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return fast(tokenizer, eos_token="</s>", clean_up_tokenization_spaces=True)


def byte_fallback() -> Any:
    letters = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefgh", "▁the", "▁cat"]
    words = {word: i for i, word in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(words, [], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(spaces)
    return fast(tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def sentencepiece() -> Any:
    pieces = [(piece, -i / 10) for i, piece in enumerate(["<unk>", "</s>", "▁the", "▁cat", *"abcdefgh▁"])]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return fast(tokenizer, unk_token="<unk>", eos_token="</s>")


def word_pieces() -> Any:
    pieces = ["[UNK]", "the", "cat", "##s", "##n't", *".,!'", "do", "n", "t", "##ing"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return fast(tokenizer, unk_token="[UNK]", clean_up_tokenization_spaces=True)


def cleaned_words() -> Any:
    words = [*SPECIAL, "do", "it", *".,?!'", "n", "t", "n't", "s", "'s", "'ve", "m"]
    return word_tokenizer(None, {word: i for i, word in enumerate(words)}, clean_up_tokenization_spaces=True)


TOKENIZERS = {
    make.__name__: make
    for make in (byte_level, byte_fallback, sentencepiece, word_pieces, cleaned_words, word_tokenizer)
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_are_together_the_text_of_the_new_tokens(name: str) -> None:
    """Of any tokens behind any prompt: unfinished characters, broken bytes, special tokens, joined spaces."""
    tokenizer, choose = TOKENIZERS[name](), random.Random(0)
    readable = [i for i in range(len(tokenizer)) if "\ufffd" not in tokenizer.decode([i])]
    for length in [*range(40), *[60] * 20, 300, 600]:
        prompt = choose.choices(readable, k=choose.choice([0, 1, 2, 50]))
        new = choose.choices(range(len(tokenizer)) if length % 2 else readable, k=length)
        text = NewText(tokenizer, prompt)
        pieces = [*(text.put(token) for token in new), text.end()]
        before = len(tokenizer.decode(prompt)) if prompt else 0
        assert "".join(pieces) == tokenizer.decode(prompt + new)[before:], (prompt, new)
        assert text.end() == ""


def test_text_is_given_out_as_soon_as_it_is_certain() -> None:
    tokenizer = byte_level()
    text = NewText(tokenizer)
    assert [text.put(token) for token in tokenizer("aé😀 b")["input_ids"]] == ["a", "", "é", "", "", "", "😀", " ", "b"]
    assert text.put(tokenizer("é")["input_ids"][0]) == "" and text.end() == "\ufffd"
    words = word_tokenizer()
    text = NewText(words, words("w1")["input_ids"])
    assert [text.put(token) for token in words("w2 w3")["input_ids"]] == [" w2", " w3"]


@pytest.mark.parametrize(
    ("normalizer", "prompt"),
    [
        (None, "w1  w2   w3 "),
        (normalizers.NFC(), "w1 cafe\u0301 e\u0301a w2"),
        (normalizers.NFKC(), "w1 \ufb01ne w2"),
        (normalizers.Lowercase(), "W1 W2"),
    ],
)
def test_a_prompt_is_shown_as_it_was_given(
    normalizer: Any, prompt: str, backbone: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(backbone, folder)
    tokenizer = word_tokenizer("<s> $A")
    if normalizer is not None:
        tokenizer.backend_tokenizer.normalizer = normalizer
    tokenizer.save_pretrained(folder)
    out = untrained(folder, tmp_path / "run")
    model = LongMem.from_pretrained(out)
    ids = tokenizer(prompt)["input_ids"]
    new = [int(token) for token in model.generate(torch.tensor([ids]), max_new_tokens=8)]
    wanted = prompt + tokenizer.decode(ids + new)[len(tokenizer.decode(ids)) :] + "\n"
    arguments = ["--run", out, "--prompt", prompt, "--max-new-tokens", "8", "--temperature", "0", "--ignore-eos"]
    assert run("generate", *arguments) == 0
    assert capfdbinary.readouterr().out == wanted.encode()
