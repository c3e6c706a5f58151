"""Losses against independent references: definitions, closed forms, pytorch-metric-learning."""

import math

import pytest
import torch

from histoseek.training.losses import (
    ArcFace,
    Contrastive,
    Softmax,
    Triplet,
    gaussian_divergence,
    pair_loss,
    student_assignment,
    target_assignment,
)


def by_angle(embeddings, weight, labels, scale, margin, easy):
    """Deng et al. 2019 eq. 3, literally with arccos, in float64."""
    cosine = (
        torch.nn.functional.normalize(embeddings.double())
        @ torch.nn.functional.normalize(weight.double()).T
    )
    logits = scale * cosine
    for row, label in enumerate(labels.tolist()):
        angle = math.acos(float(cosine[row, label].detach().clamp(-1, 1)))
        moved = math.cos(angle + margin)
        if easy:
            moved = moved if cosine[row, label] > 0 else float(cosine[row, label].detach())
        elif angle > math.pi - margin:
            moved = math.cos(angle) - margin * math.sin(margin)
        logits[row, label] = scale * moved
    return torch.nn.functional.cross_entropy(logits, labels)


@pytest.mark.parametrize("easy", [False, True])
@pytest.mark.parametrize(("scale", "margin"), [(30.0, 0.5), (64.0, 0.5), (16.0, 0.1)])
def test_it_is_its_definition(scale, margin, easy):
    torch.manual_seed(3)
    loss = ArcFace(8, 5, scale, margin, easy)
    embeddings = torch.randn(64, 8)
    labels = torch.randint(0, 5, (64,))
    expected = by_angle(embeddings, loss.weight.detach(), labels, scale, margin, easy)
    assert float(loss(embeddings, labels).detach()) == pytest.approx(
        float(expected.detach()), rel=1e-4
    )


def test_without_margin_it_is_a_scaled_softmax_of_cosines():
    torch.manual_seed(0)
    loss = ArcFace(4, 3, scale=10, margin=0.0)
    embeddings, labels = torch.randn(9, 4), torch.arange(9) % 3
    unit = torch.nn.functional.normalize
    plain = torch.nn.functional.cross_entropy(10 * unit(embeddings) @ unit(loss.weight).T, labels)
    assert float(loss(embeddings, labels).detach()) == pytest.approx(
        float(plain.detach()), abs=1e-4
    )


def test_the_target_logit_falls_with_the_angle_all_the_way():
    loss = ArcFace(2, 2, scale=1, margin=0.5)
    with torch.no_grad():
        loss.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    angles = torch.linspace(0, math.pi, 500)
    embeddings = torch.stack([angles.cos(), angles.sin()], 1)
    target = loss.logits(embeddings, torch.zeros(500, dtype=torch.long))[:, 0]
    assert (target.diff() < 1e-6).all()


def test_gradients_are_finite_at_both_ends():
    loss = ArcFace(2, 2)
    with torch.no_grad():
        loss.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    embeddings = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    loss(embeddings, torch.tensor([0, 0])).backward()
    assert embeddings.grad.isfinite().all() and loss.weight.grad.isfinite().all()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(7)
    embeddings = torch.randn(24, 8, generator=generator)
    return embeddings, torch.arange(24) % 5


def compare(ours, reference, embeddings, labels):
    """Same loss and same gradient."""
    a, b = (embeddings.clone().requires_grad_() for _ in range(2))
    one, two = ours(a, labels), reference(b, labels)
    one.backward()
    two.backward()
    assert float(one.detach()) == pytest.approx(float(two.detach()), rel=1e-5)
    assert torch.allclose(a.grad, b.grad, atol=1e-5)


def test_arcface_is_pytorch_metric_learnings(batch):
    """Reference: pytorch-metric-learning 2.9.0, ArcFaceLoss (margin in degrees there)."""
    from pytorch_metric_learning.losses import ArcFaceLoss

    embeddings, labels = batch
    for scale, margin in ((30.0, 0.5), (16.0, 0.2)):
        ours = ArcFace(8, 5, scale, margin)
        theirs = ArcFaceLoss(5, 8, margin=math.degrees(margin), scale=scale)
        with torch.no_grad():
            theirs.W.copy_(ours.weight.T)
        near = torch.nn.functional.normalize(embeddings + 3 * ours.weight[labels].detach())
        compare(
            ours, theirs, near, labels
        )  # where no angle passes pi - margin, as theirs has no case


