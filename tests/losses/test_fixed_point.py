"""Movement of contexts between sweeps: raw mean squares, with the older contexts held."""

import torch

from newllm.losses.fixed_point import fixed_point_loss, is_converged, movement

NEW = torch.tensor([[1.0, 2.0], [0.0, 4.0], [1.0, 1.0]])
PREVIOUS = torch.tensor([[1.0, 0.0], [3.0, 0.0], [1.0, 1.1]])


def test_movement_is_the_mean_square_of_the_change():
    torch.testing.assert_close(movement(NEW, PREVIOUS), torch.tensor([2.0, 12.5, 0.005]))
    torch.testing.assert_close(fixed_point_loss(NEW, PREVIOUS), torch.tensor(14.505 / 3))


def test_contexts_below_the_threshold_are_converged():
    assert is_converged(NEW, PREVIOUS, threshold=0.03).tolist() == [False, False, True]
    assert is_converged(NEW, NEW, threshold=0.0).tolist() == [False, False, False]


def test_the_older_contexts_get_no_gradient():
    new, previous = NEW.clone().requires_grad_(), PREVIOUS.clone().requires_grad_()

    fixed_point_loss(new, previous).backward()

    assert previous.grad is None
    torch.testing.assert_close(new.grad, (NEW - PREVIOUS) / 3)
