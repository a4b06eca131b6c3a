"""Each check passes what it should, and names argument, expectation and value when it does not."""

import numpy as np
import pytest
import torch

from affnb import checks as c

NAN = torch.tensor([0.0, float("nan"), float("inf")])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: c.check_tensor([1.0], "boxes"), TypeError, ["torch.Tensor", "list [1.0]"]),
        (lambda: c.check_tensor(np.zeros(2), "boxes"), TypeError, ["torch.Tensor", "ndarray"]),
        (lambda: c.check_tensor(None, "boxes"), TypeError, ["torch.Tensor", "NoneType None"]),
        (
            lambda: c.check_tensor(torch.zeros(2, 3), "boxes", ndim=3),
            ValueError,
            ["3 dimensions", "(2, 3)", "float32", "cpu"],
        ),
        (
            lambda: c.check_tensor(torch.zeros(2), "boxes", ndim=(2, 3)),
            ValueError,
            ["2 or 3 dimensions", "(2,)"],
        ),
        (
            lambda: c.check_floating(torch.zeros(2, dtype=torch.int64), "boxes"),
            TypeError,
            ["floating-point", "torch.int64"],
        ),
        (
            lambda: c.check_floating(torch.zeros(2, dtype=torch.complex64), "boxes"),
            TypeError,
            ["floating-point", "torch.complex64"],
        ),
        (
            lambda: c.check_bool(torch.zeros(2, dtype=torch.uint8), "boxes"),
            TypeError,
            ["torch.bool", "torch.uint8"],
        ),
        (lambda: c.check_floating([1.0], "boxes"), TypeError, ["torch.Tensor", "list [1.0]"]),
        (
            lambda: c.check_floating(torch.zeros(2), "boxes", ndim=3),
            ValueError,
            ["3 dimensions", "(2,)"],
        ),
        (lambda: c.check_bool(True, "boxes"), TypeError, ["torch.Tensor", "bool True"]),
        (
            lambda: c.check_bool(torch.zeros(2) > 0, "boxes", ndim=(0, 2)),
            ValueError,
            ["0 or 2 dimensions", "(2,)"],
        ),
        (
            lambda: c.check_shape(torch.zeros(5, 3), "boxes", (None, 4)),
            ValueError,
            ["(*, 4)", "(5, 3)"],
        ),
        (
            lambda: c.check_shape(torch.zeros(5, 4, 1), "boxes", (None, 4)),
            ValueError,
            ["(*, 4)", "(5, 4, 1)"],
        ),
        (lambda: c.check_square(torch.zeros(4), "boxes"), ValueError, ["(..., N, N)", "(4,)"]),
        (
            lambda: c.check_square(torch.zeros(4, 4, 5), "boxes"),
            ValueError,
            ["(..., N, N)", "(4, 4, 5)"],
        ),
        (lambda: c.check_no_nan(NAN, "boxes"), ValueError, ["no NaN", "got 1 in"]),
        (lambda: c.check_finite(NAN, "boxes"), ValueError, ["finite values", "got 2 not finite"]),
        (lambda: c.check_norms(NAN[None], "boxes"), ValueError, ["finite", "got 2 not finite"]),
        (
            lambda: c.check_norms(torch.full((2, 3), 3e38), "boxes"),
            ValueError,
            ["norm is finite", "got an overflow"],
        ),
        (lambda: c.check_labels([0, 1], "boxes"), TypeError, ["torch.Tensor", "list [0, 1]"]),
        (
            lambda: c.check_labels(torch.zeros(2), "boxes"),
            TypeError,
            ["integer dtype", "torch.float32"],
        ),
        (
            lambda: c.check_labels(torch.zeros(2, dtype=torch.bool), "boxes"),
            TypeError,
            ["integer dtype", "torch.bool"],
        ),
        (
            lambda: c.check_labels(torch.zeros(2, 2, dtype=torch.int64), "boxes"),
            ValueError,
            ["1 dimensions", "(2, 2)"],
        ),
        (
            lambda: c.check_labels(torch.arange(3), "boxes", length=4),
            ValueError,
            ["length 4", "(3,)"],
        ),
        (
            lambda: c.check_labels(torch.arange(4), "boxes", num_classes=3),
            ValueError,
            ["[0, 3)", "got 3"],
        ),
        (
            lambda: c.check_labels(
                torch.tensor([0, -1, -100]), "boxes", num_classes=3, ignore_index=-100
            ),
            ValueError,
            ["[0, 3) or -100", "got -1"],
        ),
        (
            lambda: c.check_same_device(
                [("first", torch.zeros(1)), ("boxes", torch.zeros(1, device="meta"))]
            ),
            ValueError,
            ["device of first (cpu)", "got meta"],
        ),
        (
            lambda: c.check_one_of("fast", "boxes", ("auto", "reference")),
            ValueError,
            ["'auto', 'reference'", "got 'fast'"],
        ),
        (lambda: c.check_at_least(-1, "boxes", 0), ValueError, [">= 0", "got -1"]),
        (lambda: c.check_at_least(float("nan"), "boxes", 0), ValueError, ["finite", "got nan"]),
        (lambda: c.check_at_least(float("inf"), "boxes", 0), ValueError, ["finite", "got inf"]),
        (lambda: c.check_at_least("2", "boxes", 0), TypeError, ["real number", "str '2'"]),
        (lambda: c.check_at_least(True, "boxes", 0), TypeError, ["real number", "bool True"]),
        (
            lambda: c.check_at_least(torch.tensor(1.0), "boxes", 0),
            TypeError,
            ["real number", "tensor of shape ()"],
        ),
        (lambda: c.check_between(1.5, "boxes", 0, 1), ValueError, ["in [0, 1]", "got 1.5"]),
        (lambda: c.check_between(-1, "boxes", 0, 100), ValueError, ["in [0, 100]", "got -1"]),
        (lambda: c.check_between(float("nan"), "boxes", 0, 1), ValueError, ["got nan"]),
        (lambda: c.check_between("1", "boxes", 0, 1), TypeError, ["real number", "str '1'"]),
        (lambda: c.check_between(True, "boxes", 0, 1), TypeError, ["real number", "bool True"]),
        (lambda: c.check_flag(1, "boxes"), TypeError, ["a bool", "got int 1"]),
        (lambda: c.check_flag(None, "boxes"), TypeError, ["a bool", "got NoneType None"]),
        (lambda: c.check_integers(3, "boxes", 1), TypeError, ["sequence of integers", "int 3"]),
        (lambda: c.check_integers("12", "boxes", 1), TypeError, ["sequence", "str '12'"]),
        (lambda: c.check_integers([1, 2.0], "boxes", 1), TypeError, ["integers", "[1, 2.0]"]),
        (lambda: c.check_integers([True], "boxes", 1), TypeError, ["integers", "[True]"]),
        (lambda: c.check_integers((2, 0), "boxes", 1), ValueError, [">= 1", "got [2, 0]"]),
        (lambda: c.check_positive(0, "boxes"), ValueError, ["> 0", "got 0"]),
        (lambda: c.check_positive(float("inf"), "boxes"), ValueError, ["finite", "got inf"]),
        (lambda: c.check_positive(None, "boxes"), TypeError, ["real number", "NoneType None"]),
    ],
)
def test_message_names_argument_expectation_and_value(call, error, words):
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert message.startswith("boxes: expected ")
    for word in words:
        assert word in message


