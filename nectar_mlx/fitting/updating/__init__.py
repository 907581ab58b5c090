"""A fitted text that was changed, fitted again for less than a fit.

append: the new text begins with the old one. edit: anything else, on the conversations that the file kept
(`fit --keep-study`). In both the file's heads are trained on from where they are, with nodes for the new tokens in the
place of those that are used the least.

Both read the whole text once, for the full cache is what the result is checked against. Where a fit is the better way,
`update` says why, and fits.
"""

from .decide import Outcome, update

__all__ = ["Outcome", "update"]
