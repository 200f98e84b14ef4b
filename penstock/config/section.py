"""What every section of the configuration has in common.

`config/schema.py` and the modules it gathers sections from build on it. It must never know a key.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Settings shared by every section: immutable, and unknown keys are errors."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        populate_by_name=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )


Probability = Annotated[float, Field(ge=0, lt=1)]
"""A number from 0 up to, not including, 1."""
Share = Annotated[float, Field(ge=0)]
"""A part of a whole, in relation to the other parts."""
PositiveShare = Annotated[float, Field(gt=0)]
"""The same, where there must be something."""
