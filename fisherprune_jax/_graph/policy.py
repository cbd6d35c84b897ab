"""What becomes of masks."""

import enum


class MaskPolicy(enum.Enum):
  """What becomes of masks in the compact program."""

  DROP = "drop"
  """Nothing is multiplied by them: they are one on all that is left."""
  MULTIPLY = "multiply"
  """Multiplied, by the masks that the program was made with: some dead features stay."""
  KEEP = "keep"
  """Multiplied, by masks among the variables: pruning can go on."""

  @property
  def multiplies(self) -> bool:
    """Whether the program multiplies by masks."""
    return self is not MaskPolicy.DROP
