"""What users are told of their mistakes."""

import pytest

from duomoe.errors import InputError, naming_failures


def test_a_message_is_a_line_that_a_terminal_can_show() -> None:
    assert str(InputError("a\n b\t\x1b[2J é\ud800\u202e")) == "a b \ufffd[2J é\ufffd\ufffd"
    assert len(str(InputError("long " * 10**6))) < 2010


@pytest.mark.parametrize(("error", "text"), [(Exception("no"), "it fails: no"), (TypeError(), "it fails: TypeError")])
def test_failures_are_named(error: Exception, text: str) -> None:
    with pytest.raises(InputError) as found, naming_failures("it fails"):
        raise error
    assert str(found.value) == text


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), InputError("mine")])
def test_what_is_no_failure_passes(error: BaseException) -> None:
    with pytest.raises(type(error)) as found, naming_failures("it fails"):
        raise error
    assert found.value is error