@pytest.mark.parametrize("margin", [0.05, 0.2, 1.0])
def test_triplet_is_pytorch_metric_learnings(batch, margin):
    """Reference: pytorch-metric-learning 2.9.0, TripletMarginLoss over all triplets."""
    from pytorch_metric_learning.losses import TripletMarginLoss

    compare(Triplet(margin), TripletMarginLoss(margin=margin), *batch)


@pytest.mark.parametrize("margin", [0.5, 1.0])
def test_contrastive_is_pytorch_metric_learnings(batch, margin):
    """Reference: pytorch-metric-learning 2.9.0, ContrastiveLoss(pos_margin=0, neg_margin=margin)."""
    from pytorch_metric_learning.losses import ContrastiveLoss

    compare(Contrastive(margin), ContrastiveLoss(pos_margin=0, neg_margin=margin), *batch)


def test_pairs_that_coincide_give_finite_gradients():
    embeddings = torch.ones(4, 3, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1])
    (Triplet()(embeddings, labels) + Contrastive()(embeddings, labels)).backward()
    assert embeddings.grad.isfinite().all()
    alone = torch.zeros(3, dtype=torch.long)
    assert float(Triplet()(embeddings[:3].detach(), alone)) == 0


def test_softmax_is_a_linear_classifier():
    loss = Softmax(4, 3)
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    expected = torch.nn.functional.cross_entropy(loss.linear(x), y)
    assert torch.equal(loss(x, y), expected)


def test_the_pair_loss_has_its_closed_form():
    """Two one-hot rows alike, one at 45 degrees: s = 1, .7071, .7071; by hand with u = .95, l = .75."""
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5]])
    s = math.sqrt(0.5)
    expected = (2 * -math.log(1 - 1e-7) + 4 * -math.log(1 - s)) / 6
    assert float(pair_loss(rows, 0.95, 0.75)) == pytest.approx(expected, rel=1e-4)
    between = 2 * -math.log(1 - 1e-7) / 2  # with l = .5 the oblique pairs are left out
    assert float(pair_loss(rows, 0.95, 0.5)) == pytest.approx(between, abs=1e-6)


def test_the_pair_loss_drops_no_pair_that_is_different():
    """Paper 001's printed equation (4) would make "all in one cluster" cost nothing; ours sees it."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.softmax(8 * torch.randn(32, 4, generator=generator), 1)
    spread.requires_grad_()
    pair_loss(spread, 0.95, 0.5).backward()
    assert spread.grad.abs().sum() > 0 and spread.grad.isfinite().all()
    identity = torch.eye(4)
    assert float(pair_loss(identity, 0.95, 0.5)) == pytest.approx(0, abs=1e-5)
    assert float(pair_loss(torch.ones(4, 2) / 2, 0.95, 0.5)) == pytest.approx(0, abs=1e-5)


def test_dec_has_its_closed_form():
    """Xie et al. 2016, equations 1 and 3, by hand for two points and two centres on a line."""
    vectors, centres = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [2.0]])
    q = student_assignment(vectors, centres)
    expected = torch.tensor([[1 / 1.2, 0.2 / 1.2], [0.5, 0.5]])
    assert torch.allclose(q, expected)
    f = expected.sum(0)
    raw = expected**2 / f
    assert torch.allclose(target_assignment(q), raw / raw.sum(1, keepdim=True))
    assert torch.allclose(target_assignment(q).sum(1), torch.ones(2))


def test_the_divergence_of_a_gaussian_is_torchs():
    mean, log_variance = torch.randn(5, 3), torch.randn(5, 3)
    own = torch.distributions.Normal(mean, torch.exp(0.5 * log_variance))
    unit = torch.distributions.Normal(torch.zeros(5, 3), torch.ones(5, 3))
    expected = torch.distributions.kl_divergence(own, unit).sum(1).mean()
    assert torch.allclose(gaussian_divergence(mean, log_variance), expected, atol=1e-5)
