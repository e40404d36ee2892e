import pytest
import torch
from torch import Tensor, nn

from newllm.models.create import create_model
from newllm.recurrence import contraction, newton, relative_change, shift, solve, sweep, unroll
from newllm.trainers.lag import carried_map, sweep_map, trained_states


def tanh_map(inputs_BTD: Tensor, weight_DD: Tensor):
    """h_t = tanh(W h_{t-1} + x_t): pointwise in t, so that exact gradients are easy to write down."""
    return lambda previous: torch.tanh(previous @ weight_DD.T + inputs_BTD)


def exact_tanh_states(inputs_BTD: Tensor, weight_DD: Tensor, *, truncate: int | None = None) -> Tensor:
    """States step by step; with `truncate` K each state's gradient reaches back over K - 1 links, as K sweeps do."""
    states = []
    hidden = torch.zeros_like(inputs_BTD[:, 0])
    for t in range(inputs_BTD.shape[1]):
        hidden = torch.tanh(hidden @ weight_DD.T + inputs_BTD[:, t])
        states.append(hidden)
    if truncate is None:
        return torch.stack(states, dim=1)
    truncated = []
    for t in range(inputs_BTD.shape[1]):
        first = t - truncate + 1
        hidden = states[first - 1].detach() if first > 0 else torch.zeros_like(inputs_BTD[:, 0])
        for s in range(max(first, 0), t + 1):
            hidden = torch.tanh(hidden @ weight_DD.T + inputs_BTD[:, s])
        truncated.append(hidden)
    return torch.stack(truncated, dim=1)


