"""The work of a fit, stage by stage: how long each takes, and in how much memory.

Seconds are floating-point operations over what the machine does of them in a stage of that kind. The operations follow
from the shapes; the shares of the machine's rate are measured (docs/log/fit-time.md). Several equal machines share some
stages (`distributed`); seconds are those of the first one.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..core.device import Device
from ..core.progress import Stage
from ..heads import AUTO, KINDS
from ..mlxlm.attention_patch import Geometry
from ..store import Layout
from .budget import affordable_bytes, equal_size
from .config import FitConfig, density, useful_samples
from .prefill import READ
from .samples.conversation import FEWEST_TOGETHER, count_groups

AUTO_SHARE = 0.04  # of the KV cache; what was chosen for three models was 0.024, 0.04 and 0.16 (docs/results.md)
QUESTION_TOKENS, LONGEST_QUESTION = 44, 80  # of a sampled question, with the turn's own: on average, and at most
TRAIN_SHARE = 0.9  # of conversations, those that are not held out
_CANDIDATES = 3  # budgets that are tried
_TRAINED = 12  # operations a step, sample, node and entry of it: two products and their gradients
_ROUNDING = 1.4  # of the regression's steps, with those of rounding
_START = 2e9  # operations that starting a head takes the time of
# How fast a stage is, as a multiple of the machine's rate: measured on two CPU cores, and on one H200.
_CPU = {
    "reading": 2.0,
    "sampling": 1.8,
    "capturing": 1.2,
    "sensitivity": 1.9,
    "distilling": 1.9,
    "training": 1.4,
    "checking": 3.0,
}
_SMALL_HEADS = 0.45  # of all nodes: in heads that are trained, where much larger ones are not (measured at 4%)
_GPU = {
    "reading": 2.0,
    "sampling": 5.0,
    "capturing": 4.0,
    "sensitivity": 1.5,
    "distilling": 4.0,
    "training": 5.0,
    "checking": 1.5,
}
_LAUNCH_SECONDS = 5e-4  # that a GPU takes a layer of a decoding step, at least
_LINK = 5e9  # bytes a second between two machines: half of what Thunderbolt 5 is published to carry


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model, as far as a fit depends on it. body: parameters that every token passes; vocabulary: entries of the
    output matrix; window: positions that it supports; bytes_each: of a weight."""

    name: str
    geometry: Geometry
    body: float
    vocabulary: float
    window: int
    bytes_each: float = 2.0

    @property
    def nbytes(self) -> float:
        return self.bytes_each * (self.body + self.vocabulary)

    def attention(self, tokens: int) -> float:
        """Operations of a token's attention over so many."""
        g = self.geometry
        return 4.0 * g.n_heads * g.head_dim * sum(min(tokens, w) if w else tokens for w in g.windows)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """rate: operations a second that the stages of a fit reach. bandwidth: bytes a second from memory. memory: bytes.
    basis: measured, or how it was calculated."""

    name: str
    rate: float
    bandwidth: float
    memory: float
    profile: Device
    basis: str


