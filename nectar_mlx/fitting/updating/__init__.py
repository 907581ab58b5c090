"""A fitted text that was changed, fitted again for less than a fit.

append: the new text begins with the old one. The file's heads stay; nodes are fitted for the keys of what is new, and
the two sets merge exactly.
edit: anything else. The file's heads are trained on, on the conversations that the file kept (`fit --keep-study`).

Both read the whole text once, for the full cache is what the result is checked against. Where a fit is the better way,
`update` says why, and fits.
"""

from .decide import Outcome, update

__all__ = ["Outcome", "update"]
