"""A fitted text that was changed, fitted again for less than a fit.

append: the new text begins with the old one, and what is new is read and fitted behind the file's heads, which stay as
they are (`append`). edit: anything else; the whole text is read again and all heads are trained on from where they are,
on the conversations that the file kept (`edit`; appends are made so, too, where that takes a GPU less than a minute).
Where a fit is the better way, it is a fit (`plan`), and `update` says why.
"""

from .outcome import Outcome, update

__all__ = ["Outcome", "update"]
