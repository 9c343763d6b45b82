"""Selections: disjoint, balanced, deterministic, and equal to plain sorts and literal greedy loops."""

import pytest
import torch

from hq_lib.ptq import selection
from hq_lib.ptq.selection import scores

LABELS = torch.arange(60) % 4
SCORES = torch.rand(60, generator=torch.Generator().manual_seed(0))


def blobs(n: int = 60, d: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- strategies


def test_lowest_highest_and_trimmed_are_plain_sorts():
    order = SCORES.argsort(stable=True)
    assert set(selection.select(SCORES, 10).tolist()) == set(order[:10].tolist())
    assert set(selection.select(SCORES, 10, strategy="highest").tolist()) == set(order[-10:].tolist())
    trimmed = selection.select(SCORES, 10, strategy="trimmed", trim=0.1)
    assert set(trimmed.tolist()) == set(order[6:16].tolist())


def test_balanced_sets_rank_within_class():
    chosen = selection.select(SCORES, 12, labels=LABELS)
    for c in range(4):
        members = (c == LABELS).nonzero().flatten()
        best = members[SCORES[members].argsort()[:3]]
        assert set(chosen[LABELS[chosen] == c].tolist()) == set(best.tolist())
    counts = torch.bincount(LABELS[selection.select(SCORES, 14, labels=LABELS)])
    assert counts.tolist() == [4, 4, 3, 3]


@pytest.mark.parametrize("strategy", ["lowest", "highest", "trimmed", "random"])
@pytest.mark.parametrize("labels", [None, LABELS])
def test_a_set_is_full_without_repeats_and_deterministic(strategy, labels):
    options = {"strategy": strategy, "labels": labels, "seed": 3}
    chosen = selection.select(SCORES, 12, **options)
    assert len(chosen.unique()) == 12
    assert torch.equal(chosen, selection.select(SCORES, 12, **options))
    if labels is not None:
        assert torch.bincount(LABELS[chosen]).tolist() == [3, 3, 3, 3]


def test_random_depends_on_the_seed_and_not_on_the_scores():
    a, b = (selection.select(scores, 20, strategy="random", labels=LABELS, seed=1) for scores in (SCORES, None))
    assert torch.equal(a, b)
    assert not torch.equal(a, selection.select(None, 20, strategy="random", labels=LABELS, seed=2))


def test_a_pool_with_replacement_holds_as_many_different_images_as_chance_leaves():
    drawn = [len(selection.draw_pool(60, 60, seed=s, replacement=True).unique()) for s in range(200)]
    assert sum(drawn) / 200 == pytest.approx(60 * (1 - (1 - 1 / 60) ** 60), abs=0.6)  # sd of the mean 0.16
    longer = selection.draw_pool(5, 12, seed=1, replacement=True)
    assert len(longer) == 12
    assert torch.equal(longer, longer.sort().values)


def test_a_short_or_repeated_set_is_refused():
    good = torch.tensor([3, 1, 2])
    assert selection.check_set(good, 3) is good
    with pytest.raises(ValueError, match="4 images were promised"):
        selection.check_set(good, 4)
    with pytest.raises(ValueError, match="only 2 of 3 images are different"):
        selection.check_set(torch.tensor([1, 2, 1]), 3)


def test_random_takes_every_image_equally_often():
    counts = torch.zeros(60)
    for seed in range(400):
        counts[selection.select(SCORES, 15, strategy="random", seed=seed)] += 1
    assert ((counts - 100).abs() < 5 * (400 * 0.25 * 0.75) ** 0.5).all()


def test_ties_go_to_the_lower_position():
    assert selection.select(torch.zeros(9), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize(("call", "message"), [
    (lambda: selection.select(SCORES, 61), "pool of 60"),
    (lambda: selection.select(SCORES, 12, labels=LABELS, n_classes=5), "class 4 of 5 has no image"),
    (lambda: selection.select(SCORES, 32, labels=LABELS // 3), "class 1 has 15 images"),
    (lambda: selection.select(SCORES, 60, strategy="trimmed"), "57 images to choose from"),
    (lambda: selection.select(SCORES, 0), "n >= 1"), (lambda: selection.select(None, 5), "no number of images"),
    (lambda: selection.select(None, 5, labels=LABELS), "needs scores"),
    (lambda: selection.select(SCORES, 5, strategy="lowst"), "did you mean 'lowest'"),
    (lambda: selection.select(SCORES, 5, labels=LABELS[:-1]), r"speak of \[59, 60\]"),
    (lambda: selection.select(SCORES.clone().fill_(float("nan")), 5), "60 NaN"),
    (lambda: selection.draw_pool(5, 6, seed=0), "cannot be drawn"),
])  # fmt: skip
def test_impossible_wishes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------- features


def test_herding_is_the_literal_loop_and_follows_the_mean():
    phi = blobs()
    mu, chosen = phi.mean(0), []
    for t in range(1, 13):
        distance = [
            (mu - (phi[chosen].sum(0) + phi[i]) / t).norm().item() if i not in chosen else torch.inf for i in range(60)
        ]
        chosen.append(distance.index(min(distance)))
    assert scores.herding(phi, 12).tolist() == chosen
    random = phi[selection.select(None, 12, strategy="random", n_images=60)].mean(0)
    assert (phi[chosen].mean(0) - mu).norm() < 0.5 * (random - mu).norm()


def test_k_center_is_the_literal_loop():
    phi = blobs(seed=1)
    chosen = [int((phi - phi.mean(0)).norm(dim=1).argmin())]
    while len(chosen) < 9:
        chosen.append(int(torch.cdist(phi, phi[chosen]).min(1).values.argmax()))
    assert scores.k_center(phi, 9).tolist() == chosen


def test_selections_never_repeat_an_image_even_among_equal_ones():
    same = torch.ones(12, 3)
    for chosen in (scores.k_center(same, 12), scores.herding(same, 12)):
        assert sorted(chosen.tolist()) == list(range(12))


def test_knowledge_distance_flags_the_outlier_in_any_layer():
    layers = [blobs(40, 3, seed=2), blobs(40, 8, seed=3) * 1000]
    layers[0][7] += 20
    distance = scores.knowledge_distance(layers, n_clusters=1)
    assert distance.argmax() == 7
    want = sum((f - f.mean(0)).norm(dim=1) / (f - f.mean(0)).norm(dim=1).mean() for f in layers)
    torch.testing.assert_close(distance, want, rtol=1e-4, atol=1e-4)


def test_bn_distance_is_zero_on_its_own_statistics():
    x = torch.randn(6, 4, 9, 9, generator=torch.Generator().manual_seed(0))
    mean, square = scores.channel_moments(x)
    distance = scores.bn_distance(mean, square, x[2].mean((1, 2)), x[2].var((1, 2), correction=0))
    assert distance.argmin() == 2
    assert distance[2].item() == pytest.approx(0.0, abs=1e-9)
    by_hand = (x[0].mean((1, 2)) - x[2].mean((1, 2))).square().sum() + (
        x[0].std((1, 2), correction=0) - x[2].std((1, 2), correction=0)
    ).square().sum()
    assert distance[0].item() == pytest.approx(by_hand.item(), rel=1e-4)


def test_reconstruction_error_per_image():
    x = blobs(7, 12).view(7, 3, 2, 2)
    error = scores.reconstruction_error(x, lambda v: v, lambda v: v.round(), batch_size=3)
    torch.testing.assert_close(error, (x - x.round()).square().mean((1, 2, 3)))


@pytest.mark.parametrize("call", [
    lambda: scores.herding(blobs(5), 6), lambda: scores.k_center(blobs(5), 0),
    lambda: scores.herding(torch.full((5, 2), float("nan")), 2), lambda: scores.herding(torch.ones(5), 2),
    lambda: scores.knowledge_distance([]), lambda: scores.knowledge_distance([blobs(5)], n_clusters=6),
])  # fmt: skip
def test_bad_features_are_refused(call):
    with pytest.raises(ValueError, match=r"wanted|NaN|one row per image|no layers"):
        call()
