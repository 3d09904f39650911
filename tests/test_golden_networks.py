"""Networks and their blocks against the numbers made by the authors' programs: the same form of test for every system.

Each case of `../shared/golden` is one test item: outputs in float32 and float64, input gradients, gradient norms of all parameters,
attention rows. Full configurations come without weights; these are rebuilt from the names of the tensors (README there, `hash32-v1`)."""
import json, math, os, subprocess, sys, zlib

import numpy as np
import pytest
import torch

from conftest import ABSENT, ROOT
from golden_cases import (BLOCK_CASES, CASES, GOLDEN, NETWORK_CASES, SMALL, build, check_gradients, check_outputs, has_gradients, hashed,
                          read, run)
from msnlan.attention.definition import attention_map, has_triton, sparsemax
from msnlan.models.layers import PatchAttention


@pytest.mark.parametrize('case', BLOCK_CASES + NETWORK_CASES)
def test_outputs(case): check_outputs(case)


@pytest.mark.parametrize('case', [c for c in BLOCK_CASES + NETWORK_CASES if has_gradients(c)])
def test_gradients(case): check_gradients(case)


@pytest.mark.skipif(not has_triton(), reason='needs Triton')
@pytest.mark.parametrize('cases', [SMALL, pytest.param([], marks=pytest.mark.slow)], ids=['small', 'all'])
def test_through_the_fused_kernels(cases):
    "The same numbers from the GPU's kernels, by Triton's interpreter"
    if GOLDEN is None: pytest.skip(ABSENT)
    run = subprocess.run([sys.executable, ROOT/'tests/golden_cases.py', '--backend', 'triton', *cases], capture_output=True, text=True,
                         env={**os.environ, 'TRITON_INTERPRET': '1', 'OMP_NUM_THREADS': '1'}, timeout=3000)
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    assert run.stdout.split() == (cases or BLOCK_CASES + NETWORK_CASES)


@pytest.mark.parametrize('case', [c for c in BLOCK_CASES if GOLDEN and 'attn_labels' in read(c)[1]])
def test_attention_rows(case):
    "Weights over the keys at the programs' query positions, seen by a hook on the attention holder"
    module, tensors, meta = build(case)
    calls, holders = {}, [m for m in module.modules() if isinstance(m, PatchAttention)]
    for m in holders: m.register_forward_pre_hook(lambda m, args: calls.__setitem__(m, args))
    with torch.no_grad(): run(module, tensors, torch.float32)
    seen = 0
    for key in [k for k in tensors if k.startswith('attn.')]:
        *label, at = key[5:].split('.')
        patch = next((int(p[1:]) for p in label if p[0] == 'k'), None)
        batch = next((int(p[1:]) for p in label if p[0] == 'b'), 0)
        holder = next(m for m in holders if patch in (None, m.patch))
        point = tuple(int(v) for v in at[1:].split('_'))
        query, keys, _ = calls[holder]
        row = attention_map(query, keys, [point], patch=holder.patch, softmax_scale=holder.softmax_scale,
                            normalize_keys=holder.normalize_keys, weighting=holder.weighting)[batch, 0]
        want = tensors[key].flatten()
        assert row.shape == want.shape and (row - want).abs().max() <= 1e-5
        assert math.isclose(row.sum().item(), 1, abs_tol=1e-5)
        seen += 1
    assert seen >= len(meta['attn_labels'])


def test_hash_rule():
    "The numbers that pin the rule itself"
    if GOLDEN is None: pytest.skip(ABSENT)
    check = json.loads((GOLDEN/'hash32_check.json').read_text())
    assert zlib.crc32(check['name'].encode()) == check['crc32']
    assert np.allclose(hashed(check['name'], (3,), 0, 1).numpy(), check['u_first3_float32'], atol=1e-7)


@pytest.mark.parametrize('case', [c for c in CASES if c.startswith('hspan_soft_threshold')])
def test_soft_threshold(case):
    "The projection on the simplex is exact, whatever the program's list length"
    tensors, meta = read(case)
    for dtype, want, tolerance in (torch.float32, 'output', 1e-6), (torch.float64, 'output_f64', 1e-12):
        assert (sparsemax(tensors['input'].to(dtype)) - tensors[want]).abs().max() <= tolerance


def test_every_case_of_a_network_is_tested():
    "No golden case of networks, blocks or attention is left out"
    if GOLDEN is None: pytest.skip(ABSENT)
    others = ('hspan_soft_threshold', 'metrics', 'self_ensemble')
    assert [c for c in CASES if c not in BLOCK_CASES + NETWORK_CASES and not c.startswith(others)] == []
