"""The losses are those of the textbook, however they are cut, and their logits never exist all at once."""

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from smol_post import losses
from smol_post.losses import preference_losses, summed_cross_entropy, token_log_probs
from smol_post.trainer_block import LOSSES

pytestmark = pytest.mark.usefixtures("one_thread")
N, V, D = 23, 50, 8
Scoring = Callable[[Tensor, Tensor, Tensor], Tensor]


def full_sum(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy((hidden @ weight.t()).float(), labels, reduction="sum")


def full_log_probs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return -functional.cross_entropy((hidden @ weight.t()).float(), labels, reduction="none")


BOTH = pytest.mark.parametrize(
    ("ours", "full"), [(summed_cross_entropy, full_sum), (token_log_probs, full_log_probs)]
)


@pytest.fixture(params=[1, 4, N, 2 * N], ids=lambda rows: f"{rows}_positions_a_chunk")
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Chunks of one position, of some (the last one shorter), of all, of more."""
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", request.param * V + V // 2)
    return request.param


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 4 * V)


def inputs(num_positions: int = N, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_positions, D, generator=draw).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=draw).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, V, (num_positions,), generator=draw)


def gradients(of: Tensor, *wanted: Tensor) -> tuple[Tensor, ...]:
    """Of a sum whose parts weigh differently, so that each one's incoming gradient counts."""
    return torch.autograd.grad((of * torch.linspace(-3, 5, of.numel()).view(of.shape)).sum(), wanted)


@BOTH
@pytest.mark.usefixtures("chunks")
def test_values_and_gradients_are_those_of_the_full_logits(ours: Scoring, full: Scoring) -> None:
    hidden, weight, labels = inputs()
    found, wanted = ours(hidden, weight, labels), full(hidden, weight, labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for one, other in zip(gradients(found, hidden, weight), gradients(wanted, hidden, weight), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ours", [summed_cross_entropy, token_log_probs])
@pytest.mark.usefixtures("small_chunks")
def test_in_float64_the_gradients_are_the_slopes(ours: Scoring) -> None:
    hidden, weight, labels = inputs(9, torch.float64)
    assert ours(hidden, weight, labels).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda *given: ours(*given, labels) / 7, (hidden, weight))


@BOTH
@pytest.mark.usefixtures("small_chunks")
def test_columns_of_another_tensor_serve_as_hidden_states_and_labels(ours: Scoring, full: Scoring) -> None:
    hidden, weight, labels = inputs()
    wide = torch.cat([hidden, hidden], 1).t().contiguous().t()[:, :D]
    columns = torch.stack([labels, labels], 1)[:, 0]
    assert not wide.is_contiguous()
    torch.testing.assert_close(ours(wide, weight, columns), full(hidden, weight, labels))
    found = gradients(ours(wide, weight, columns), hidden, weight)
    for one, other in zip(found, gradients(full(hidden, weight, labels), hidden, weight), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ours", [summed_cross_entropy, token_log_probs])
def test_in_bf16_a_confident_position_still_has_a_gradient_and_a_hopeless_one_a_finite_loss(
    ours: Scoring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits 8 and 0, label 0: 1 - p is 3.35e-4, while p itself is 1 in bfloat16. Then 200 and 0, label 1."""
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 2)
    weight = torch.tensor([[1.0], [0.0]], dtype=torch.bfloat16)
    hidden = torch.tensor([[8.0], [200.0]], dtype=torch.bfloat16, requires_grad=True)
    loss = ours(hidden, weight, torch.tensor([0, 1])).sum().abs()
    (d_hidden,) = torch.autograd.grad(loss, hidden)
    assert loss.item() == pytest.approx(200, rel=1e-5)
    assert d_hidden[:, 0].tolist() == pytest.approx([-3.35e-4, 1.0], rel=1e-2)


@pytest.mark.usefixtures("chunks")
def test_an_output_may_be_used_twice_and_gone_back_through_again() -> None:
    hidden, weight, labels = inputs()
    loss, wanted = summed_cross_entropy(hidden, weight, labels), full_sum(hidden, weight, labels)
    once = torch.autograd.grad(wanted, (hidden, weight), retain_graph=True)
    (wanted**2 / 100 + 3 * wanted).backward()
    combined = [one.grad.clone() for one in (hidden, weight)]
    hidden.grad = weight.grad = None
    kept = [torch.autograd.grad(factor * loss, (hidden, weight), retain_graph=True) for factor in (1, 2, 0)]
    (loss**2 / 100 + 3 * loss).backward(retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    for factor, found in zip((1, 2, 0), kept, strict=True):
        for one, other in zip(found, once, strict=True):
            torch.testing.assert_close(one, factor * other, rtol=1e-5, atol=1e-5)
    for found, one, other in zip((hidden.grad, weight.grad), combined, once, strict=True):
        torch.testing.assert_close(found, one + 3 * other, rtol=1e-5, atol=1e-4)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("ours", [summed_cross_entropy, token_log_probs])
def test_gradients_of_gradients_are_refused_rather_than_wrong(ours: Scoring) -> None:
    hidden, weight, labels = inputs()
    (first,) = torch.autograd.grad(ours(hidden, weight, labels).square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


class Seen(TorchDispatchMode):
    """What torch really does: operations, types of matrix products, the size of the largest new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.products: list[torch.dtype] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.names.append(func._schema.name)
        if self.names[-1] in {"aten::mm", "aten::addmm", "aten::addmm_"}:
            self.products.append(made.dtype)
        given = [one for one in (*args, *(kwargs or {}).values()) if isinstance(one, Tensor)]
        known = {one.untyped_storage().data_ptr() for one in given}
        for one in made if isinstance(made, tuple | list) else [made]:
            if isinstance(one, Tensor) and one.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, one.numel())
        return made


@BOTH
@pytest.mark.usefixtures("small_chunks")
def test_no_tensor_as_large_as_the_logits_is_ever_made(ours: Scoring, full: Scoring) -> None:
    hidden, weight, labels = inputs(16 * N)
    for scoring, bound in ((ours, max(V * D, 16 * N * D)), (full, None)):
        with Seen() as seen:
            (scoring(hidden, weight, labels).sum() / 3).backward()
        if bound:
            assert seen.largest <= bound
        else:  # which shows that it would be seen
            assert seen.largest == 16 * N * V


@pytest.mark.parametrize("ours", [summed_cross_entropy, token_log_probs])
def test_a_few_positions_take_no_more_memory_than_their_logits(ours: Scoring) -> None:
    hidden, weight, labels = inputs()
    with Seen() as seen:
        ours(hidden, weight, labels).sum().backward()
    assert seen.largest == N * V


@pytest.mark.usefixtures("small_chunks")
def test_the_last_backward_pass_of_a_sum_makes_nothing_as_large_as_the_weight() -> None:
    hidden, weight, labels = inputs()
    loss = summed_cross_entropy(hidden, weight, labels) / 3
    with Seen() as seen:
        loss.backward()
    assert seen.largest <= 1


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("of_hidden", "of_weight"), itertools.product([True, False], repeat=2))
@pytest.mark.parametrize("grad_mode", [True, False])
def test_only_gradients_that_are_wanted_are_computed(
    of_hidden: bool, of_weight: bool, grad_mode: bool
) -> None:
    hidden, weight, labels = inputs()
    wanted = full_log_probs(hidden, weight, labels)
    d_hidden, d_weight = torch.autograd.grad(-wanted.sum(), (hidden, weight))
    hidden.requires_grad_(of_hidden)
    weight.requires_grad_(of_weight)
    num_chunks = -(-N // 4)
    num_wanted = of_hidden + of_weight if grad_mode else 0
    for ours, num_more in ((summed_cross_entropy, 0), (token_log_probs, num_wanted > 0)):
        hidden.grad = weight.grad = None
        with Seen() as seen, torch.set_grad_enabled(grad_mode):
            found = ours(hidden, weight, labels)
        torch.testing.assert_close(found, -wanted.sum() if ours is summed_cross_entropy else wanted)
        assert found.requires_grad == (num_wanted > 0)
        with seen:
            if found.requires_grad:
                (found if ours is summed_cross_entropy else -found.sum()).backward()
        assert len(seen.products) == num_chunks * (1 + num_wanted + num_more)
        assert seen.names.count("aten::exp") == num_chunks * (num_wanted > 0)
        for one, is_wanted, gradient in ((hidden, of_hidden, d_hidden), (weight, of_weight, d_weight)):
            if is_wanted and grad_mode:
                torch.testing.assert_close(one.grad, gradient, rtol=1e-5, atol=1e-5)
            else:
                assert one.grad is None


def test_log_probabilities_of_one_chunk_are_not_computed_twice() -> None:
    hidden, weight, labels = inputs()
    with Seen() as seen:
        token_log_probs(hidden, weight, labels).sum().backward()
    assert len(seen.products) == 3


@BOTH
@pytest.mark.parametrize("num_elements", [0, 1])
def test_no_position_at_all_is_a_zero_that_can_be_gone_back_through(
    ours: Scoring, full: Scoring, num_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", num_elements - 1)
    hidden, weight, labels = inputs(0)
    found = ours(hidden, weight, labels)
    assert found.shape == full(hidden, weight, labels).shape
    assert found.sum().item() == 0
    found.sum().backward()
    assert torch.equal(weight.grad, torch.zeros(V, D))
    assert hidden.grad.shape == (0, D)


@BOTH
@pytest.mark.usefixtures("chunks")
def test_bf16_autocast_is_as_close_to_float32_as_the_full_logits_under_it(
    ours: Scoring, full: Scoring
) -> None:
    """Positions are alike here, so that a sum over chunks in bfloat16 would stand still and show."""
    hidden, weight, labels = inputs(16 * N)
    hidden = (hidden.detach() / 10 + 1).requires_grad_()
    exact = full(hidden, weight, labels)
    d_exact = gradients(exact.sum(), hidden, weight)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = ours(hidden, weight, labels), full(hidden, weight, labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    d_found, d_wanted = gradients(found.sum(), hidden, weight), gradients(wanted.sum(), hidden, weight)
    for one, other, truth in zip(d_found, d_wanted, d_exact, strict=True):
        assert one.dtype == torch.float32
        assert (one - truth).norm() <= 1.1 * (other - truth).norm()


@pytest.mark.parametrize("ours", [summed_cross_entropy, token_log_probs])
@pytest.mark.usefixtures("chunks")
def test_under_bf16_autocast_every_matrix_product_is_bf16(ours: Scoring) -> None:
    hidden, weight, labels = inputs()
    with Seen() as seen:
        with torch.autocast("cpu", torch.bfloat16):
            found = ours(hidden, weight, labels)
        found.sum().backward()
    assert set(seen.products) == {torch.bfloat16}


@BOTH
@pytest.mark.usefixtures("chunks")
def test_bf16_weights_get_bf16_gradients_and_a_float32_loss(ours: Scoring, full: Scoring) -> None:
    hidden, weight, labels = inputs(dtype=torch.bfloat16)
    found, wanted = ours(hidden, weight, labels), full(hidden, weight, labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for one, other in zip(gradients(found, hidden, weight), gradients(wanted, hidden, weight), strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one, other, rtol=3e-2, atol=3e-1)


def test_types_that_do_not_agree_are_refused_without_autocast() -> None:
    hidden, weight, labels = inputs()
    for ours in (summed_cross_entropy, token_log_probs):
        with pytest.raises(RuntimeError, match="dtype"):
            ours(hidden.bfloat16(), weight, labels)


@BOTH
@pytest.mark.usefixtures("small_chunks")
def test_a_head_tied_to_the_embedding_gets_both_gradients(ours: Scoring, full: Scoring) -> None:
    _, weight, labels = inputs()
    found, wanted = (
        gradients(scoring(weight[labels].tanh(), weight, labels), weight) for scoring in (ours, full)
    )
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-5)


@BOTH
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(ours: Scoring, full: Scoring, reentrant: bool) -> None:
    hidden, weight, labels = inputs()

    def block(one: Tensor) -> Tensor:
        return ours(one.tanh(), weight, labels)

    found: Any = checkpoint(block, hidden, use_reentrant=reentrant)
    (found * torch.linspace(-3, 5, found.numel()).view(found.shape)).sum().backward()
    wanted = gradients(full(hidden.tanh(), weight, labels), hidden, weight)
    for one, other in zip((hidden.grad, weight.grad), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_elements", [4 * V, 2**24])
@pytest.mark.parametrize("ours", [summed_cross_entropy, token_log_probs])
def test_labels_that_do_not_belong_are_refused(
    ours: Scoring, num_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", num_elements)
    hidden, weight, labels = inputs()
    for number in (N - 1, N + 1):
        with pytest.raises(ValueError, match=f"{N} hidden states and {number} labels"):
            ours(hidden, weight, torch.zeros(number, dtype=torch.long))
    for label in (-100, V):
        labels[5] = label
        with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
            ours(hidden, weight, labels)


ANSWERS = ([3, 1, 6, 2], [5, 4, 1, 2])  # tokens of the chosen and of the rejected answers of four pairs
BETA = 0.3


@pytest.fixture(scope="module")
def trl_loss(tokenizer: Any, build: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tensor]:
    """The loss that TRL's own trainer computes of given log-probabilities of tokens, policy and reference."""
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    trainer: Any = DPOTrainer(
        model=build(),
        ref_model=build(),
        args=DPOConfig(
            output_dir=str(tmp_path_factory.mktemp("dpo")),
            beta=BETA,
            bf16=False,
            use_cpu=True,
            report_to="none",
        ),
        train_dataset=datasets.Dataset.from_list([row]),
        processing_class=tokenizer,
    )

    def call(loss_type: str, policy: Tensor, reference: Tensor, label_smoothing: float = 0.0) -> Tensor:
        trainer.loss_types, trainer.loss_weights = [loss_type], [1.0]
        trainer.label_smoothing = label_smoothing
        told = {"entropy": policy * 0, "mean_logits": policy * 0, "is_top1": policy > 1}
        trainer.ref_model = lambda **_: SimpleNamespace(log_probs=reference)
        # one token of prompt, so that every token of an answer is predicted
        mask = functional.pad(answer_mask(), (1, 0))
        batch = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
        return trainer._compute_loss(lambda **_: SimpleNamespace(log_probs=policy, **told), batch, False)

    return call


def answer_mask() -> Tensor:
    """(2P, T): the chosen answers, then the rejected; 1 where a token is."""
    lengths = torch.tensor([*ANSWERS[0], *ANSWERS[1]])
    return (torch.arange(max(map(max, ANSWERS))) < lengths[:, None]).long()


def token_scores() -> tuple[Tensor, Tensor]:
    """Log-probabilities of every token of the answers by policy and reference, (2P, T), 0 where none is."""
    draw = torch.Generator().manual_seed(1)
    shape = (2, *answer_mask().shape)
    policy, reference = -3 * torch.rand(shape, generator=draw) * answer_mask()
    return policy.requires_grad_(), reference


def losses_of_pairs(loss_type: str, policy: Tensor, reference: Tensor, pairs: slice) -> Tensor:
    """Our losses of some of the four pairs, as a trainer that holds only those would compute them."""
    chosen, rejected = ((policy - reference).sum(1).chunk(2)[side][pairs] for side in (0, 1))
    return preference_losses(
        loss_type,
        beta=BETA,
        chosen_P=chosen,
        rejected_P=rejected,
        chosen_tokens_P=torch.tensor(ANSWERS[0])[pairs],
        rejected_tokens_P=torch.tensor(ANSWERS[1])[pairs],
        chosen_log_probs_P=policy.sum(1).chunk(2)[0][pairs],
        num_chosen_tokens=sum(ANSWERS[0]),
        num_pairs=4,
    )


@pytest.mark.parametrize("loss_type", LOSSES)
def test_preference_losses_are_those_of_trl(loss_type: str, trl_loss: Callable[..., Tensor]) -> None:
    policy, reference = token_scores()
    found = losses_of_pairs(loss_type, policy, reference, slice(None))
    assert found.shape == (4,)
    wanted = trl_loss(loss_type, policy, reference)
    torch.testing.assert_close(found.mean(), wanted, rtol=1e-6, atol=1e-6)
    mine, theirs = (torch.autograd.grad(one, policy)[0] * answer_mask() for one in (found.mean(), wanted))
    assert theirs.abs().sum() > 0
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_trl_smooths_no_label_in_these_losses_either(loss_type: str, trl_loss: Callable[..., Tensor]) -> None:
    policy, reference = token_scores()
    smooth = trl_loss(loss_type, policy, reference, label_smoothing=0.2)
    assert torch.equal(smooth, trl_loss(loss_type, policy, reference))


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("cuts", [(1, 2, 3), (2,), (3,)])
def test_preference_losses_add_up_to_the_same_however_the_batch_is_cut(
    loss_type: str, cuts: tuple[int, ...]
) -> None:
    policy, reference = token_scores()
    whole = losses_of_pairs(loss_type, policy, reference, slice(None))
    edges = itertools.pairwise([0, *cuts, 4])
    parts = [losses_of_pairs(loss_type, policy, reference, slice(*edge)) for edge in edges]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=0)


def test_sft_is_the_mean_over_all_chosen_tokens() -> None:
    policy, reference = token_scores()
    found = losses_of_pairs("sft", policy, reference, slice(None)).sum() / 4
    torch.testing.assert_close(found, -policy[:4][answer_mask()[:4] == 1].mean())


@pytest.mark.parametrize("beta", [0.05, 2.0])
def test_a_policy_that_is_its_reference_has_known_losses(beta: float) -> None:
    """APO equation 7 at 0 is 1 - 1/2 + 1/2, equation 8 is 1/2 + 1 - 1/2: exactly 1 before the first step."""
    zero_P, one_P = torch.zeros(3), torch.ones(3)
    known = {"apo_zero": 1.0, "apo_down": 1.0, "hinge": 1.0, "ipo": 1 / (2 * beta) ** 2}
    for loss_type, wanted in known.items():
        found = preference_losses(
            loss_type,
            beta=beta,
            chosen_P=zero_P,
            rejected_P=zero_P,
            chosen_tokens_P=one_P,
            rejected_tokens_P=one_P,
        )
        assert found.tolist() == pytest.approx([wanted] * 3, rel=1e-6 if loss_type == "ipo" else 0)


def test_a_loss_that_is_unknown_or_lacks_its_numbers_is_refused_by_name() -> None:
    ratios_P = torch.zeros(2)
    for loss_type, reason in {
        "apo_one": "loss apo_one: there is no such",
        "ipo": "loss ipo: wants chosen_tokens_P and rejected_tokens_P",
        "sft": "loss sft: wants chosen_log_probs_P, num_chosen_tokens and num_pairs",
    }.items():
        with pytest.raises(ValueError, match=reason):
            preference_losses(loss_type, beta=0.1, chosen_P=ratios_P, rejected_P=ratios_P)
