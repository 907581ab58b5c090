"""The keys that the queries of real answers attend to most (the selection of H2O and of Attention Matching)."""

from .base import Baseline, EvalContext, View


def most_attended(ctx: EvalContext, nbytes: int) -> View:
    return ctx.keep_best(lambda layer: ctx.importance[layer], nbytes)


BASELINES = (Baseline(name="keep most attended", build=most_attended),)
