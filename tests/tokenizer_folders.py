"""Model folders that hold no more than a tokenizer, of the kinds that the supported families have."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Encoder

from duomoe.checkpoint import Checkpoint
from duomoe.tokenizer import Tokenizer

WORDS = ("the", "Ġthe", "Ġthere", "Ġ", "ĠĠĠĠ", "ab", "abab", "âĤ¬", "âĤ")


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def byte_level(words: tuple[str, ...] = WORDS) -> Encoder:
    """Return a tokenizer as Qwen's: tokens are pieces of UTF-8, of one byte or more."""
    vocabulary = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    encoder = Encoder(models.BPE(vocab=vocabulary, merges=merges))
    encoder.normalizer = normalizers.NFC()
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    encoder.decoder = decoders.ByteLevel()
    encoder.add_special_tokens([AddedToken("<|end|>", normalized=False)])
    encoder.add_tokens([AddedToken("<think>", normalized=False)])
    return encoder


def byte_fallback() -> Encoder:
    """Return a tokenizer as Llama's and Mixtral's: tokens are text, or single bytes where there is no text."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
    for text in ("▁", "a", "b", "c", "é", "\ufffd", "▁a", "▁ab", "ab", "▁▁"):
        vocabulary[text] = len(vocabulary)
    merges = [("▁", "a"), ("▁a", "b"), ("a", "b"), ("▁", "▁")]
    encoder = Encoder(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    encoder.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    encoder.decoder = decoders.Sequence(steps)
    encoder.add_special_tokens(["<unk>", "<s>", "</s>"])
    return encoder


def fused() -> Encoder:
    """Return a tokenizer whose decoder is byte-level, but says so in two steps."""
    encoder = byte_level()
    encoder.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    return encoder


def metaspace() -> Encoder:
    """Return a tokenizer whose decoder treats the first token of a text differently."""
    encoder = Encoder(models.BPE(vocab={"▁": 0, "a": 1, "▁a": 2, "€": 3, "▁▁": 4}, merges=[("▁", "a"), ("▁", "▁")]))
    encoder.pre_tokenizer = pre_tokenizers.Metaspace()
    encoder.decoder = decoders.Metaspace()
    encoder.add_special_tokens(["<s>"])
    return encoder


def separated() -> Encoder:
    """Return a tokenizer without a decoder: the library puts spaces between tokens."""
    encoder = Encoder(models.WordLevel(vocab={"a": 0, "€": 1, "": 2, " b": 3, "[UNK]": 4}, unk_token="[UNK]"))
    encoder.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder.add_special_tokens(["[UNK]"])
    return encoder


KINDS = {
    "byte_level": byte_level,
    "fused": fused,
    "byte_fallback": byte_fallback,
    "metaspace": metaspace,
    "separated": separated,
}


def save(folder: Path, encoder: Encoder, **config: Any) -> Path:
    """Write a tokenizer into a folder that is otherwise empty of weights."""
    folder.mkdir(exist_ok=True)
    encoder.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | config)
    write_json(folder / "config.json", {"model_type": "qwen3_moe"})
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return folder


def load(folder: Path) -> Tokenizer:
    return Tokenizer(Checkpoint(folder))
