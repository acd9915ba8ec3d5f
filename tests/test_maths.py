"""Properties of the mathematics, for numbers that nobody would think of."""

import re
from math import sqrt
from pathlib import Path
from statistics import NormalDist

import msgspec
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as some
from hypothesis.extra.numpy import array_shapes, arrays

import snn
from snn.cloud.arrays import decode, encode
from snn.maths import network, sampling
from snn.maths.activations import ACTIVATIONS, sigmoid
from snn.maths.augment import masked
from snn.maths.model import wilson_interval
from snn.maths.neuron import backward, forward
from snn.maths.parameters import from_dict, parse

SMOOTH = sorted(ACTIVATIONS.keys() - {"relu", "leaky_relu"})  # have a derivative everywhere
kinds, seeds, widths = (
    some.sampled_from(sorted(ACTIVATIONS)),
    some.integers(0, 2**32),
    some.integers(1, 6),
)


def make_parameters(sizes, hidden, **changes):
    layers = [f"layer{l}" for l in range(1, len(sizes) + 1)]
    return from_dict(
        {
            "epochs": 1,
            "layers": len(sizes),
            "neurons": dict(zip(layers, sizes)),
            "learning_rate": 0.1,
            "batch_size": 4,
            "threshold": 0,
            "activations": dict(zip(layers, [*hidden, "sigmoid"])),
            **changes,
        }
    )


# Neurons


@given(kinds, seeds, widths, widths, widths)
def test_neurons_one_by_one_are_the_layer(kind, seed, n, n_prev, m):
    rng = np.random.default_rng(seed)
    W, b, A_prev, dA = (
        rng.standard_normal(shape) for shape in ((n, n_prev), (n, 1), (n_prev, m), (n, m))
    )
    A = forward(W, b, A_prev, kind)
    dZ, dW, db = backward(dA, A, A_prev, kind, W, b)
    for j in range(n):
        row = slice(j, j + 1)
        np.testing.assert_allclose(
            forward(W[row], b[row], A_prev, kind), A[row], rtol=1e-12, atol=1e-15
        )
        own = backward(dA[row], A[row], A_prev, kind, W[row], b[row])
        for part, whole in zip(own, (dZ, dW, db)):
            np.testing.assert_allclose(part, whole[row], rtol=1e-12, atol=1e-15)


@given(
    some.lists(some.sampled_from(sorted(ACTIVATIONS)), max_size=3),
    seeds,
    some.sampled_from([0, 0.2, 0.5]),
    some.data(),
)
def test_gradients_are_the_slopes_of_the_cost(hidden, seed, dropped, draw):
    sizes = [*(draw.draw(widths) for _ in hidden), 1]
    parameters = make_parameters(sizes, hidden, seed=seed, dropout={"hidden": dropped})
    rng = np.random.default_rng(seed)
    layers = [(W, rng.standard_normal(b.shape)) for W, b in network.initialise(parameters, 5)]
    X, Y = rng.standard_normal((5, 7)), rng.integers(0, 2, (1, 7))
    masks = network.hidden_masks(parameters, 7, epoch=3, batch=1)
    assert sorted(masks) == (list(range(1, len(sizes))) if dropped else [])
    before = [
        masked(A, masks.get(l))
        for l, A in enumerate(network.activations(parameters, layers, X, masks))
    ]
    bends = [l for l, kind in enumerate(hidden) if kind not in SMOOTH]
    sums = [layers[l][0] @ before[l] + layers[l][1] for l in bends]
    assume(all(abs(Z).min() > 1e-3 for Z in sums))  # where a function bends it has no slope
    cost_now = lambda: network.cost(network.activations(parameters, layers, X, masks)[-1], Y)
    _, gradients = network.gradients(parameters, layers, X, Y, masks)
    for layer, pair in zip(layers, gradients):
        for values, gradient in zip(layer, pair):
            place = tuple(rng.integers(values.shape))
            kept, found = values[place], []
            for step in (1e-5, -1e-5):
                values[place] = kept + step
                found.append(cost_now())
            values[place] = kept
            assert gradient[place] == pytest.approx(
                (found[0] - found[1]) / 2e-5, rel=1e-5, abs=1e-8
            )