def test_long_values_are_cut_short_in_messages():
    with pytest.raises(TypeError) as caught:
        c.check_tensor(list(range(100_000)), "boxes")
    assert len(str(caught.value)) < 200


def test_legal_input_passes():
    x = torch.zeros(2, 3)
    assert c.check_tensor(x, "x", ndim=(1, 2)) is x
    assert c.check_floating(x, "x", ndim=2) is x
    c.check_floating(torch.zeros(1, dtype=torch.bfloat16), "x")
    mask = torch.zeros(1, dtype=torch.bool)
    assert c.check_bool(mask, "x", ndim=1) is mask
    c.check_flag(False, "x")
    c.check_integers([], "x", 1)
    c.check_integers((1, 5), "x", 1)
    c.check_between(0, "x", 0, 1)
    c.check_between(np.float32(1), "x", 0, 1)
    c.check_shape(x, "x", (None, 3))
    c.check_square(torch.zeros(7, 4, 4), "x")
    c.check_no_nan(torch.tensor([float("inf"), -float("inf")]), "x")
    c.check_no_nan(torch.zeros(0), "x")
    c.check_finite(torch.zeros(0), "x")
    c.check_finite(torch.arange(3), "x")
    c.check_one_of("a", "x", ("a", "b"))
    c.check_at_least(0, "x", 0)
    c.check_at_least(np.float32(2.5), "x", 2.5)
    c.check_positive(np.int64(1), "x")
    c.check_positive(1e-300, "x")


def test_norms_are_taken_in_the_wide_dtype():
    half = torch.full((2, 4), 6e4).half()  # a norm of 1.2e5, which half precision does not reach
    norms = c.check_norms(half, "x")
    torch.testing.assert_close(norms, torch.linalg.vector_norm(half.float(), dim=1))
    assert c.check_norms(torch.zeros(0, 3), "x").shape == (0,)


def test_labels_that_are_legal_come_back_unchanged():
    labels = torch.tensor([2, 0, 255], dtype=torch.uint8)
    got = c.check_labels(labels, "labels", length=3, num_classes=3, ignore_index=255)
    assert got is labels
    empty = torch.zeros(0, dtype=torch.int32)
    assert c.check_labels(empty, "labels", num_classes=1) is empty
    image = torch.zeros(2, 4, 4, dtype=torch.int64)
    assert c.check_labels(image, "labels", ndim=None, length=2) is image


def test_one_of_tells_true_from_one():
    with pytest.raises(ValueError, match="got True"):
        c.check_one_of(True, "k", (0, 1))


def test_same_device_passes_over_none():
    x = torch.zeros(1)
    c.check_same_device([("a", None), ("b", x), ("c", None), ("d", x)])
    c.check_same_device([])
    with pytest.raises(ValueError, match=r"^d: .*device of b"):
        c.check_same_device([("a", None), ("b", x), ("d", torch.zeros(1, device="meta"))])


def test_checks_leave_no_trace_in_autograd():
    x = torch.ones(3, requires_grad=True)
    c.check_no_nan(x, "x")
    c.check_finite(x, "x")
    assert not c.check_norms(x, "x").requires_grad
    (x * 2).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))
