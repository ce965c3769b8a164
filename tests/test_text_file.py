"""Text files: what is read through a pipe, and what is never waited for."""

import os
import threading
from pathlib import Path

import pytest
from tokenizer_folders import byte_level, load, save
from within_time import within_time

from duomoe.chat_template import ChatTemplate
from duomoe.checkpoint import Checkpoint
from duomoe.errors import InputError
from duomoe.text_file import read_text


def test_only_who_says_so_reads_from_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with within_time("a pipe without a writer"), pytest.raises(InputError, match="not a regular file"):
        read_text(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=["hello"])
    writer.start()
    assert read_text(tmp_path / "pipe", piped=True) == "hello"
    writer.join()


@pytest.mark.parametrize("piped", [False, True])
def test_what_cannot_be_read_is_said_in_one_line(piped: bool, tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff")
    for path in (tmp_path, tmp_path / "none", tmp_path / "bytes", Path("a\0b"), Path("/dev/zero")):
        with within_time(str(path)), pytest.raises(InputError) as caught:
            read_text(path, piped=piped)
        assert str(caught.value).isprintable()


def test_a_model_folder_has_no_pipes_for_templates(tmp_path: Path) -> None:
    folder = save(tmp_path, byte_level())
    (folder / "additional_chat_templates").mkdir()
    os.mkfifo(folder / "additional_chat_templates" / "tool_use.jinja")
    template = ChatTemplate(Checkpoint(folder), load(folder))
    with within_time("a pipe for a template"), pytest.raises(InputError, match="not a regular file"):
        _ = template.templates
