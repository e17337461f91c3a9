"""What all messages between daemons share: the strictness of their models, and bounded types."""

from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

_LONG_TEXT_CHARACTERS: Final = 8192
_SHORT_TEXT_CHARACTERS: Final = 1024

Name = Annotated[str, Field(min_length=1, max_length=253)]
Text = Annotated[str, Field(max_length=_LONG_TEXT_CHARACTERS)]
ShortText = Annotated[str, Field(max_length=_SHORT_TEXT_CHARACTERS)]


class WireModel(BaseModel):
    model_config = ConfigDict(
        extra="ignore",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


def shortened(text: str | None) -> str | None:
    """Text of any origin, made to fit a message: bounded, and valid Unicode."""
    return None if text is None else _cut(text, _LONG_TEXT_CHARACTERS)


def cut(text: str) -> str:
    """The same for a sentence (ShortText)."""
    return _cut(text, _SHORT_TEXT_CHARACTERS)


def _cut(text: str, characters: int) -> str:
    sound = text.encode(errors="replace").decode()
    return sound if len(sound) <= characters else sound[: characters - 1] + "…"
