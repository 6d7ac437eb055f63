"""Neurons that belong together: balanced k-means, in NumPy."""

import numpy as np

_ROUNDS = 20


def balanced_clusters(
    points: np.ndarray,
    num_clusters: int,
    generator: np.random.Generator | None = None,
    *,
    first: np.ndarray | None = None,
) -> np.ndarray:
    """k-means in which every cluster gets the same number of points.

    Lloyd's algorithm from k-means++ centres, or from points that were chosen,
    whose assignment fills clusters evenly: every point asks for the nearest
    cluster that has room, a cluster takes those nearest to it, and who was
    turned down asks again. Of the rounds the one with the least sum of squared
    distances is kept. The same seed and points give the same clusters.

    MoEfication (arXiv 2110.01786, section 3.2) clusters neurons by their input
    weights in this way, with another algorithm for the balance.

    Args:
        points: Float `(N, D)`.
        num_clusters: A divisor of `N`.
        generator: For the first centres; not used with `first`.
        first: int `(num_clusters,)`, the points that are the first centres.
            Defaults to `None`: drawn.

    Returns:
        int `(N,)`, the cluster of each point, from 0.

    Example:
        >>> points = np.array([[0.0], [9.0], [0.1], [9.1]])
        >>> labels = balanced_clusters(points, 2, np.random.default_rng(0))
        >>> bool(labels[0] == labels[2] != labels[1])
        True
    """
    points = np.asarray(points, "float64")
    points = points - points.mean(axis=0)
    if first is None:
        first = _first_centres(points, num_clusters, generator)
    centres = points[first]
    best, least = np.zeros(len(points), int), np.inf
    last = None
    for _ in range(_ROUNDS):
        distances = _squared_distances(points, centres)
        labels = _even_assignment(distances)
        total = np.take_along_axis(distances, labels[:, None], 1).sum()
        if total < least:
            best, least = labels, total
        if last is not None and np.array_equal(labels, last):
            break
        last = labels
        centres = np.stack(
            [points[labels == n].mean(axis=0) for n in range(num_clusters)]
        )
    return best


def _squared_distances(points, centres):
    """`(N, C)`, without an array of `N * C * D` entries."""
    cross = points @ centres.T
    own = (points**2).sum(1)[:, None] + (centres**2).sum(1)
    return np.maximum(own - 2.0 * cross, 0.0)


def _first_centres(points, count, generator):
    """k-means++: likelier the farther from the centres so far."""
    chosen = [int(generator.integers(len(points)))]
    nearest = np.full(len(points), np.inf)
    while len(chosen) < count:
        newest = points[chosen[-1:]]
        nearest = np.minimum(nearest, _squared_distances(points, newest)[:, 0])
        nearest[chosen] = 0.0
        total = nearest.sum()
        if total == 0.0:  # all the others are copies of a centre
            others = np.setdiff1d(np.arange(len(points)), chosen)
            chosen += others[: count - len(chosen)].tolist()
            break
        chosen.append(int(generator.choice(len(points), p=nearest / total)))
    return chosen


def _even_assignment(distances):
    """Labels with equally many of each, near what is nearest."""
    count, clusters = distances.shape
    room = np.full(clusters, count // clusters)
    labels = np.full(count, -1)
    waiting = np.arange(count)
    while len(waiting):
        # In every round a cluster gets full, or nobody is turned down.
        open_only = np.where(room > 0, distances[waiting], np.inf)
        requested = open_only.argmin(axis=1)
        for cluster in np.unique(requested):
            asking = waiting[requested == cluster]
            order = np.argsort(distances[asking, cluster], kind="stable")
            taken = asking[order[: room[cluster]]]
            labels[taken] = cluster
            room[cluster] -= len(taken)
        waiting = waiting[labels[waiting] < 0]
    return labels
