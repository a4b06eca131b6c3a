"""Barrier-penalty search: the quantiser and a supernet's step, ours and what one would write first."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from affnb.efficient import MixedPrecisionConv2d, uniform_quantize
from benchmarks.harness import COMPILED, Case, Step, Work, as_named

OURS, LITERAL, PYTORCH = "affnb", "literal equations", "PyTorch (fake_quantize)"
CANDIDATES = [(2, 3), (2, 4), (3, 3), (3, 4), (4, 4), (4, 6), (6, 4), (8, 4)]


def literal_quantize(x: torch.Tensor, alpha: torch.Tensor, bits: int, signed: bool) -> torch.Tensor:
    """Clamp, divide, round straight through, multiply: an autograd node for each."""
    n = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    step = alpha / n
    low = -alpha if signed else torch.zeros_like(alpha)
    codes = torch.minimum(torch.maximum(x, low), alpha) / step
    return step * (codes + (codes.round() - codes).detach())


def setup_quantizer(implementation: str, shape: dict[str, int], device: str) -> Step:
    torch.manual_seed(0)
    x = torch.randn(shape["numel"], device=device, requires_grad=True)
    alpha = torch.tensor([2.0], device=device, requires_grad=True)
    step_size = torch.tensor([2.0 / 7], device=device, requires_grad=True)
    zero = torch.zeros(1, device=device)
    literal = as_named(literal_quantize, implementation)

    def step() -> torch.Tensor:
        x.grad = alpha.grad = step_size.grad = None
        if implementation == OURS:
            q = uniform_quantize(x, alpha, 4, True)
        elif implementation.startswith(LITERAL):
            q = literal(x, alpha, 4, True)
        else:  # PyTorch's fake quantisation with a learnt step
            q = torch._fake_quantize_learnable_per_tensor_affine(x, step_size, zero, -7, 7, 1.0)
        value = q.sum()
        value.backward()
        return value

    return step


def setup_supernet(implementation: str, shape: dict[str, int], device: str) -> Step:
    torch.manual_seed(0)
    batch, channels, side = shape["B"], shape["C"], shape["H"]
    layer = MixedPrecisionConv2d(channels, channels, 3, CANDIDATES, padding=1, bias=False)
    layer = layer.to(device)
    x = torch.rand(batch, channels, side, side, device=device, requires_grad=True)
    index_a, index_b = layer.input_index, layer.weight_index

    def mixture() -> torch.Tensor:
        if implementation == OURS:
            out: torch.Tensor = layer(x)
            return out
        p, alpha_w, alpha_a = layer.probabilities(), layer.alpha_weight, layer.alpha_input
        y = x.new_zeros(())
        for j, (b, a) in enumerate(CANDIDATES):
            if implementation.startswith(LITERAL):
                q_x = literal_quantize(x, alpha_a[index_a[j]], a, False)
                q_w = literal_quantize(layer.weight, alpha_w[index_b[j]], b, True)
            else:  # ranges that are not learnt, as PyTorch's fused fake quantisation has them
                top_a, top_b = 2**a - 1, 2 ** (b - 1) - 1
                q_x = torch.fake_quantize_per_tensor_affine(x, 3.0 / top_a, 0, 0, top_a)
                q_w = torch.fake_quantize_per_tensor_affine(
                    layer.weight, 0.2 / top_b, 0, -top_b, top_b
                )
            y = y + p[j] * F.conv2d(q_x, q_w, padding=1)
        return y

    forward = as_named(mixture, implementation)

    def step() -> torch.Tensor:
        x.grad = None
        layer.zero_grad()
        value = forward().square().mean()
        value.backward()
        return value

    return step


def cases(device: str) -> list[Case]:
    found = []
    for numel in (2**14, 2**18, 2**22, *[2**26] * (device == "cuda")):
        shape, small = {"numel": numel}, {"numel": 64}
        work = Work(bytes=5 * 4 * numel)  # forward: in, out; backward: in, gradient in and out
        found += [
            Case("uniform_quantize", name, shape, setup_quantizer, small, work)
            for name in (OURS, LITERAL, LITERAL + COMPILED, PYTORCH)
        ]
    # The three stages of ResNet-20, at a batch that a CPU can bear.
    for channels, side in ((16, 32), (32, 16), (64, 8)):
        shape, small = {"B": 32, "C": channels, "H": side}, {"B": 1, "C": 2, "H": 4}
        found += [
            Case("MixedPrecisionConv2d", name, shape, setup_supernet, small)
            for name in (OURS, LITERAL, PYTORCH, PYTORCH + COMPILED)
        ]
    return found