@dataclass(frozen=True, kw_only=True)
class Work:
    """The stages of fitting n tokens at once. share: of their KV cache that is kept. distills: whether heads are
    trained through the whole model. replayed: whether conversations are replayed on any machine."""

    shape: Shape
    machine: Machine
    config: FitConfig
    n: int
    share: float
    layerwise: bool
    machines: int = 1
    distills: bool = False
    replayed: bool = False

    @property
    def layout(self) -> Layout:
        g, kind = self.shape.geometry, AUTO if self.config.kind == "auto" else self.config.kind
        bits = self.config.bits or KINDS[kind].default_bits
        return Layout(
            kind=kind, n_layers=len(g.fitted), n_kv_heads=g.n_kv_heads, head_dim=g.head_dim, scale=g.scale, bits=bits
        )

    @property
    def heads(self) -> int:
        return self.layout.n_layers * self.layout.n_kv_heads

    @property
    def group(self) -> int:
        """Query heads a KV head."""
        return self.shape.geometry.n_heads // self.shape.geometry.n_kv_heads

    @property
    def samples(self) -> int:
        """A head."""
        profile, config = self.machine.profile, self.config
        if config.queries:
            return config.queries
        each, memory = (4 if profile.linux_cpu else 2) * (3 * self.layout.head_dim + 2), int(self.machine.memory)
        return useful_samples(config, profile, group=self.group, nbytes=each * self.heads, memory=memory)

    @property
    def conversation(self) -> int:
        """Tokens of one."""
        question = LONGEST_QUESTION if self.machine.profile.end_together else QUESTION_TOKENS
        return question + self.config.answer_tokens

    @property
    def conversations(self) -> int:
        """That heads are trained on, as in `self_study.study`."""
        samples, profile = self.samples, self.machine.profile
        share = TRAIN_SHARE * density(self.config, profile, group=self.group, samples=samples, distilled=self.distills)
        count = max(FEWEST_TOGETHER, int(samples / (share * self.group * self.conversation)) + 1)
        return count if count < 2 * profile.study_share else int(count / profile.expected_share)

    @property
    def sampled(self) -> int:
        """Tokens of the conversations that heads are trained on."""
        return self.conversations * self.conversation

    def shared(self, pieces: float) -> float:
        """What is left for this machine of work in so many pieces."""
        return -(-pieces // self.machines) / pieces

    @property
    def checked(self) -> int:
        """Tokens of the check's conversations."""
        return self.config.checks * self.conversation

    def nodes(self, share: float) -> int:
        """Of all heads together."""
        shape, layout = self.shape, self.layout
        nbytes = affordable_bytes(share, geometry=shape.geometry, layout=layout, n=self.n, at_least=True)
        return int(self.heads * equal_size(layout, nbytes, heads=self.heads, most=self.n)[0])

    def seconds(self, operations: float, stage: str) -> float:
        shares = _CPU if self.machine.profile.linux_cpu else _GPU
        return operations / (self.machine.rate * shares[stage])

    def token(self, *, vocabulary: bool) -> float:
        """Operations of a token behind the whole text."""
        shape = self.shape
        return 2 * shape.body + 2 * shape.vocabulary * vocabulary + shape.attention(self.n)

    def decode(self, tokens: float, *, together: int) -> float:
        """Seconds of sampling so many tokens: the weights are read for every step."""
        steps = tokens / max(1, together)
        step = self.shape.nbytes * compute_bytes(self.machine) / 2 / self.machine.bandwidth
        if not self.machine.profile.linux_cpu:
            step += _LAUNCH_SECONDS * self.shape.geometry.n_layers
        return self.seconds(tokens * self.token(vocabulary=True), "sampling") + steps * step

    def train(self, nodes: int, steps: int) -> float:
        """Seconds of so many steps of all heads, and of where they start; in one layer they are one group."""
        operations = _TRAINED * steps * self.config.batch * nodes * self.layout.head_dim
        alone = self.seconds(operations, "training") + self.heads * _START / self.machine.rate
        return alone if self.layerwise else self.shared(self.heads) * alone

    def regression(self) -> float:
        """Seconds of all heads that are trained, with their rounding."""
        trained = _SMALL_HEADS if self.machine.profile.trained_share < 1 else 1.0
        return self.train(int(trained * self.nodes(self.share)), int(_ROUNDING * self.config.steps))

    def check(self) -> float:
        """Of a text in one chunk, whose answers are shared."""
        return self.shared(max(1, self.config.checks / self.machine.profile.check_batch)) * self.check_alone()

    def check_alone(self) -> float:
        shape = self.shape
        each = 3 * (2 * shape.body + 2 * shape.vocabulary) + shape.attention(self.n)
        return self.seconds(self.checked * each, "checking")

    def read(self) -> Stage:
        operations = self.n * (2 * self.shape.body + self.shape.attention(self.n) / 2)
        return Stage("reading", self.seconds(operations, "reading"))

    def study(self) -> Iterator[Stage]:
        config = self.config
        if not self.layerwise:  # the check's beside the others
            asked = self.conversations + config.checks
            scores = asked * self.shape.geometry.n_heads * self.n
            profile = self.machine.profile
            groups = count_groups(asked, most=config.conversations, scores=scores, profile=profile)
            seconds = self.decode(self.sampled + self.checked, together=asked // groups)
            yield Stage("sampling answers", self.shared(groups) * seconds)
            return
        yield Stage("sampling answers", self.decode(self.sampled, together=config.conversations))
        yield Stage("answering check questions", self.decode(self.checked, together=config.checks))

    def parts(self, *, first: bool = True, choice: bool = False) -> Iterator[Stage]:
        """Of one chunk; the first one decides sizes for all."""
        return self.layers(first=first) if self.layerwise else self.stages(sizes=first, choice=choice)

    def stages(self, *, sizes: bool, choice: bool) -> Iterator[Stage]:
        """All layers at once. sizes: whether they are decided here. choice: whether the budget is, too."""
        sent = self.shape.geometry.cache_bytes(self.n) * (1 - 1 / self.machines) / _LINK
        yield Stage("reading", self.shared(-(-self.n // READ)) * self.read().seconds + sent)
        if not self.layout.bank.fitted:
            return
        yield from self.study()
        if self.replayed:
            captured = self.seconds(self.sampled * self.token(vocabulary=False), "capturing") / self.machines
            samples = self.samples * self.heads * compute_bytes(self.machine) * (3 * self.layout.head_dim + 2)
            yield Stage("capturing attention", captured + samples * (1 - 1 / self.machines) / _LINK)
        ranking = 2.0 * self.config.matching_samples * self.n * self.layout.head_dim * self.heads
        yield Stage("ranking keys", self.seconds(ranking, "training"))
        if sizes:
            yield from self.sizes(choice=choice)
        yield Stage("fitting heads", self.regression())

    def distillation(self) -> float:
        """Seconds: a step takes every layer forward twice and back once."""
        shape, tokens = self.shape, self.machine.profile.distillation_batch * self.conversation
        step = tokens * (8 * shape.body + 6 * shape.vocabulary)
        launched = 0.0 if self.machine.profile.linux_cpu else 16 * _LAUNCH_SECONDS * shape.geometry.n_layers
        return (self.config.distillation_steps or 0) * max(self.seconds(step, "distilling"), launched)

    def sizes(self, *, choice: bool) -> Iterator[Stage]:
        profile, config = self.machine.profile, self.config
        tokens = profile.fisher_probes * self.conversation
        sensitivity = self.seconds(3 * tokens * self.token(vocabulary=True), "sensitivity")
        yield Stage("measuring sensitivity", self.shared(profile.fisher_probes / profile.fisher_batch) * sensitivity)
        yield Stage("deciding sizes", self.train(self.nodes(self.share), config.trial_steps))
        if choice and config.budget == "auto" and config.size is None:
            for _ in range(_CANDIDATES):
                yield Stage("choosing a budget", self.train(self.nodes(self.share), profile.trial_steps))
                yield Stage("checking a budget", self.check() * profile.trial_checks / config.checks)

    def layers(self, *, first: bool) -> Iterator[Stage]:
        """Layer by layer. first: whether sizes are decided, on an excerpt."""
        if first:
            small = replace(self, n=min(self.n, 1024), layerwise=False, replayed=True)
            _, *stages, _ = small.stages(sizes=True, choice=False)
            yield from stages
        yield from replace(self, n=min(self.n, 900)).study()
        whole = self.read().seconds + self.regression()
        captured = self.sampled * self.token(vocabulary=False)
        yield Stage("fitting layers", whole + self.seconds(captured, "capturing"))

    def kept(self) -> float:
        """Bytes of the checkpoint: heads in float32, and samples, where they do not fit the memory."""
        samples = 4.4 * self.samples * self.heads * (3 * self.layout.head_dim + 2)
        # Twice: they are in pieces until the last answer has ended.
        spilled = 2 * samples if samples > self.machine.memory / 2 and not self.layerwise else 0.0
        return 4.0 * self.nodes(self.share) * (2 * self.layout.head_dim + 1) + spilled

    def memory(self) -> float:
        """Bytes: weights, the text's keys and values, samples, and conversations that are sampled together."""
        shape, config, number = self.shape, self.config, compute_bytes(self.machine)
        cache = shape.geometry.cache_bytes(self.n) * number / 2
        weights = shape.nbytes * number / 2
        samples = 1.1 * self.samples * self.heads * number * (3 * self.layout.head_dim + 2)
        samples = min(samples, self.config.memory or self.machine.memory / 2)  # the others are on the disk
        if self.layerwise:
            return weights + 1.5 * cache / self.layout.n_layers + samples / self.layout.n_layers
        live = config.conversations * self.conversation / self.n * cache
        return weights + cache + max(samples, live)


def compute_bytes(machine: Machine) -> int:
    return 4 if machine.profile.linux_cpu else 2
