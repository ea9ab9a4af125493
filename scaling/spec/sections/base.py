"""What all sections share: bounded numbers, and how strict they are."""

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1, le=2**40)]
"""A positive whole number, bounded so that products of a few of them stay exact and finite."""
Size = Annotated[int, Field(ge=1, le=2**24)]
"""One extent of a tensor: width, heads, layers, tokens."""
Elements = Annotated[int, Field(ge=0, le=2**40)]
"""A number of tensor elements (not bytes), as DeepSpeed counts its buckets."""
Positive = Annotated[float, Field(gt=0, le=1e6)]
NonNegative = Annotated[float, Field(ge=0, le=1e6)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1, max_length=4096)]
Auto = Literal["auto"]
Target = Annotated[str, Field(max_length=500, pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")]
"""A function in a module: "package.module:function"."""


class Section(BaseModel):
    """What all parts of a spec share: frozen, strict, finite, unknown keys refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    def contradictions(self) -> Iterator[str]:
        """What the fields, each right by itself, get wrong together: a message each, naming fields of this section."""
        return iter(())

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if found := list(self.contradictions()):
            raise ValueError("\n".join(found))  # all at once; the reader of the error splits them
        return self


def divisors(value: int) -> list[int]:
    """All up to 4,096, ascending."""
    return [d for d in range(1, min(value, 4096) + 1) if value % d == 0]
