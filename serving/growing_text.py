"""Text that grows token by token."""

from collections.abc import Callable


class GrowingText:
    """What a reader may see of an answer so far, as the pieces by which it grows.

    Half a character is held back until the rest of it comes. `tokenizers.DecodeStream` does this, too, but raises an
    error where a model writes bytes that are no character at all.

    Args:
        decode: token ids to text.
    """

    def __init__(self, decode: Callable[[list[int]], str]):
        self.decode = decode
        self.tokens: list[int] = []
        self.shown = ""

    def add(self, token: int) -> str:
        """The text that this token makes certain, often of earlier tokens."""
        self.tokens.append(token)
        text = self.decode(self.tokens)
        # U+FFFD stands for bytes that are no character, perhaps not yet.
        return "" if text.endswith("\ufffd") else self._show(text)

    def rest(self) -> str:
        """What was held back, at the end."""
        return self._show(self.decode(self.tokens))

    def _show(self, text: str) -> str:
        if not text.startswith(self.shown):
            return ""
        new, self.shown = text[len(self.shown) :], text
        return new
