import pytest
import torch

from hfkd.losses import standardize


def test_golden(golden):
    expected = golden.tensor("standardized_teacher")
    torch.testing.assert_close(standardize(golden.tensor("teacher")), expected, rtol=1e-9, atol=1e-12)


def test_formula_by_hand():
    # mean 2, unbiased std 2
    expected = torch.tensor([[-1.0, 0.0, 1.0]])
    torch.testing.assert_close(standardize(torch.tensor([[0.0, 2.0, 4.0]])), expected)
    torch.testing.assert_close(standardize(torch.tensor([[0.0, 2.0, 4.0]]), eps=2.0), expected / 2)


def test_rows_lose_shift_and_positive_scale():
    logits = torch.randn(5, 12, dtype=torch.float64)
    scale, shift = torch.rand(5, 1, dtype=torch.float64) * 9 + 0.1, torch.randn(5, 1, dtype=torch.float64)
    torch.testing.assert_close(standardize(logits * scale + shift), standardize(logits), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        standardize(logits * scale + shift, eps=0), standardize(logits, eps=0), rtol=1e-9, atol=1e-12
    )


def test_gradcheck():
    assert torch.autograd.gradcheck(standardize, torch.randn(3, 5, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("constant", [0.0, 0.1, -7.3, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constant_row_gives_zeros_and_the_gradient_of_centred_logits(constant, dtype):
    logits = torch.full((2, 100), constant, dtype=dtype, requires_grad=True)
    upstream = torch.randn(2, 100)
    standardized = standardize(logits)
    standardized.backward(upstream)
    assert standardized.abs().max() == 0
    expected = upstream - upstream.mean(1, keepdim=True)
    torch.testing.assert_close(logits.grad, expected.to(dtype))


def test_nearly_constant_row_follows_the_formula():
    logits = torch.zeros(1, 100, dtype=torch.float64, requires_grad=True)
    nearly = logits + 1e-7 * torch.linspace(-1, 1, 100, dtype=torch.float64)
    standardize(nearly)[0, 0].backward()
    std = nearly.std().item()
    assert standardize(nearly)[0, -1].item() == pytest.approx(1e-7 / (1e-7 + std))
    assert 0.5 / (1e-7 + std) < logits.grad.abs().max() < 2 / (1e-7 + std)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_is_computed_in_float32_at_least(dtype):
    logits = torch.randn(2, 8).to(dtype)
    standardized = standardize(logits)
    assert standardized.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(standardized, standardize(logits.double()).to(standardized.dtype))


@pytest.mark.parametrize("shape", [(8,), (8, 1), (2, 3, 4)])
def test_refuses_what_has_no_row_of_classes(shape):
    with pytest.raises(ValueError, match=r"\(B, C\).*" + str(shape[-1])):
        standardize(torch.zeros(shape))
