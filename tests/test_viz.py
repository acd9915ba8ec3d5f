"""Pictures: each is a labelled figure, nothing on it is cut off, and nobody needs to tell red from green."""

import re
from collections import namedtuple
from io import BytesIO
from itertools import combinations

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from PIL import Image

from snn.maths import model, network
from snn.viz import answers, graph, learning, neurons, speed, structure, style


@pytest.fixture(scope="module")
def trained(parameters, small_datasets) -> model.Model:
    "A network of the original's shape after two epochs on images of 8x8 pixels."
    chosen, data = parameters(), small_datasets()
    *_, (_, layers) = network.train(chosen, model.standardise(data.train_x), data.train_y)
    return model.Model(chosen, layers, size=8)


@pytest.fixture(scope="module")
def images(small_datasets) -> np.ndarray:
    return small_datasets().test_x


Timing, Point = (
    namedtuple("Timing", "name median fastest slowest ratio"),
    namedtuple("Point", "name value median fastest slowest"),
)
Line, Moment = namedtuple("Line", "once each"), namedtuple("Moment", "epoch seconds memory")
WHO = ("plain NumPy", "network", "layer", "neuron", "scikit-learn")
KINDS = ("mathematics", "round trips", "serialisation", "dispatch", "waiting")

PICTURES = {
    "architecture": lambda trained, images: structure.architecture(),
    "network": lambda trained, images: structure.network(trained.parameters, 192),
    "network of the original": lambda trained, images: structure.network(
        trained.parameters, 12288
    ),
    "one mini-batch": lambda trained, images: structure.data_parallel(1, [3, 1]),
    "forty mini-batches": lambda trained, images: structure.data_parallel(
        40, trained.parameters.sizes
    ),
    "timeline": lambda trained, images: structure.timeline(
        [(0, 0.01), (0, 0.5), (0.1, 0.2)], 0.3, "A race"
    ),
    "gallery": lambda trained, images: style.gallery(
        images[:11], ["a picture"] * 11, columns=5, title="Pictures"
    ),
    "a gallery of one": lambda trained, images: style.gallery(images[:1]),
    "learned": lambda trained, images: neurons.learned(trained.layers, 8),
    "learned since the beginning": lambda trained, images: neurons.learned(
        trained.layers, 8, network.initialise(trained.parameters, 192)
    ),
    "favourites": lambda trained, images: neurons.favourites(trained, images, 2),
    "favourites of the last": lambda trained, images: neurons.favourites(trained, images, 4),
    "firing": lambda trained, images: neurons.firing(trained, images[0], "a picture"),
    "saliency": lambda trained, images: neurons.saliency_map(trained, images[:3]),
    "alive": lambda trained, images: neurons.alive(trained, images),
    "cost": lambda trained, images: learning.cost_curve([0.7, 0.5, 0.4], 0.1),
    "cost of one epoch": lambda trained, images: learning.cost_curve([0.7]),
    "cost far above the threshold": lambda trained, images: learning.cost_curve(
        [0.7, 0.6], 1e-6
    ),
    "progress": lambda trained, images: learning.progress([0.7, 0.6], 10, "cost 0.6"),
    "progress before the first epoch": lambda trained, images: learning.progress([], 10),
    "training and test": lambda trained, images: learning.training_and_test(
        [0, 5, 10], [0.7, 0.3, 0.1], [0.7, 0.4, 0.5], [0.7] * 10
    ),
    "rivals": lambda trained, images: learning.rivals(
        {"slow": [(1, 0.7, 0.7), (2000, 0.1, 0.2)], "fast": [(1, 0.7, 0.7), (200, 0.01, 0.1)]}
    ),
    "graph": lambda trained, images: graph.computation_graph(graph.example()),
    "gradients": lambda trained, images: learning.gradient_norms([[1e-3, 0, 1], [1e-4, 0, 2]]),
    "weights": lambda trained, images: learning.weights_over_epochs(
        [(-1, trained.layers), (5, trained.layers)], 8
    ),
    "confusion": lambda trained, images: answers.confusion(
        ((12, 5), (8, 25)), ("non-cat", "cat")
    ),
    "confusion without cats": lambda trained, images: answers.confusion(
        ((3, 0), (0, 0)), ("non-cat", "cat")
    ),
    "roc": lambda trained, images: answers.roc(
        np.array([0, 0.5, 1]), np.array([0, 0.8, 1]), 0.65, (0.5, 0.8)
    ),
    "sweep": lambda trained, images: answers.threshold_sweep(
        np.array([0, 1, 1]), np.array([0.2, 0.3, 0.9])
    ),
    "sureness": lambda trained, images: answers.sureness(
        np.array([0, 1, 1]), np.array([0.2, 0.3, 0.9]), ("non-cat", "cat")
    ),
    "trust": lambda trained, images: answers.trust(37, 50, 0.66),
    "trust in one image": lambda trained, images: answers.trust(1, 1, 1.0),
    "told": lambda trained, images: answers.told(
        images[:3], np.array([0.2, 0.9, 0.5]), ("non-cat", "cat"), np.array([0, 0, 1]), "Told"
    ),
    "ratios": lambda trained, images: speed.ratios(
        [
            Timing(name, 0.01 * 3**i, 0.009 * 3**i, 0.02 * 3**i, 3**i)
            for i, name in enumerate(WHO)
        ]
    ),
    "ratio of one": lambda trained, images: speed.ratios(
        [Timing("plain NumPy", 0.01, 0.01, 0.01, 1)]
    ),
    "where time goes": lambda trained, images: speed.where_time_goes(
        {name: dict.fromkeys(KINDS, 0.001 * 5**i) for i, name in enumerate(WHO[1:4])}, 0.02
    ),
    "workers at work": lambda trained, images: speed.workers_at_work(
        [[(kind, i / 100, (i + 1) / 100) for i, kind in enumerate(KINDS)]] * 3, "Three workers"
    ),
    "growth": lambda trained, images: speed.growth(
        [Point(name, n, n / 1e4, n / 2e4, n / 5e3) for name in WHO for n in (20, 200, 2000)],
        {name: Line(1e-3, 1e-4) for name in WHO},
        "images",
        "More",
    ),
    "a long run": lambda trained, images: speed.lasting(
        {name: [Moment(n, 0.002, 2e6) for n in (100, 1000, 5000)] for name in WHO[1:3]}
    ),
    "speed-up": lambda trained, images: speed.speed_up(
        [Point(name, n, 1 / n, 0, 0) for name in WHO[1:4] for n in (1, 2, 4)]
    ),
    "speed-up of one": lambda trained, images: speed.speed_up([Point("layer", 1, 1, 0, 0)]),
}


