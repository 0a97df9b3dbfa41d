"""The text of tokens that are still being drawn: never more than later tokens leave as it is."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from picotron_core.data.tokenizer import Tokenizer

# Decoders whose text only grows when a token is added, but for a character that is not complete.
_GROWING = {"ByteLevel", "ByteFallback", "Metaspace", "WordPiece", "BPEDecoder", "Fuse", "Replace"}
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>\Z")


class Detokenizer:
    """Prompt and continuation as one text, as transformers' `decode` with skip_special_tokens gives
    it, handed out in pieces that are never taken back.

    The first token of a text is often decoded in another way than a later one, so that a
    continuation by itself would lose its leading space.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.ids = list(prompt_ids)
        self.shown = ""
        self.grows = not tokenizer.clean_up and _grows(_decoder(tokenizer))

    def add(self, *tokens: int) -> str:
        """The text that is certain now and was not before."""
        self.ids += tokens
        if not self.grows:
            return ""
        text = self._decode(self._without_open_bytes())
        return self._rest(text.rstrip("\N{REPLACEMENT CHARACTER}"))

    def end(self) -> str:
        """The rest of the text, with U+FFFD for a character that was left incomplete."""
        return self._rest(self._decode(self.ids))

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _rest(self, text: str) -> str:
        new = text[len(self.shown) :]
        self.shown += new
        return new

    def _without_open_bytes(self) -> list[int]:
        """The tokens before the bytes at the end: where these are not UTF-8 together with the ones
        that follow, every byte of them becomes U+FFFD, also those of a character that was whole.
        """
        end = len(self.ids)
        while end and self._may_join_bytes(self.ids[end - 1]):
            end -= 1
        return self.ids[:end]

    def _may_join_bytes(self, token: int) -> bool:
        """Whether it is a byte, or is left out of the text and stands between bytes."""
        text = self.tokenizer.backend.id_to_token(token)
        return text is None or bool(_BYTE.match(text)) or not self._decode([token])


def _decoder(tokenizer: Tokenizer) -> dict[str, Any] | None:
    decoder = tokenizer.backend.decoder
    found: dict[str, Any] | None = None if decoder is None else json.loads(decoder.__getstate__())
    return found


def _grows(decoder: dict[str, Any] | None) -> bool:
    """Whether a longer sequence's text begins with the text of its beginning."""
    if decoder is None:
        return True  # tokens with a space between them
    if decoder["type"] == "Sequence":
        fused = False
        for part in decoder["decoders"]:
            # After Fuse the text is one piece: what is replaced there may reach over its end.
            if fused and part["type"] == "Replace" and len(part["pattern"].get("String", "")) != 1:
                return False
            fused |= part["type"] == "Fuse"
        return all(map(_grows, decoder["decoders"]))
    if decoder["type"] == "Strip":
        return bool(decoder["stop"] == 0)  # at the end of the text it takes away what was shown
    return decoder["type"] in _GROWING
