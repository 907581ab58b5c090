"""A fitted text that was changed, fitted again for less than a fit.

append: the new text begins with the old one, and what is new is read and fitted behind the file's heads, which stay as
they are (`append`). edit: anything else; the whole text is read again and all heads are trained on from where they are,
on the conversations that the file kept (`edit`; on a GPU appends are made so, too). Where a fit is the better way,
`update` says why, and fits.
"""

from .decide import Outcome, update

__all__ = ["Outcome", "update"]
