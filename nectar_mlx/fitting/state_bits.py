"""How many bits a recurrent state is kept in: as few as change the answers by no more than `LOSS`.

The state behind a text is as large whatever the text's length: in float32 it can be more than all heads. It is coded
once, at the end of a fit; while heads are fitted, conversations continue from the state itself.
"""

from dataclasses import replace

from ..core.types import JsonObject
from ..mlxlm.kept import Kept, State
from ..store import states
from . import fidelity
from .run import FitRun
from .samples.capture import Collected
from .samples.conversation import answered_checks

LOSS = 1e-3  # nats a token that coding a state may cost


def coded_states(run: FitRun, data: Collected) -> tuple[dict[int, Kept], JsonObject]:
    """What the layers without heads keep, with states coded, and what that costs: `bits` (32 where none are few
    enough), `bytes`, `kl` from the uncoded state with exact keys, on the check questions."""
    context = data.context
    conversations = answered_checks(data.conversations)
    if not any(isinstance(kept, State) for kept in context.windows.values()):
        return context.windows, {}
    for bits in states.STATE_BITS if conversations else ():
        kept = states.coded(context.windows, bits)
        coded = {"coded": replace(context, windows=kept).make_cache}
        found = fidelity.compare(run.model, context.make_cache, coded, conversations)["coded"]
        if (kl := max(0.0, float(found.kl.mean()))) <= LOSS:
            return kept, {"bits": bits, "bytes": _state_bytes(kept), "kl": kl}
    return context.windows, {"bits": 32, "bytes": _state_bytes(context.windows)}


def _state_bytes(kept: dict[int, Kept]) -> int:
    return sum(k.nbytes for k in kept.values() if isinstance(k, State))
