"""The compiled kernels with a fence behind, or before, every buffer: a page that must not be touched. Whatever reads or writes past
an end kills the process, on any machine and at any width of vectors (MSNLAN_VECTOR_BITS). A script, run by the tests:

    MSNLAN_VECTOR_BITS=512 python tests/fence_cases.py [--before] [--narrow]"""
import argparse, ctypes, mmap, sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
from msnlan.attention import cpu, kernels, whole
from msnlan.attention.definition import patch_attention_reference
from msnlan.attention.operator import patch_attention

PAGE, LIBC = mmap.PAGESIZE, ctypes.CDLL(None, use_errno=True)
KERNELS = {cpu: 'statistics forward backward_values backward_scores', whole: 'score_walk value_walk value_gradient weight_gradient '
           'score_gradient weigh_rows line_thresholds support_count'}


def fenced(a, before):
    "A copy of an array that ends where a forbidden page begins, or begins where one ends"
    pages = -(-max(a.nbytes, 1)//PAGE)
    block = mmap.mmap(-1, (pages+1)*PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(block))
    assert LIBC.mprotect(ctypes.c_void_p(start + (0 if before else pages*PAGE)), PAGE, 0) == 0, ctypes.get_errno()
    at = PAGE if before else pages*PAGE - a.nbytes
    copy = np.frombuffer(block, a.dtype, a.size, at).reshape(a.shape)
    copy[...] = a
    return copy


def each_array(f, value):
    "f on an array, on the arrays of a named tuple, or on nothing"
    if isinstance(value, np.ndarray): return f(value)
    return type(value)(*[each_array(f, v) for v in value]) if hasattr(value, '_fields') else value


def arrays(value):
    "An array, or those of a named tuple, in order"
    found = []
    each_array(found.append, value)
    return found


def fence(module, name, before, calls):
    "Let a kernel work on fenced copies of its arrays, which are copied back"
    kernel = getattr(module, name)
    def call(*args):
        copies = [each_array(lambda a: fenced(a, before), a) for a in args]
        out = kernel(*copies)
        calls[name] = calls.get(name, 0) + 1
        for a, c in zip(args, copies):
            for mine, used in zip(arrays(a), arrays(c)): mine[...] = used
        return out
    setattr(module, name, call)


def problems(count):
    "Configurations of the operator whose sizes are no multiples of anything"
    for seed in range(count):
        rng = np.random.default_rng(seed)
        size = lambda: int(rng.integers(1, 12))
        patch, s, c, cv = int(rng.choice([1, 3, 5, 7, 9])), int(rng.integers(1, 3)), int(rng.integers(1, 19)), int(rng.integers(1, 10))
        grids = [(size(), size()) for _ in range(rng.integers(1, 3))]
        maps = [(1, c, size(), size()), *((1, c, *g) for g in grids), *((1, cv, s*h, s*w) for h, w in grids)]
        yield maps, dict(patch=patch, normalize_keys=bool(rng.integers(2)), weighting=str(rng.choice(['softmax', 'softmax', 'sparsemax'])))


def check(maps, options, backend, dtype):
    g = torch.Generator().manual_seed(0)
    a = [torch.randn(*m, generator=g).to(dtype).mul_(.3).requires_grad_() for m in maps]
    n = (len(maps) - 1)//2
    def run(f, kind, **kw):
        t = [x.detach().to(kind).requires_grad_() for x in a]
        out = f(t[0], t[1:n+1], t[n+1:], **options, **kw)
        return [out, *torch.autograd.grad(out.square().sum(), t)]
    for got, want in zip(run(patch_attention, dtype, backend=backend), run(patch_attention_reference, torch.float64)):
        error = ((got - want).abs().max()/want.abs().max().clamp_min(1e-3)).item()
        assert error < (1e-9 if dtype == torch.float64 else 1e-3), (maps, options, backend, dtype, error)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--before', action='store_true'); p.add_argument('--count', type=int, default=12)
    p.add_argument('--narrow', action='store_true', help='a fault as it once was: gradients padded to 8 columns whatever the vectors')
    p.add_argument('--dtypes', nargs='+', default=['float32', 'float64'])
    a, calls = p.parse_args(), {}
    torch.set_num_threads(1)
    for module, names in KERNELS.items():
        for name in names.split(): fence(module, name, a.before, calls)
    whole.KEEP = 2**13                                                         # small ones are kept, large ones made again
    if a.narrow:
        F = torch.nn.functional
        whole.Layout.pixels = lambda self, x: F.pad(torch.from_numpy(x).transpose(1, 2), (0, -x.shape[1] % 8)).contiguous().numpy()
    for maps, options in problems(a.count):
        for backend in ('whole', 'numba') if options['weighting'] == 'softmax' else ('whole',):
            for dtype in a.dtypes: check(maps, options, backend, getattr(torch, dtype))
    print(kernels.BITS, *sorted(calls))
