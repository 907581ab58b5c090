"""A fitted text that was changed, fitted again for less than a fit.

append: the new text begins with the old one. Nodes for its keys are put beside the file's own, and all are trained for
a short time.
edit: anything else. The file's heads are trained on, on the conversations that the file kept (`fit --keep-study`).

Both read the whole text once, for the full cache is what the result is checked against. Where a fit is the better way,
`update` says why, and fits.
"""

from .decide import Outcome, update

__all__ = ["Outcome", "update"]