def feedback_model(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A small feedback model whose recurrence does something: the projection starts at zero and is filled here."""
    model = create_model(
        "infini", vocab_size=23, seed=1, feedback=kind, dim=16, num_layers=2, num_heads=2, segment_length=3
    )
    nn.init.normal_(model.feedback.projection.weight, std=0.2)
    return model.to(dtype)


def test_shift_moves_every_state_one_position_on():
    states = torch.arange(12.0).view(1, 4, 3)
    first = torch.tensor([[7.0, 8.0, 9.0]])

    assert shift(states, first).tolist() == [[[7, 8, 9], [0, 1, 2], [3, 4, 5], [6, 7, 8]]]
    assert shift(states)[0, 0].tolist() == [0, 0, 0]


def test_positions_before_k_are_exact_after_k_sweeps():
    inputs, weight = torch.randn(2, 7, 5).double(), torch.randn(5, 5).double() / 2
    exact = exact_tanh_states(inputs, weight)
    states = torch.randn(2, 7, 5).double()

    for k in range(1, 8):
        states = sweep(tanh_map(inputs, weight), states)

        assert torch.allclose(states[:, :k], exact[:, :k], atol=1e-12)
        assert k == 7 or not torch.allclose(states[:, k:], exact[:, k:], atol=1e-6)


@pytest.mark.parametrize("truncate", [1, 2, 3, 5])
def test_differentiated_sweeps_from_a_converged_cache_give_the_truncated_gradient(truncate: int):
    inputs = torch.randn(2, 9, 4).double()
    weight = (torch.randn(4, 4).double() / 2).requires_grad_()
    targets = torch.randn(2, 9, 4).double()
    cache = exact_tanh_states(inputs, weight).detach()

    states = solve(tanh_map(inputs, weight), cache, sweeps=truncate, differentiate=truncate).states
    (lagged,) = torch.autograd.grad(((states - targets) ** 2).sum(), weight)
    (expected,) = torch.autograd.grad(
        ((exact_tanh_states(inputs, weight, truncate=truncate) - targets) ** 2).sum(), weight
    )

    assert (lagged - expected).abs().max() < 1e-10


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("kind", ["additive", "gated"])
def test_t_sweeps_equal_unroll_from_any_start(kind: str, dtype: torch.dtype, tolerance: float):
    model = feedback_model(kind, dtype)
    input_ids = torch.randint(23, (2, 8))

    with torch.no_grad():
        exact, _ = unroll(model, input_ids, model.initial_state(2))
        swept = solve(sweep_map(model, input_ids), torch.randn(2, 8, 16, dtype=dtype), sweeps=8).states

    assert (swept - exact).abs().max() < tolerance


def test_full_sweeps_give_the_gradient_of_exact_training():
    model = feedback_model("additive", torch.float64)
    input_ids = torch.randint(23, (2, 6))
    parameters = list(model.parameters())

    exact, _ = unroll(model, input_ids, model.initial_state(2))
    swept = solve(sweep_map(model, input_ids), torch.zeros(2, 6, 16).double(), sweeps=6, differentiate=6).states
    wanted = torch.autograd.grad((exact**2).sum(), parameters, allow_unused=True)
    got = torch.autograd.grad((swept**2).sum(), parameters, allow_unused=True)

    for want, have in zip(wanted, got, strict=True):
        assert (want is None) == (have is None)
        assert want is None or (want - have).abs().max() < 1e-10


def test_solve_stops_at_the_tolerance_and_says_how_it_got_there():
    inputs, weight = torch.randn(1, 64, 4), torch.eye(4) / 4

    solution = solve(tanh_map(inputs, weight), torch.zeros(1, 64, 4), sweeps=64, tolerance=1e-4)

    assert 3 <= solution.sweeps == len(solution.residuals) < 20
    assert solution.residuals[-1] <= 1e-4 < solution.residuals[-2]
    assert solution.contraction is not None
    assert solution.contraction < 0.5


def test_the_sweeps_of_a_training_step_read_nothing_from_the_device():
    solution = solve(tanh_map(torch.randn(1, 5, 4), torch.eye(4)), torch.zeros(1, 5, 4), sweeps=3, differentiate=1)

    assert solution.residuals == ()


def test_no_gradient_reaches_the_start():
    start = torch.zeros(1, 5, 4, requires_grad=True)
    weight = torch.eye(4, requires_grad=True)

    states = solve(tanh_map(torch.randn(1, 5, 4), weight), start, sweeps=2, differentiate=2).states

    assert torch.autograd.grad(states.sum(), [start, weight], allow_unused=True)[0] is None


def test_contraction_is_the_geometric_mean_of_the_ratios_after_the_first():
    assert contraction([9.0, 8.0, 4.0, 2.0]) == pytest.approx(0.5)
    assert contraction([9.0, 8.0]) is None
    assert relative_change(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0])) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("sweeps", "differentiate", "message"), [(0, 0, "makes no sweep"), (2, 3, "is not within sweeps=2")]
)
def test_impossible_numbers_of_sweeps_are_refused(sweeps: int, differentiate: int, message: str):
    with pytest.raises(ValueError, match=message):
        solve(lambda previous: previous, torch.zeros(1, 2, 3), sweeps=sweeps, differentiate=differentiate)


def test_truncated_unrolling_keeps_the_states_and_cuts_the_gradient():
    model = feedback_model("additive", torch.float64)
    input_ids = torch.randint(23, (1, 6))
    weight = model.feedback.projection.weight

    full, _ = unroll(model, input_ids, model.initial_state(1))
    cut, _ = unroll(model, input_ids, model.initial_state(1), truncate=2)

    assert torch.equal(full, cut)
    (full_gradient,) = torch.autograd.grad(full.sum(), weight)
    (cut_gradient,) = torch.autograd.grad(cut.sum(), weight)
    assert not torch.allclose(full_gradient, cut_gradient)


def pointwise_model(name: str, **keys) -> nn.Module:
    """A small model in fp64 whose positions are linked by the fed-back state alone, and strongly."""
    model = create_model(name, vocab_size=23, seed=1, **keys).double()
    for parameter_name, parameter in model.named_parameters():
        if "projection" in parameter_name or "gate" in parameter_name:
            nn.init.normal_(parameter, std=0.2)
    return model


POINTWISE = {
    "additive": lambda: pointwise_model(
        "pythia", feedback="additive", window=1, dim=16, num_layers=2, num_heads=2, mlp_dim=32
    ),
    "gated": lambda: pointwise_model(
        "pythia", feedback="gated", window=1, dim=16, num_layers=2, num_heads=2, mlp_dim=32
    ),
    "context": lambda: pointwise_model("context", dim=12, context_dim=16, num_layers=2),
    "context_pythia": lambda: pointwise_model("context_pythia", dim=16, context_dim=12, num_heads=2, mlp_dim=32),
    "new_llm": lambda: pointwise_model("new_llm", dim=12, context_dim=16, hidden_dim=20),
}


def test_every_newton_step_makes_one_more_position_exact_from_any_start():
    inputs, weight = torch.randn(2, 7, 5).double(), torch.randn(5, 5).double()
    exact = exact_tanh_states(inputs, weight)
    states = torch.randn(2, 7, 5).double()

    for k in range(1, 8):
        states = newton(tanh_map(inputs, weight), states)

        assert torch.allclose(states[:, :k], exact[:, :k], atol=1e-10)
        assert not states.requires_grad


@pytest.mark.parametrize(("gain", "fewer_than"), [(0.5, 5), (0.9, 6), (1.2, 9)])
def test_newton_steps_settle_sooner_than_sweeps_and_square_the_error(gain: float, fewer_than: int):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 32, generator=generator).double() / 32**0.5 * gain
    step = tanh_map(torch.randn(2, 512, 32, generator=generator).double(), weight)
    zeros = torch.zeros(2, 512, 32).double()

    swept = solve(step, zeros, sweeps=512, tolerance=1e-4)
    stepped = solve(step, zeros, sweeps=512, tolerance=1e-4, solver="newton")
    exact = solve(step, zeros, sweeps=512).states
    residuals = stepped.residuals

    assert relative_change(exact, stepped.states) < 1e-6
    assert stepped.sweeps <= fewer_than < swept.sweeps
    assert residuals[-1] < 30 * residuals[-2] ** 2


@pytest.mark.parametrize("name", POINTWISE)
def test_a_newton_step_from_exact_states_has_the_gradient_of_exact_training(name: str):
    model = POINTWISE[name]()
    input_ids = torch.randint(23, (2, 9))
    parameters = list(model.parameters())
    exact, _ = unroll(model, input_ids, model.initial_state(2))
    by_states = torch.randn_like(exact)

    stepped = trained_states(model, input_ids, exact.detach(), sweeps=1, solver="newton")
    swept = trained_states(model, input_ids, exact.detach(), sweeps=1)
    wanted, got, truncated = (
        torch.autograd.grad((states * by_states).sum(), parameters, allow_unused=True)
        for states in (exact, stepped, swept)
    )

    assert (stepped - exact).abs().max() < 1e-10
    for want, have in zip(wanted, got, strict=True):
        assert (want is None) == (have is None)
        assert want is None or (want - have).abs().max() < 1e-10 * max(1.0, want.abs().max())
    # One sweep's gradient ends at the state before: were the recurrence too weak to show, nothing would have been compared.
    assert any(
        want is not None and (want - have).abs().max() > 1e-3 * want.abs().max()
        for want, have in zip(wanted, truncated, strict=True)
    )


@pytest.mark.parametrize("name", POINTWISE)
def test_newton_steps_reach_the_exact_states_of_every_pointwise_model(name: str):
    model = POINTWISE[name]()
    input_ids = torch.randint(23, (2, 12))
    with torch.no_grad():
        exact, _ = unroll(model, input_ids, model.initial_state(2))
        states = trained_states(model, input_ids, torch.zeros_like(exact), sweeps=12, solver="newton")

    assert (states - exact).abs().max() < 1e-10


def test_the_state_before_the_first_position_gets_its_gradient_through_newton_steps():
    inputs, weight = torch.randn(2, 6, 4).double(), torch.randn(4, 4).double() / 2
    first = torch.randn(2, 4).double().requires_grad_()
    step, start = tanh_map(inputs, weight), torch.zeros(2, 6, 4).double()

    swept = solve(step, start, sweeps=6, differentiate=6, first_BD=first).states
    stepped = solve(step, start, sweeps=7, differentiate=1, first_BD=first, solver="newton").states
    wanted, got = (torch.autograd.grad((states**2).sum(), first)[0] for states in (swept, stepped))

    assert (wanted - got).abs().max() < 1e-10


def test_a_newton_step_that_would_grow_too_large_is_taken_in_part_or_not_at_all():
    generator = torch.Generator().manual_seed(0)
    weight = 1.5 / 32**0.5 * torch.randn(32, 32, generator=generator)
    step = tanh_map(torch.randn(3, 512, 32, generator=generator), weight)
    start = torch.zeros(3, 512, 32)

    swept, stepped = sweep(step, start), newton(step, start)
    by_text = (stepped - swept).norm(dim=(1, 2))

    # The whole step is 10^10 times the states.
    assert stepped.norm() < 10 * swept.norm()
    assert relative_change(swept, newton(step, swept)) < 10
    assert (by_text > 0).any()


def test_each_text_is_damped_as_it_needs():
    """h_t = 2 h_{t-1} + x_t runs away from what is given, h_t = h_{t-1} / 2 + x_t does not."""
    growth = torch.tensor([2.0, 0.5]).view(2, 1, 1)
    inputs = torch.ones(2, 64, 1)
    start = torch.ones(2, 64, 1)

    running, settled = newton(lambda previous: growth * previous + inputs, start)

    assert settled[-1].item() == pytest.approx(2.0)
    assert running.abs().max() < 10


def test_autocast_rounds_the_map_and_not_what_positions_tell_each_other():
    model = POINTWISE["context"]().float()
    input_ids, start = torch.randint(23, (2, 12)), torch.zeros(2, 12, 28)
    with torch.no_grad():
        expected = trained_states(model, input_ids, start, sweeps=12, solver="newton")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            stepped = newton(carried_map(model, input_ids), expected[..., :16])

    assert stepped.dtype == torch.float32
    assert relative_change(expected[..., :16], stepped) < 0.02
