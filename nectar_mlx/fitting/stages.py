"""The stages of a fit between reading a text and storing its heads."""

from ..core.clock import Clock
from ..heads import HeadArrays
from .checkpoint import Plan
from .distillation import distilled
from .kinds import KIND_FITS, KindFit, kind_fit
from .prefill import Context
from .run import FitRun
from .samples.recording import collect
from .sizes import Affordable, plan_sizes
from .train import train_heads


def fit_context(
    run: FitRun,
    context: Context,
    affordable: Affordable,
    share: float | None,
    *,
    clock: Clock,
    plan: Plan | None = None,
) -> tuple[KindFit, Plan, list[HeadArrays]]:
    """All heads of a context that was read: what they were fitted to, and what each got.

    affordable, share: as for `sizes.plan_sizes`. plan: what each head gets, where that was decided elsewhere.
    """
    KIND_FITS[run.layout.kind].check(run, context)
    run.claim(context.prefix, preamble=context.preamble)
    kind = kind_fit(run, collect(run, context))
    clock.lap("study")
    plan = plan or plan_sizes(kind, affordable, share)
    clock.lap("budgets")
    heads = train_heads(kind, plan.sizes, bits=plan.bits)
    clock.lap("regression")
    if run.distills(context):
        heads = distilled(kind, plan.sizes, heads)
        clock.lap("distillation")
    return kind, plan, heads
