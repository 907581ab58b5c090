"""The text, the settings and the first stages of a fit that the tests of fitting share."""

from nectar_mlx.core.progress import Overall
from nectar_mlx.fitting import prefill
from nectar_mlx.fitting.config import FitConfig
from nectar_mlx.fitting.run import FitRun
from nectar_mlx.mlxlm import attention_patch
from tests import toys

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
FEW_TOGETHER = 6  # conversations, for `self_study.FEWEST_TOGETHER`: sampling is most of what the fit of a toy takes
SHORT_ANSWERS = FAST | {"answer_tokens": 8}  # where answers need only be there


def shallow(architecture="llama", **arguments):
    """A toy of two layers, if all its layers are alike."""
    layers = {"num_hidden_layers": 2} if architecture in ("llama", "qwen2", "qwen3", "phi3", "granite") else {}
    return toys.toy(architecture, **layers | arguments)


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
