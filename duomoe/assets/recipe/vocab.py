"""Train the byte-level BPE tokenizer of the embedded model and turn the corpus into token arrays.

    python vocab.py --corpus ./corpus --out ./model

writes ``tokenizer.json`` and ``tokenizer_config.json``.
"""

from __future__ import annotations

import argparse
import json
import lzma
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
VOCAB_SIZE = 4096
CONTEXT = 4096

Tokens = NDArray[np.uint16]


def read_domain(corpus: Path, domain: str, part: str) -> str:
    """Text of one domain's ``train`` or ``heldout`` part, from ``.txt`` or ``.txt.xz``."""
    plain = corpus / f"{domain}.{part}.txt"
    if plain.exists():
        return plain.read_text(encoding="utf-8")
    return lzma.decompress(plain.with_suffix(".txt.xz").read_bytes()).decode("utf-8")


def read_corpus(corpus: Path, part: str) -> dict[str, str]:
    """Texts of all domains, in the order of the manifest (lzma releases the GIL, so threads help)."""
    domains: list[str] = list(json.loads((corpus / "manifest.json").read_text())["domains"])
    with ThreadPoolExecutor() as pool:
        texts = pool.map(lambda domain: read_domain(corpus, domain, part), domains)
    return dict(zip(domains, texts, strict=True))


def train_tokenizer(texts: dict[str, str], bytes_per_domain: int = 4_000_000) -> Tokenizer:
    """Byte-level BPE over an equal amount of text from every domain."""

    def sample() -> Iterator[str]:
        for text in texts.values():
            stride = max(1, len(text) // bytes_per_domain)
            pieces = [text[start : start + 20_000] for start in range(0, len(text), 20_000 * stride)]
            yield from (piece.replace(END_OF_TEXT, "\n") for piece in pieces)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample(), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> Tokens:
    """Tokens of a text of several documents, each followed by the end-of-text token."""
    documents = text.split(END_OF_TEXT)
    arrays: list[Tokens] = []
    for start in range(0, len(documents), 256):
        for encoding in tokenizer.encode_batch_fast(documents[start : start + 256], add_special_tokens=False):
            arrays.append(np.asarray([*encoding.ids, END_OF_TEXT_ID], dtype=np.uint16))
    return np.concatenate(arrays)


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Write the two tokenizer files of the Hugging Face layout."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "chat_stop_strings": ["\n\n"],  # chat_template.jinja writes a conversation as a play
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    """Train the tokenizer and report how many bytes a token covers in each domain."""
    parser = argparse.ArgumentParser(description="Train the tokenizer of the embedded model.")
    parser.add_argument("--corpus", type=Path, default=Path("corpus"))
    parser.add_argument("--out", type=Path, default=Path("model"))
    arguments = parser.parse_args()
    tokenizer = train_tokenizer(read_corpus(arguments.corpus, "train"))
    save_tokenizer(tokenizer, arguments.out)
    for domain, text in read_corpus(arguments.corpus, "heldout").items():
        tokens = encode(tokenizer, text)
        print(f"{domain:11s} {len(text.encode()) / len(tokens):.3f} bytes per token")


if __name__ == "__main__":
    main()