@pytest.fixture(params=PICTURES, scope="module")
def picture(request, trained, images) -> Figure:
    return PICTURES[request.param](trained, images)


@pytest.fixture(scope="module")
def written(picture) -> list:
    "All texts of a picture and where they are, drawn once for all that is asked about them."
    return [(text, text.get_window_extent()) for text in texts(picture)]


def texts(figure: Figure) -> list:
    "All texts that are drawn."
    figure.canvas.draw()
    found = [text for text in [figure._suptitle] if text]
    for axes in figure.axes:
        found += [
            *axes.texts,
            axes.title,
            *(axes.get_legend().get_texts() if axes.get_legend() else []),
        ]
        if not axes.axison:
            continue
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            found += [
                axis.label,
                *(
                    tick.label1
                    for tick in axis.get_major_ticks()
                    if low <= tick.get_loc() <= high
                ),
            ]
    return [text for text in found if text.get_visible() and text.get_text().strip()]


def test_a_picture_is_a_figure_that_needs_no_screen_and_is_as_wide_as_a_notebook(picture):
    assert isinstance(picture, Figure) and picture.get_figwidth() <= 8.5
    from matplotlib import pyplot

    assert pyplot.get_fignums() == []


def test_no_text_is_cut_off(picture, written):
    whole = picture.bbox
    cut = [
        text.get_text()
        for text, box in written
        if not (
            -1 <= box.x0
            and box.x1 <= whole.width + 1
            and -1 <= box.y0
            and box.y1 <= whole.height + 1
        )
    ]
    assert cut == []


def test_no_text_is_too_small_to_be_read(written):
    assert min([text.get_fontsize() for text, _ in written], default=9) >= 7


def test_a_picture_is_a_small_png_with_a_description(picture):
    png, metadata = picture._repr_png_()
    assert (
        Image.open(BytesIO(png)).width
        == 2 * metadata["width"]
        == 2 * round(picture.get_figwidth() * 100)
    ), "two pixels for each of the page"
    assert len(png) < 100_000
    assert metadata["alt"] == picture.description
    assert picture.description or picture.get_suptitle() == ""


