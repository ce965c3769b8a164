"""Special tokens that a folder names outside tokenizer.json: as transformers reads them."""

from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizer_folders import byte_fallback, byte_level, load, save, write_json

from duomoe.errors import InputError

MARK = {"content": "<|im_start|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
TYPED = MARK | {"__type": "AddedToken"}

# Each case: tokenizer_config.json, and the other files by name.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing": ({}, {}),
    "named": ({"bos_token": "<s>", "eos_token": "<|end|>", "pad_token": None}, {}),
    "named_typed": ({"bos_token": TYPED, "eos_token": "<|end|>"}, {}),
    "numbered": (
        {"added_tokens_decoder": {"300": MARK | {"special": True}, "301": MARK | {"content": "<x>", "special": False}}},
        {},
    ),
    "numbered_out_of_order": (
        {"added_tokens_decoder": {"310": MARK | {"special": True}, "305": MARK | {"content": "<y>", "special": True}}},
        {},
    ),
    "think_becomes_special": ({"added_tokens_decoder": {"280": MARK | {"content": "<think>", "special": True}}}, {}),
    "end_becomes_plain": ({"added_tokens_decoder": {"279": MARK | {"content": "<|end|>", "special": False}}}, {}),
    "named_among_numbered": (
        {"eos_token": "<|im_start|>", "added_tokens_decoder": {"300": MARK | {"special": False}}},
        {},
    ),
    "strips": ({"added_tokens_decoder": {"300": MARK | {"special": True, "lstrip": True, "rstrip": True}}}, {}),
    "additional": ({"additional_special_tokens": ["<a>", "<b>"]}, {}),
    "extra_list": ({"extra_special_tokens": ["<a>", "<b>"], "additional_special_tokens": ["<c>"]}, {}),
    "extra_named": ({"extra_special_tokens": {"image_token": "<img>", "sep_of_mine": "<m>"}, "video_token": "<v>"}, {}),
    "own_name": ({"image_token": "<img>", "add_bos_token": True}, {}),
    "map": ({}, {"special_tokens_map.json": {"bos_token": "<s>", "eos_token": MARK, "pad_token": "<|end|>"}}),
    "map_over_config": ({"eos_token": "<|end|>"}, {"special_tokens_map.json": {"eos_token": "<|im_start|>"}}),
    "map_ignored": ({"added_tokens_decoder": {}}, {"special_tokens_map.json": {"eos_token": "<|im_start|>"}}),
    "map_additional": ({}, {"special_tokens_map.json": {"additional_special_tokens": ["<a>", "<b>"]}}),
    "map_extra": (
        {"extra_special_tokens": ["<a>"]},
        {"special_tokens_map.json": {"extra_special_tokens": ["<a>", MARK | {"content": "<b>"}]}},
    ),
    "map_own_name": ({"image_token": "<i>"}, {"special_tokens_map.json": {"video_token": MARK, "image_token": "<j>"}}),
    "added_file": ({"eos_token": "<b>"}, {"added_tokens.json": {"<a>": 290, "<b>": 291}}),
    "added_file_ignored": ({"added_tokens_decoder": {}}, {"added_tokens.json": {"<a>": 290}}),
    "added_file_and_map": (
        {},
        {
            "added_tokens.json": {"<a>": 290, "<b>": 289},
            "special_tokens_map.json": {"additional_special_tokens": ["<a>"]},
        },
    ),
}

TEXT = "the <|im_start|> there <x><y> <think>€</think> <a><b> <s>ab<|end|> <img><m><v><i><j> <c>"


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@pytest.mark.parametrize("case", CASES)
def test_as_transformers(tmp_path: Path, make: Any, case: str) -> None:
    config, files = CASES[case]
    folder = save(tmp_path, make(), **config)
    for name, content in files.items():
        write_json(folder / name, content)
    expected, found = transformers.PreTrainedTokenizerFast.from_pretrained(folder), load(folder)
    assert found.variables == expected.special_tokens_map
    assert found.encoder.get_vocab() == expected.get_vocab()
    for special in (True, False):
        assert found.encode(TEXT, special) == expected.encode(TEXT, add_special_tokens=special)
    ids = found.encode(TEXT)
    assert found.decode(ids) == expected.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "mixtral"])
@pytest.mark.parametrize("kind", [None, "Qwen2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("config", [{}, {"unk_token": None, "eos_token": "<|end|>"}])
def test_names_that_the_folder_does_not_mention(
    tmp_path: Path, family: str, kind: str | None, config: dict[str, Any]
) -> None:
    """What they are by default depends on the class that transformers takes."""
    folder = save(tmp_path, byte_level(), tokenizer_class=kind, **config)
    write_json(folder / "config.json", {"model_type": family})
    expected, found = transformers.AutoTokenizer.from_pretrained(folder), load(folder)
    assert found.variables == expected.special_tokens_map
    assert found.encoder.get_vocab() == expected.get_vocab()


def test_padding_and_truncation_are_off(tmp_path: Path) -> None:
    encoder = byte_level()
    plain = encoder.encode("the there ab").ids
    encoder.enable_truncation(2)
    encoder.enable_padding(length=30)
    assert load(save(tmp_path, encoder)).encode("the there ab") == plain


@pytest.mark.parametrize(
    ("config", "files"),
    [
        ({"bos_token": 5}, {}),
        ({"bos_token": {"content": 5}}, {}),
        ({"added_tokens_decoder": {"x": MARK}}, {}),
        ({"added_tokens_decoder": ["a"]}, {}),
        ({"added_tokens_decoder": None}, {}),
        ({"additional_special_tokens": 5}, {}),
        ({"additional_special_tokens": [5]}, {}),
        ({}, {"added_tokens.json": {"<a>": "x"}}),
        ({}, {"added_tokens.json": ["<a>"]}),
        ({}, {"special_tokens_map.json": "bos"}),
    ],
)
def test_what_is_no_token_is_named(tmp_path: Path, config: dict[str, Any], files: dict[str, Any]) -> None:
    folder = save(tmp_path, byte_level(), **config)
    for name, content in files.items():
        write_json(folder / name, content)
    with pytest.raises(InputError):
        load(folder)
