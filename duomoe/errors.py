"""The one exception for what a user can mend."""

# As much as a screen of text shows.
LONGEST_MESSAGE = 1500


class InputError(ValueError):
    """What the user gave (a folder, a file, an option, a prompt) cannot be used; the message is one line that says why.

    The command-line tools print it and exit with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(message: str) -> str:
    """Return a message as one line, no longer than a screen, of characters that only show themselves."""
    line = " ".join(message[: 10 * LONGEST_MESSAGE].split())
    if len(line) > LONGEST_MESSAGE:
        line = f"{line[: LONGEST_MESSAGE * 2 // 3]} … {line[-LONGEST_MESSAGE // 3 :]}"
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in line)