def test_the_computation_graph_shows_every_number_of_its_network():
    shown = graph.example()
    (W1, b1), (W2, b2) = shown.layers
    X, A1, Y = shown.x, shown.A[0], np.array([[shown.y]])
    dZ1 = (W2.T @ (shown.A[1] - Y)) * (W1 @ X + b1 > 0)
    np.testing.assert_allclose(A1, np.maximum(W1 @ X + b1, 0))
    np.testing.assert_allclose(shown.dW[1], (shown.A[1] - Y) @ A1.T)
    np.testing.assert_allclose(shown.dW[0], dZ1 @ X.T)
    np.testing.assert_allclose(shown.dX, W1.T @ dZ1)
    assert (A1[0] > 0) and (A1[1] == 0), "one ReLU is open, and one is closed"
    said = " ".join(text.get_text() for text in texts(graph.computation_graph(shown)))
    for name, values in [
        ("x", shown.x), ("dx", shown.dX), ("z", shown.Z[0]), ("dz", shown.dZ[0]),
        ("a", shown.A[0]), ("da", shown.dA[0]), ("db", shown.db[0]),
    ]:  # fmt: skip
        for j, value in enumerate(values[:, 0]):
            assert f"{name}{j} = {value:.3f}" in said
    for j, k in np.ndindex(2, 2):
        assert f"w{j}{k} = {W1[j, k]:g}\ndw{j}{k} = {shown.dW[0][j, k]:.3f}" in said
    assert f"da = {shown.dA[1][0, 0]:.3f}" in said and f"{shown.cost:.3f}" in said
    assert "dx0 = w00 · dz0 + w10 · dz1 = (0.5) · (-0.378) + (0.5) · (0.000) = -0.189" in said


def test_curves_say_what_their_axes_are(trained, images):
    for name in (
        "cost",
        "training and test",
        "rivals",
        "gradients",
        "roc",
        "trust",
        "alive",
        "timeline",
    ):
        figure = PICTURES[name](trained, images)
        assert figure.axes[0].get_xlabel() and figure.axes[0].get_title(), name


# How the three kinds of colour blindness see linear RGB (Machado et al., 2009; severity 1).
BLINDNESS = {
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def seen(colour: str, matrix) -> np.ndarray:
    "A colour as somebody sees it, in CIE L*a*b*."
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = (
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
        @ np.clip(matrix @ linear, 0, 1)
        / [0.9505, 1, 1.089]
    )
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("kind", BLINDNESS)
def test_colours_that_are_used_together_can_be_told_apart(kind):
    together = [style.BLUE, style.ORANGE, style.VERMILLION, style.GREEN, style.INK]
    for one, other in combinations(together, 2):
        distance = np.linalg.norm(
            seen(one, np.array(BLINDNESS[kind])) - seen(other, np.array(BLINDNESS[kind]))
        )
        assert distance > 10, f"{one} and {other}"


def test_a_neuron_that_never_fires_is_flagged(trained, images):
    layers = [(W.copy(), b.copy()) for W, b, *_ in trained.layers]
    layers[0][1][5] = -1e6
    killed = trained._replace(layers=layers)
    assert (1, 5) in neurons.dead(killed, images)
    assert "dead" in [text.get_text() for text in neurons.alive(killed, images).axes[0].texts]


def test_a_weight_of_zero_is_grey_and_the_largest_is_full():
    W = np.zeros((2, 12))
    W[0, 3], W[0, 4] = 0.2, -0.1
    shown = neurons.weights_as_images(W, 2)
    assert shown[0, 0, 1].tolist() == [1, 0.25, 0.5] and (shown[1] == 0.5).all()


def test_the_sweep_agrees_with_counting():
    rng = np.random.default_rng(3)
    labels, probabilities = rng.integers(0, 2, 40), rng.random(40)
    found = answers.measures_at(labels, probabilities, [0.3, 0.7])
    for i, threshold in enumerate((0.3, 0.7)):
        called = probabilities >= threshold
        assert found["accuracy"][i] == (called == labels).mean()
        assert found["sensitivity"][i] == called[labels == 1].mean() and np.isclose(
            found["specificity"][i], (~called[labels == 0]).mean()
        )
        assert found["precision"][i] == labels[called].mean()


def is_blue(colour) -> bool:
    red, _, blue, _ = to_rgba(colour)
    return blue > red


@pytest.mark.parametrize(
    "page, for_it, against",
    [("serve/static/style", "yes", "no"), ("live/static/live", "for", "against")],
)
def test_blue_speaks_for_the_answer_and_orange_against_it_in_notebooks_and_pages(
    page, for_it, against, root
):
    style = (root / "snn" / f"{page}.css").read_text()
    assert is_blue(neurons.AGAINST_FOR(1.0)) and not is_blue(neurons.AGAINST_FOR(0.0))
    for name, blue in ((for_it, True), (against, False)):
        found = re.findall(rf"--{name}: (#[0-9a-f]{{3,6}});", style)
        assert len(found) == 2, "in the light and in the dark"
        assert [is_blue(colour) for colour in found] == [blue, blue]