@given(some.lists(kinds, max_size=3), seeds, some.integers(1, 25), some.sampled_from([0, 0.1]))
def test_the_mean_of_unequal_mini_batches_is_the_gradient_of_all_images(
    hidden, seed, size, l2
):
    sizes, rule = [*([3] * len(hidden)), 1], {"name": "sgd", "l2": l2}
    parameters = make_parameters(
        sizes, hidden, seed=seed, batch_size=size, aggregation="mean", optimizer=rule
    )
    rng = np.random.default_rng(seed)
    X, Y = rng.standard_normal((20, 5)), rng.integers(0, 2, 20)
    layers = network.initialise(parameters, 5)
    cost, after = network.train_epoch(parameters, layers, X, Y, epoch=0)
    whole, gradients = network.gradients(parameters, layers, X.T, Y[None])
    assert cost == pytest.approx(whole, rel=1e-12)
    for (W, b), (dW, db), found in zip(layers, gradients, after, strict=True):
        expected = W - parameters.learning_rate * (dW + l2 * W)
        np.testing.assert_allclose(found[0], expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(
            found[1], b - parameters.learning_rate * db, rtol=1e-9, atol=1e-12
        )


@given(
    arrays(np.float64, (1, 8), elements=some.floats(-1e300, 1e300)),
    arrays(np.int64, (1, 8), elements=some.integers(0, 1)),
    some.sampled_from(["float64", "float32"]),
)
def test_the_cost_and_its_slope_are_finite_for_any_sum(Z, Y, dtype):
    with np.errstate(over="ignore"):
        Z = np.clip(Z.astype(dtype), np.finfo(dtype).min, np.finfo(dtype).max)
    with np.errstate(all="raise", under="ignore"):
        A = sigmoid(Z)
        assert (
            np.isfinite(network.cost(A, Y))
            and network.cost(A, Y) >= 0
            and np.isfinite(network.cost_gradient(A, Y)).all()
        )
    assert ((0 < A) & (A < 1)).all() and A.dtype == dtype


@given(kinds, some.floats(-1e300, 1e300))
def test_no_activation_overflows(kind, z):
    with np.errstate(all="raise", under="ignore"):
        A = ACTIVATIONS[kind].function(np.array([z]))
        kept = A if ACTIVATIONS[kind].keeps == "A" else np.array([z])
        assert np.isfinite(A).all() and np.isfinite(ACTIVATIONS[kind].slope(kept)).all()


def test_the_live_page_knows_every_activation():
    script = (Path(snn.__file__).parent / "live/static/live.js").read_text()
    _, _, table = script.partition("export const ACTIVATIONS = {\n")
    known = re.findall(r"^  (\w+):", table.partition("\n};")[0], re.MULTILINE)
    assert sorted(known) == sorted(ACTIVATIONS)


# Mini-batches


@given(some.integers(1, 500), some.integers(1, 600), seeds, some.integers(0, 10**6))
def test_mini_batches_hold_every_image_once(m, batch_size, seed, epoch):
    batches = sampling.mini_batches(m, batch_size, seed, epoch)
    assert sorted(np.concatenate(batches).tolist()) == list(range(m))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (
        len(batches) - 1
    ) and 1 <= len(batches[-1]) <= batch_size


@given(some.integers(0, 500), some.floats(0, 1, exclude_max=True), seeds)
def test_a_split_holds_every_image_once_and_leaves_some_to_train_on(m, fraction, seed):
    kept, held = sampling.split(m, fraction, seed)
    assert (
        sorted([*kept, *held]) == list(range(m))
        and len(held) == int(m * fraction)
        and (len(kept) > 0 or m == 0)
    )


@given(seeds, some.integers(0, 1000))
def test_shuffles_are_the_same_for_everybody_and_another_each_epoch(seed, epoch):
    order = lambda epoch: np.concatenate(sampling.mini_batches(100, 30, seed, epoch))
    assert (order(epoch) == order(epoch)).all() and (order(epoch) != order(epoch + 1)).any()


# What travels

DTYPES = some.sampled_from(["<f8", "<f4", "<i8", "<i4", "|u1", "<u2"])


@given(
    some.lists(
        DTYPES.flatmap(
            lambda dtype: arrays(
                dtype, array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)
            )
        ),
        max_size=4,
    )
)
def test_arrays_come_back_as_they_were(values):
    back = decode(encode(*values))
    assert len(back) == len(values)
    for a, b in zip(values, back):
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@given(arrays(np.float64, (4, 6)))
def test_arrays_in_any_order_of_memory_come_back(array):
    for value in (array.T, array[::2, ::-1], np.asfortranarray(array)):
        assert decode(encode(value))[0].tobytes() == np.ascontiguousarray(value).tobytes()


