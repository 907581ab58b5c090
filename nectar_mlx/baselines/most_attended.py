"""Keep the keys that the queries of real answers attend to most (the selection of H2O and of Attention Matching)."""

from .base import Baseline, EvalContext, View


def most_attended(task: EvalContext, nbytes: int) -> View:
    return task.keep_best(lambda layer: task.importance[layer], nbytes)


BASELINES = (Baseline(name="keep most attended", build=most_attended),)
