import mlx.core as mx
import numpy as np
import pytest

from nectar_mlx.fitting.samples.sample_store import Samples
from nectar_mlx.fitting.solve import attention_matching, regression
from nectar_mlx.heads import Quadrature
from tests.oracle import attention as oracle

M, N, S, D = 3, 400, 60, 16


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    q, k, v, live = (rng.normal(size=s).astype(np.float32) for s in ((M, N, D), (M, S, D), (M, S, D), (M, N, D)))
    output, log_normalizer = oracle(q, 3 * k, v, scale=0.25)
    arrays = (q, output, live, log_normalizer, rng.normal(size=(M, N)) + 4)
    return Samples(*(mx.array(x.astype(np.float32)) for x in arrays)), mx.array(3 * k), mx.array(v)


def matched(problem, counts):
    samples, keys, values = problem
    weight = attention_matching.importance(samples, keys, scale=0.25)
    chosen = [attention_matching.most_important(weight[i], m) for i, m in enumerate(counts)]
    return attention_matching.match(
        samples, [keys[i][c] for i, c in enumerate(chosen)], [values[i][c] for i, c in enumerate(chosen)], scale=0.25
    )


def test_importance_is_root_mean_square_attention(problem, set_device):
    samples, keys, _ = problem
    set_device(max_scores=64 * keys.shape[0] * keys.shape[1])
    scores = 0.25 * np.einsum("mnd,msd->mns", np.array(samples.queries, np.float64), np.array(keys, np.float64))
    weights = np.exp(scores - np.log(np.exp(scores).sum(-1, keepdims=True)))
    truth = np.sqrt((weights**2).mean(1))
    np.testing.assert_allclose(attention_matching.importance(samples, keys, scale=0.25), truth, rtol=1e-4)


def test_importance_by_the_share_of_the_merged_output(problem):
    samples, keys, _ = problem
    scores = 0.25 * np.einsum("mnd,msd->mns", np.array(samples.queries, np.float64), np.array(keys, np.float64))
    logs = np.log(np.exp(scores).sum(-1))
    share = 1 / (1 + np.exp(np.array(samples.live_log_normalizer, np.float64) - logs))
    counts = np.square(share) / np.square(share).mean(1, keepdims=True) + 0.01
    truth = np.sqrt((counts[..., None] * np.exp(2 * (scores - logs[..., None]))).mean(1))
    np.testing.assert_allclose(
        attention_matching.importance(samples, keys, scale=0.25, by_share=True), truth, rtol=1e-4
    )


def test_errors_that_count_by_their_share_are_smaller_in_the_merged_output(problem, set_device):
    """Where the context has a large share of some outputs and hardly any of the others."""
    samples, keys, values = problem
    set_device(max_scores=64 * M * 15)
    samples = samples._replace(live_log_normalizer=samples.log_normalizer + mx.where(mx.arange(N) % 4 == 0, -2.0, 9.0))
    chosen = [x[:, :15] for x in (keys, values)]
    errors = [
        regression.errors(
            Quadrature.stack(attention_matching.match(samples, *chosen, scale=0.25, by_share=by), scale=0.25), samples
        )
        for by in (True, False)
    ]
    assert (errors[0] < 0.95 * errors[1]).all()


def test_all_keys_are_exact(problem):
    samples, *_ = problem
    bank = Quadrature.stack(matched(problem, [S] * M), scale=0.25)
    assert (regression.errors(bank, samples) < 1e-6).all()


def test_more_nodes_err_less_and_far_less_than_plain_eviction(problem):
    samples, keys, values = problem
    errors = [regression.errors(Quadrature.stack(matched(problem, [m] * M), scale=0.25), samples) for m in (5, 15, 40)]
    assert (errors[0] > errors[1]).all() and (errors[1] > errors[2]).all()
    weight = attention_matching.importance(samples, keys, scale=0.25)
    kept = [attention_matching.most_important(weight[i], 15) for i in range(M)]
    plain = [{"keys": keys[i][c], "values": values[i][c], "bias": mx.zeros(15)} for i, c in enumerate(kept)]
    assert (errors[1] < 0.7 * regression.errors(Quadrature.stack(plain, scale=0.25), samples)).all()


def test_unequal_heads_are_solved_as_if_alone(problem):
    samples, keys, values = problem
    together = matched(problem, [5, 20, 11])
    alone = matched((Samples(*(x[1:2] for x in samples)), keys[1:2], values[1:2]), [20])
    assert [h["bias"].shape[0] for h in together] == [5, 20, 11]
    ours = Quadrature.stack([together[1]], scale=0.25)(samples.queries[1:2])
    theirs = Quadrature.stack(alone, scale=0.25)(samples.queries[1:2])
    np.testing.assert_allclose(ours.output, theirs.output, atol=1e-3)


def test_weights_are_the_non_negative_least_squares_solution(problem):
    samples, keys, _ = problem
    weights = attention_matching.attention_weights(Samples(*(x[:1] for x in samples)), keys[:1, :12], scale=0.25)
    gram, ones = weights.swapaxes(1, 2) @ weights, weights.sum(1)[..., None]
    mass = np.array(attention_matching.nonnegative_least_squares(gram, ones)[0], np.float64)
    a = np.array(weights[0], np.float64)
    gradient = a.T @ (a @ mass - 1)
    scale = np.abs(a.T @ np.ones(N)).max()
    active = mass > 1.1e-4
    assert np.abs(gradient[active]).max() < 2e-3 * scale  # no slope where a weight is free
    assert gradient[~active].min(initial=0) > -2e-3 * scale  # and none inwards where it is held at its bound


def test_samples_are_matched_in_parts_as_they_are_together(problem, set_device):
    together = matched(problem, [5, 20, 11])
    set_device(max_scores=37 * M * 20)
    for whole, parts in zip(together, matched(problem, [5, 20, 11]), strict=True):
        for name in whole:
            np.testing.assert_allclose(parts[name], whole[name], rtol=1e-3, atol=1e-3)
