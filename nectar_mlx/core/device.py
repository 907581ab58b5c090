"""What the machine suggests: how much work a call may hold, and how much work a fit may be.

A module asks `device()` where it needs a number, so that every such number stands here, once, for every device.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import mlx.core as mx
import psutil


@dataclass(frozen=True, kw_only=True)
class Device:
    """A profile of a machine.

    linux_cpu: whether MLX runs on its Linux CPU build, where numpy is faster at exponentials, top-k and gathers.
    half: whether products of half-precision numbers are faster than those of float32.
    end_together: whether answers that are sampled together go on until the last of them ends.
    compile_steps: whether `mx.compile` pays for a training step. Under CUDA each fused kernel takes seconds to build
    and a step has dozens; under Metal it takes milliseconds.

    Scores are float32 numbers, one a query and key.
    max_scores: that plain attention holds at a time; on a CPU what stays in its caches.
    max_batch_scores: that a pass over training samples holds at a time.
    replay_scores: of one layer, that conversations replayed together may have.
    training_scores: of a training batch, of all heads that are trained together.
    layer_training_scores: the same where only one layer exists at a time, at least.
    launch_scores: what starting a group of heads costs, in scores of a step.
    start_steps: of the regression, that take as long as all else that a head of the same size needs; kept_steps: as
    rounding one that keeps every key. Measured (docs/log/distributed.md).

    fit_steps, fit_batch, fit_samples, fit_conversations, fit_checks, fit_trial_steps, fit_matching,
    fit_answer_tokens: defaults of `FitConfig`. fit_tokens: of conversations whose samples are taken, where the memory
    holds them; each query head that shares a KV head gives one a token. fewest_tokens: of conversations, if the memory
    holds but a part of their samples; distilled_tokens: the same where heads are distilled. trained_share: of the
    text's keys, beyond which a large head is not trained.
    rounding_samples: by which it is measured how finely nodes must be kept. trial_samples: of a short fit, at
    most. trial_steps, trial_checks: of those that choose a budget. excerpt_tokens: on which it is chosen where the text
    is read in chunks.
    layerwise_tokens: in all layers at once, at least, where a fit goes layer by layer; layerwise_replay_tokens: of
    conversations replayed through all layers. passage_conversations: about one passage, sampled side by side.
    study_shares: into a multiple of so many parts sampled conversations are divided, which several ranks share, if that
    leaves study_share in each, and a step over all of them has shared_scores in a layer: with fewer it would take as
    long for half of them. steps_ahead: of sampling, queued before the first one's tokens are looked at.
    completion_keys: of the context that a completion is trained on.
    fisher_probes: conversations that tell the sensitivity of heads; fisher_batch: differentiated at a time.
    distillation_steps: of the best effort, through the whole model; distillation_batch: conversations of a step, at
    most; distillation_scores: of a step, in one layer, at most.
    check_batch: conversations compared at a time. baseline_conversations, baseline_batch, cartridge_steps: of the
    methods that `evaluate` builds. choices_batch: multiple-choice questions read at a time.
    """

    linux_cpu: bool
    half: bool
    end_together: bool
    compile_steps: bool
    max_scores: int
    max_batch_scores: int
    replay_scores: int
    training_scores: int
    layer_training_scores: int
    launch_scores: int
    start_steps: int
    kept_steps: int
    fit_steps: int
    fit_batch: int
    fit_samples: int
    fit_tokens: int
    fewest_tokens: int
    distilled_tokens: int
    fit_conversations: int
    fit_checks: int
    fit_trial_steps: int
    fit_answer_tokens: int
    fit_matching: int
    trained_share: float
    rounding_samples: int
    trial_samples: int
    trial_steps: int
    trial_checks: int
    excerpt_tokens: int
    layerwise_tokens: int
    layerwise_replay_tokens: int
    passage_conversations: int
    study_shares: int
    shared_scores: int
    study_share: int
    expected_share: float
    completion_keys: int
    steps_ahead: int
    fisher_probes: int
    fisher_batch: int
    distillation_steps: int
    distillation_batch: int
    distillation_scores: int
    check_batch: int
    baseline_conversations: int
    baseline_batch: int
    cartridge_steps: int
    choices_batch: int


LINUX_CPU = Device(
    linux_cpu=True,
    half=False,
    end_together=True,
    compile_steps=False,
    max_scores=1 << 20,
    max_batch_scores=1 << 20,
    replay_scores=1 << 23,
    training_scores=1 << 19,
    layer_training_scores=1 << 16,
    launch_scores=1 << 14,
    start_steps=60,
    kept_steps=12,
    fit_steps=250,
    fit_batch=512,
    fit_samples=14_000,
    fit_tokens=0,
    fewest_tokens=0,
    distilled_tokens=0,
    fit_conversations=96,
    fit_checks=12,
    fit_trial_steps=30,
    fit_answer_tokens=48,
    fit_matching=2048,
    trained_share=0.4,
    rounding_samples=1 << 12,
    trial_samples=1 << 12,
    trial_steps=40,
    trial_checks=8,
    excerpt_tokens=1024,
    layerwise_tokens=1024,
    layerwise_replay_tokens=128,
    passage_conversations=8,
    study_shares=4,
    shared_scores=0,
    study_share=36,
    expected_share=0.9,
    completion_keys=1024,
    steps_ahead=1,
    fisher_probes=3,
    fisher_batch=1,
    distillation_steps=0,  # a step takes as long as reading a thousand tokens
    distillation_batch=8,
    distillation_scores=1 << 20,
    check_batch=4,
    baseline_conversations=8,
    baseline_batch=16,
    cartridge_steps=20,
    choices_batch=1,
)
GPU = Device(
    linux_cpu=False,
    half=True,
    end_together=False,
    compile_steps=sys.platform == "darwin",
    max_scores=1 << 27,
    max_batch_scores=1 << 28,
    replay_scores=1 << 28,
    training_scores=1 << 27,
    layer_training_scores=1 << 22,
    launch_scores=1 << 22,
    start_steps=900,
    kept_steps=230,
    fit_steps=750,
    fit_batch=2048,
    fit_samples=150_000,
    fit_tokens=50_000,
    fewest_tokens=25_000,
    distilled_tokens=75_000,
    fit_conversations=512,
    fit_checks=96,
    fit_trial_steps=100,
    fit_answer_tokens=96,
    fit_matching=4096,
    trained_share=1.0,
    rounding_samples=1 << 14,
    trial_samples=1 << 15,
    trial_steps=100,
    trial_checks=48,
    excerpt_tokens=4096,
    layerwise_tokens=4096,
    layerwise_replay_tokens=256,
    passage_conversations=16,
    study_shares=2,
    shared_scores=1 << 27,
    study_share=16,
    expected_share=1.0,
    completion_keys=2048,
    steps_ahead=8,
    fisher_probes=8,
    fisher_batch=8,
    distillation_steps=400,
    distillation_batch=32,
    distillation_scores=1 << 28,
    check_batch=24,  # four batches of the checks, for four ranks
    baseline_conversations=128,
    baseline_batch=128,
    cartridge_steps=300,
    choices_batch=8,
)

# Of a laptop with 16 or 24 GB, most of which a fit cannot have: less is computed at a time.
SMALL_GPU = replace(
    GPU,
    max_scores=1 << 25,
    max_batch_scores=1 << 26,
    replay_scores=1 << 26,
    training_scores=1 << 25,
    fisher_batch=2,
    distillation_batch=16,
    distillation_scores=1 << 26,
    check_batch=6,
    choices_batch=2,
)
_LARGE_MEMORY = 40e9  # bytes


def gpu(memory: float, *, nvidia: bool = False) -> Device:
    """The profile of a Mac or an NVIDIA GPU in a machine with so many bytes of memory."""
    profile = GPU if memory > _LARGE_MEMORY else SMALL_GPU
    if not nvidia:
        return profile
    # The host launches a step's kernels no faster for fewer conversations. Elsewhere fewer of them in more steps gain
    # as much for half of the work.
    return replace(
        profile,
        distilled_tokens=2 * profile.distilled_tokens,
        distillation_steps=300,
        distillation_batch=3 * profile.distillation_batch,
        distillation_scores=4 * profile.distillation_scores,
    )


def _here() -> Device:
    memory, nvidia = psutil.virtual_memory().total, sys.platform == "linux"
    if not nvidia:
        return gpu(memory)
    if mx.default_device() == mx.cpu:
        return LINUX_CPU
    return gpu(min(memory, int(mx.device_info().get("total_memory", memory))), nvidia=True)  # its own


_current = _here()


def device() -> Device:
    """The profile of the machine MLX computes on: a Mac or an NVIDIA GPU (`gpu`), or a Linux CPU (`LINUX_CPU`)."""
    return _current


@contextmanager
def using(profile: Device) -> Iterator[None]:
    """Inside, `device()` is another profile: for tests, and to try other numbers."""
    global _current
    before, _current = _current, profile
    try:
        yield
    finally:
        _current = before
