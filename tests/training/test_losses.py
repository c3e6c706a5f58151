"""ArcFace against its definition written with angles, and its behaviour at the edges."""

import math

import pytest
import torch

from histoseek.training.losses import ArcFace


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