@pytest.mark.parametrize(
    "array",
    [
        np.array([None]),
        np.array(["a"]),
        np.array([b"a"]),
        np.array(["2026-01-01"], "datetime64[D]"),
        np.zeros(2, [("a", "f8")]),
    ],
)
def test_only_numbers_are_decoded(array):
    with pytest.raises((ValueError, TypeError)):
        decode(encode(array))


@given(
    some.lists(some.tuples(widths, kinds), max_size=4),
    some.floats(1e-300, 1e300),
    some.integers(1, 10**6),
    some.integers(0, 2**63 - 1),
    some.sampled_from(["neuron", "layer", "network"]),
    some.sampled_from(["sgd", "momentum", "adam"]),
    some.floats(0, 1e300),
)
def test_parameters_come_back_from_json_as_they_were(
    hidden, rate, batch_size, seed, granularity, rule, l2
):
    sizes, names = [*(n for n, _ in hidden), 1], [kind for _, kind in hidden]
    parameters = make_parameters(
        sizes,
        names,
        learning_rate=rate,
        batch_size=batch_size,
        seed=seed,
        granularity=granularity,
        optimizer={"name": rule, "l2": l2},
    )
    assert parse(msgspec.json.encode(parameters)) == parameters
    assert parameters.sizes == sizes


# Intervals


