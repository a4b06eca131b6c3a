"""Triton's compiler accepts the kernels: no GPU is needed for that, and the interpreter forgives more."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton.backends.nvidia")

# Runs in a process of its own, because the rest of the suite has chosen the interpreter.
SCRIPT = """
import importlib, os, re, subprocess, sys
import triton
from triton.backends.compiler import GPUTarget

CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")

def stack_of(cubin):
    path = os.path.join(os.environ["TRITON_CACHE_DIR"], "kernel.cubin")
    with open(path, "wb") as file:
        file.write(cubin)
    usage = subprocess.run([CUOBJDUMP, "-res-usage", path], capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\\d+)", usage.stdout).group(1))

for module, name, integers, numbers, pointers, constants, *spilled in eval(sys.argv[1]):
    kernel = getattr(importlib.import_module("affnb.kernels." + module), name)
    choices = [({}, {})]
    if hasattr(kernel, "configs"):  # an autotuner: all that it would try for these constants
        choices = kernel.configs
        if kernel.early_config_prune:
            choices = kernel.early_config_prune(choices, {}, **constants)
        assert choices, (module, name, constants)
        choices = [(c.kwargs, {"num_warps": c.num_warps, "num_stages": c.num_stages}) for c in choices]
        kernel = kernel.fn
    kinds = {**dict.fromkeys(integers, "i32"), **dict.fromkeys(numbers, "fp32"), **pointers}
    for chosen, options in choices:
        constexprs = constants | chosen
        signature = {a: kinds.get(a, "*fp32") for a in kernel.arg_names}
        signature |= dict.fromkeys(constexprs, "constexpr")
        # What a launch finds out for itself, and what decides how wide a load is.
        attrs = {
            (i,): [["tt.divisibility", 16]]
            for i, (a, kind) in enumerate(signature.items())
            if kind[0] == "*" or a in ("length", "step", "x_step", "y_step")
        }
        source = triton.compiler.ASTSource(kernel, signature, constexprs, attrs)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        case = (module, name, constexprs, options)
        assert compiled.metadata.shared <= 227 * 1024, (case, compiled.metadata.shared)
        if name != "_split" and "PARTS" in constexprs:
            assert "wgmma.mma_async" in compiled.asm["ptx"], case  # the matrix units' instruction
        stack = stack_of(compiled.asm["cubin"])
        assert stack <= (spilled[0] if spilled else 64), (case, stack)
"""

MASS = ("first", "n", "count", "length", "step", "size")
NCE = ("n", "m", "length", "first", "x_step", "y_step", "size")
PARTS = dict.fromkeys(("x", "y", "query", "key"), "*bf16")
SINGLE = {"WIDTH": 128, "BLOCK_D": 128, "PARTS": 3}  # float32 at the precision "highest"
WIDE = {"WIDTH": 256, "BLOCK_D": 256, "PARTS": 3}
HALF = {"WIDTH": 256, "BLOCK_D": 256, "PARTS": 1}  # bfloat16
WIDER = {"WIDTH": 512, "BLOCK_D": 128, "PARTS": 1}  # loaded piece by piece
IMAGE = ("height", "width", "count", "sizes", "programs", "near")
STEPS = {"offsets": "*i32", "ends": "*i32", "labels": "*i32", "numbers": "*i32"}
MAP = {"CLASSES": 21, "C": 32, "TILE": 1024}
SUMS = {"CLIP": False, "OPPOSITE": False, "BY_CHANNEL": True} | MAP
FIELD = SUMS | {"SAME_CLASS": False}
CLIPPED = {"CLIP": True, "OPPOSITE": True, "BY_CHANNEL": False}
VOLUME = ("channels", "h", "w", "high", "wide", "u", "near")
WINDOW = {"C": 64, "v": 9, "TILE": 1024}
QUERIES = ("items", "p", "near")
RANKED = {"N": 4, "TILE": 1024}
NONE = ()
KERNELS = [
    ("pairs", "_split", ("count", "width", "step"), NONE, {"parts": "*bf16"},
     {"WIDTH": 128, "PARTS": 3, "BLOCK_M": 32, "BLOCK": 128}),
    ("batch_affinity_mass", "_forward", MASS, NONE, PARTS | {"labels": "*i64"}, SINGLE),
    # What these keep outside of their registers are addresses of shared memory, not sums.
    ("batch_affinity_mass", "_backward", MASS, NONE, PARTS | {"labels": "*i64"}, SINGLE, 100),
    ("patch_nce", "_backward", NCE, ("scale",), PARTS, WIDE | {"TO_KEYS": False}, 400),
    ("patch_nce", "_forward", NCE, ("scale",), PARTS, WIDE),
    ("patch_nce", "_forward", NCE, ("scale",), PARTS, HALF),
    ("patch_nce", "_backward", NCE, ("scale",), PARTS, HALF | {"TO_KEYS": True}),
    ("patch_nce", "_backward", NCE, ("scale",), PARTS, WIDER | {"TO_KEYS": False}),
    ("smooth_ap", "_rank", QUERIES, ("steep",), {}, RANKED),
    ("smooth_ap", "_pull", QUERIES, ("steep", "gain"), {"positives": "*i64"}, RANKED),
    ("smooth_ap", "_pull", QUERIES, ("steep", "gain"), {"positives": "*i64"}, RANKED | {"N": 16}),
    ("affinity_fields", "_to_binary", IMAGE, NONE, STEPS, MAP),
    ("affinity_fields", "_group", IMAGE, ("clip",), STEPS, SUMS | {"BOTH": True}),
    ("affinity_fields", "_group", IMAGE, ("clip",), STEPS, SUMS | CLIPPED | {"BOTH": False}),
    ("affinity_fields", "_separate", IMAGE, ("margin", "clip"), STEPS, FIELD),
    ("affinity_fields", "_separate", IMAGE, ("margin", "clip"), STEPS, FIELD | CLIPPED),
    ("affinity_fields", "_backward", IMAGE, ("margin", "clip"), STEPS, FIELD),
    ("affinity_fields", "_backward", IMAGE, ("margin", "clip"), STEPS, FIELD | CLIPPED),
    ("affinity_propagation", "_step", IMAGE, ("lam",), STEPS, MAP),
    ("affinity_propagation", "_back_to_affinity", IMAGE, NONE, STEPS, MAP),
    ("affinity_propagation", "_back_to_state", IMAGE, ("lam",), STEPS, MAP | {"ANCHORED": False}),
    ("cost_volume", "_forward", VOLUME, NONE, {}, {"V": 16, "v": 9, "TILE": 64}),
    ("cost_volume", "_back_to_own", VOLUME, NONE, {}, WINDOW),
    ("cost_volume", "_back_to_padded", VOLUME, NONE, {}, WINDOW),
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
