"""Triton's compiler accepts the kernels: no GPU is needed for that, and the interpreter forgives more."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton.backends.nvidia")

# Runs in a process of its own, because the rest of the suite has chosen the interpreter.
SCRIPT = """
import importlib, sys
import triton
from triton.backends.compiler import GPUTarget

for module, name, integers, numbers, pointers, constants in eval(sys.argv[1]):
    kernel = getattr(importlib.import_module("affnb.kernels." + module), name)
    kernel = getattr(kernel, "fn", kernel) if "utotun" in type(kernel).__name__ else kernel
    kinds = {**dict.fromkeys(constants, "constexpr"), **dict.fromkeys(integers, "i32")}
    kinds |= {**dict.fromkeys(numbers, "fp32"), **pointers}
    signature = {a: kinds.get(a, "*fp32") for a in kernel.arg_names}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"]
"""

TILE = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16, "PRECISION": "ieee"}
PAIRS = ("n", "m", "width")
LABELS = {"x_labels": "*i64", "y_labels": "*i64", "own": "*i64"}
IMAGE = ("classes", "height", "width", "count", "sizes")
STEPS = {"offsets": "*i32", "ends": "*i32", "labels": "*i32"}
MAP = {"C": 32, "P": 32}
FIELD = {"CLIP": True, "OPPOSITE": True, "SAME_CLASS": False, "BY_CHANNEL": True} | MAP
VOLUME = ("channels", "h", "w", "high", "wide", "u", "v")
NONE = ()
KERNELS = [
    ("batch_affinity_mass", "_forward", PAIRS, NONE, LABELS, TILE),
    ("batch_affinity_mass", "_backward", PAIRS, NONE, LABELS, TILE | {"BLOCK_D": 32}),
    ("patch_nce", "_forward", (*PAIRS, "first"), NONE, {}, TILE),
    ("patch_nce", "_backward", (*PAIRS, "first"), NONE, {}, TILE | {"BLOCK_D": 32, "TO_KEYS": True}),
    ("smooth_ap", "_rank", ("items", "p"), ("scale",), {}, {"N": 16, "J": 128}),
    ("smooth_ap", "_pull", ("count", "p"), ("scale", "sign"), {}, {"LEAVE_OUT": True, "N": 16, "J": 64}),
    ("affinity_fields", "_to_binary", IMAGE, NONE, STEPS, MAP),
    ("affinity_fields", "_to_classes", IMAGE, NONE, STEPS, MAP),
    ("affinity_fields", "_forward", IMAGE, ("margin", "clip"), STEPS, FIELD),
    ("affinity_fields", "_backward", IMAGE, ("margin", "clip"), STEPS, FIELD | {"BY_CHANNEL": False}),
    ("affinity_propagation", "_step", IMAGE, ("lam",), STEPS, MAP),
    ("affinity_propagation", "_back_to_sums", IMAGE, NONE, STEPS, MAP),
    ("affinity_propagation", "_back_to_map", IMAGE, NONE, STEPS, MAP),
    ("cost_volume", "_forward", VOLUME, NONE, {}, MAP),
    ("cost_volume", "_backward", VOLUME, NONE, {}, MAP | {"TO_PADDED": True}),
]  # fmt: skip


@pytest.mark.parametrize("module", sorted({case[0] for case in KERNELS}))
def test_kernels_compile_for_a_gpu(module, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)  # never the result of an earlier run
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, repr([case for case in KERNELS if case[0] == module])],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