@pytest.mark.parametrize(
    "right, count, low, high",
    [  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilsons_interval_is_the_published_one(right, count, low, high):
    assert wilson_interval(right, count) == pytest.approx((low, high), abs=5e-5)


@given(
    some.integers(1, 10**6).flatmap(lambda n: some.tuples(some.integers(0, n), some.just(n)))
)
def test_wilsons_interval_solves_wilsons_equation(pair):
    right, count = pair
    low, high = wilson_interval(right, count)
    p, z = right / count, NormalDist().inv_cdf(0.975)
    assert 0 <= low <= p + 1e-12 and p - 1e-12 <= high <= 1
    for bound in (low, high):  # |p - bound| = z sqrt(bound (1 - bound) / n)
        assert abs(p - bound) == pytest.approx(z * sqrt(bound * (1 - bound) / count), abs=1e-6)
    mirrored = wilson_interval(count - right, count)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-9)


# Rules


def naive_steps(rule: dict, rate: float, weight: float, gradients: list[float]) -> float:
    "One weight after some steps, by the rules as their papers write them."
    velocity = first = second = 0.0
    for t, gradient in enumerate(gradients, start=1):
        gradient = gradient + rule.get("l2", 0) * weight
        if rule["name"] == "sgd":
            weight -= rate * gradient
        elif rule["name"] == "momentum":
            velocity = rule["momentum"] * velocity + gradient
            weight -= rate * velocity
        else:
            first = rule["beta1"] * first + (1 - rule["beta1"]) * gradient
            second = rule["beta2"] * second + (1 - rule["beta2"]) * gradient**2
            weight -= (
                rate
                * (first / (1 - rule["beta1"] ** t))
                / (sqrt(second / (1 - rule["beta2"] ** t)) + rule["epsilon"])
            )
    return weight


fractions, gradients = some.floats(0, 0.999), some.floats(-10, 10)


@given(
    some.one_of(
        some.fixed_dictionaries({"name": some.just("sgd")}),
        some.fixed_dictionaries({"name": some.just("momentum"), "momentum": fractions}),
        some.fixed_dictionaries(
            {
                "name": some.just("adam"),
                "beta1": fractions,
                "beta2": fractions,
                "epsilon": some.floats(1e-8, 1),
            }
        ),
    ),
    some.floats(1e-3, 1),
    some.floats(0, 1),
    some.lists(some.tuples(gradients, gradients), min_size=1, max_size=6),
)
def test_every_rule_is_the_one_of_its_paper(rule, rate, l2, steps):
    rule = {**rule, "l2": l2}
    parameters = make_parameters([1], [], optimizer=rule, learning_rate=rate)
    layer = network.initialise_layer(parameters, 1, 1)
    start = float(layer[0][0, 0])
    for epoch, (dW, db) in enumerate(steps):
        layer = network.step(parameters, layer, np.array([[dW]]), np.array([[db]]), epoch)
    assert layer[0].item() == pytest.approx(
        naive_steps(rule, rate, start, [dW for dW, _ in steps]), rel=1e-9, abs=1e-9
    )
    assert layer[1].item() == pytest.approx(
        naive_steps({**rule, "l2": 0}, rate, 0.0, [db for _, db in steps]), rel=1e-9, abs=1e-9
    )


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam"])
def test_pytorch_takes_the_same_steps(rule):
    torch = pytest.importorskip("torch", reason="no PyTorch to compare with")
    parameters = make_parameters(
        [5, 4, 3, 1],
        ["tanh", "relu", "leaky_relu"],
        optimizer={"name": rule, "l2": 0.01},
        learning_rate=0.02,
        batch_size=8,
        aggregation="mean",
    )
    layers, rng = network.initialise(parameters, 6), np.random.default_rng(0)
    X, Y = (
        rng.standard_normal((6, 20)),
        rng.integers(0, 2, (1, 20)),
    )  # ours in three mini-batches, whose mean is what PyTorch finds at once
    W, b = ([torch.tensor(layer[i], requires_grad=True) for layer in layers] for i in (0, 1))
    groups = [{"params": W, "weight_decay": 0.01}, {"params": b}]
    optimizer = {
        "sgd": lambda: torch.optim.SGD(groups, 0.02),
        "momentum": lambda: torch.optim.SGD(groups, 0.02, 0.9),
        "adam": lambda: torch.optim.Adam(groups, 0.02),
    }[rule]()
    for epoch in range(10):
        _, layers = network.train_epoch(parameters, layers, X.T, Y[0], epoch)
        A = torch.tensor(X)
        for l, kind in enumerate(
            (torch.tanh, torch.relu, torch.nn.functional.leaky_relu, torch.sigmoid)
        ):
            A = kind(W[l] @ A + b[l])
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy(
            A, torch.tensor(Y, dtype=torch.float64)
        ).backward()
        optimizer.step()
    for l, layer in enumerate(layers):
        np.testing.assert_allclose(layer[0], W[l].detach().numpy(), rtol=1e-9)
        np.testing.assert_allclose(layer[1], b[l].detach().numpy(), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
    "momentum, l2, hidden",
    [(0, 0, "relu"), (0, 0.01, "tanh"), (0.9, 0, "relu"), (0.9, 0.01, "tanh")],
)
def test_scikit_learn_takes_the_same_steps(momentum, l2, hidden):
    neural_network = pytest.importorskip(
        "sklearn.neural_network", reason="no scikit-learn to compare with"
    )
    rule = {"name": "momentum", "momentum": momentum} if momentum else {"name": "sgd"}
    parameters = make_parameters(
        [5, 3, 1], [hidden] * 2, optimizer={**rule, "l2": l2}, learning_rate=0.02
    )
    layers, rng = network.initialise(parameters, 6), np.random.default_rng(0)
    X, Y = rng.standard_normal((20, 6)), rng.integers(0, 2, 20)
    peer = neural_network.MLPClassifier(
        (5, 3),
        hidden,
        solver="sgd",
        alpha=l2 * len(X),
        batch_size=len(X),
        learning_rate_init=0.02,
        momentum=momentum,
        nesterovs_momentum=False,
        shuffle=False,
        warm_start=True,
        max_iter=1,
        tol=0,
        n_iter_no_change=100,
    )
    with pytest.warns():
        peer.fit(X, Y)  # of one epoch it says, rightly, that it is not enough
    for l, (W, b, *_) in enumerate(layers):
        peer.coefs_[l][:], peer.intercepts_[l][:] = W.T, b[:, 0]
    peer.max_iter = 10
    with pytest.warns():
        peer.fit(X, Y)
    for epoch in range(10):
        _, gradients = network.gradients(parameters, layers, X.T, Y[None])
        layers = [
            network.step(parameters, layer, *gradient, epoch)
            for layer, gradient in zip(layers, gradients)
        ]
    for l, (W, b, *_) in enumerate(layers):
        np.testing.assert_allclose(peer.coefs_[l].T, W, rtol=1e-9, atol=1e-15)
        np.testing.assert_allclose(peer.intercepts_[l], b[:, 0], rtol=1e-9, atol=1e-15)
