"""The text, the settings and the first stages of a fit that the tests of fitting share."""

from nectar_mlx.core.progress import Overall
from nectar_mlx.fitting import prefill
from nectar_mlx.fitting.config import FitConfig
from nectar_mlx.fitting.run import FitRun
from nectar_mlx.mlxlm import attention_patch

TEXT = " ".join(f"The {a} dog sees fox number {i}, and the {b} fox runs." for i, (a, b) in enumerate(
    (a, b) for a in ("quick", "lazy", "brown", "old") for b in ("red", "sly", "young", "tired")
))  # fmt: skip
FAST = {
    "queries": 600,
    "conversations": 8,
    "steps": 30,
    "trial_steps": 5,
    "answer_tokens": 16,
    "checks": 2,
    "batch": 128,
    "matching_samples": 400,
}


def fit_run(model, tokenizer, **options):
    """A run of a fast fit. options: of `FitRun`, or of its configuration."""
    own = {name: options.pop(name) for name in ("progress", "checkpoint") if name in options}
    config = FitConfig(**FAST | options)
    return FitRun(model=model, tokenizer=tokenizer, geometry=attention_patch.route(model), config=config, **own)


def read(run, tokens, **options):
    """The run's model reads some tokens."""
    return prefill.read_text(run.model, tokens, run.geometry, **options)


class Recorded(Overall):
    """Keeps what was expected at first, and what came."""

    def __init__(self):
        super().__init__()
        self.expected, self.came = [], []

    def expect(self, stages):
        self.expected = [stage.description for stage in stages]
        super().expect(stages)

    def _enter(self, description):
        self.came.append(description)
        super()._enter(description)
