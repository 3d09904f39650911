"""The fused kernels: through Triton's interpreter at toy sizes, compiled for a GPU that need not be there, and on one where there is."""
import os, subprocess, sys
import pytest, torch
from conftest import ROOT
from msnlan.attention import operator
from msnlan.attention.operator import has_triton, patch_attention, patch_attention_reference

pytestmark = pytest.mark.skipif(not has_triton(), reason='needs Triton')
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
CASES = {  # (N, c', c, H, W), grids of the keys, value scale, patch, options, entries of an array (0: all at once)
    'levels': ((1, 3, 2, 7, 5), [(7, 6), (4, 5)], 2, 3, {}, 0),
    'batch_p5': ((2, 2, 2, 6, 5), [(5, 6)], 1, 5, dict(normalize_keys=False), 0),
    'sparsemax_levels': ((1, 3, 2, 6, 4), [(5, 5), (3, 4)], 1, 3, dict(weighting='sparsemax'), 0),
    'sparsemax_p1': ((2, 3, 2, 5, 4), [(5, 4)], 1, 1, dict(weighting='sparsemax', normalize_keys=False), 0),
    'strips': ((1, 2, 2, 14, 3), [(3, 3)], 1, 3, {}, 13*48),
    'strips_of_keys': ((1, 2, 2, 12, 2), [(12, 2)], 1, 3, {}, 9*11**2)}
SLOW = {
    'p7': ((1, 3, 2, 5, 4), [(6, 7)], 1, 7, dict(divisor=6.), 0),
    'p9': ((1, 2, 3, 6, 5), [(6, 5)], 3, 9, {}, 0), 'three_levels': ((2, 5, 3, 8, 9), [(9, 8), (1, 1), (3, 9)], 2, 5, {}, 0),
    'one_pixel': ((1, 1, 1, 1, 1), [(1, 1)], 4, 3, {}, 0), 'strips_sparsemax': ((1, 2, 2, 9, 4), [(5, 4), (4, 3)], 1, 3, dict(weighting='sparsemax'), 600),
    'strips_of_keys_p5': ((1, 2, 2, 14, 4), [(14, 4), (9, 3)], 2, 5, {}, 36*15**2), 'wide': ((1, 8, 8, 20, 17), [(20, 21)], 1, 7, {}, 0)}


def in_interpreter(*args, seconds=900):
    "This file in a process that loads Triton with its interpreter"
    run = subprocess.run([sys.executable, __file__, *args], capture_output=True, text=True, timeout=seconds, cwd=ROOT,
                         env={**os.environ, 'TRITON_INTERPRET': '1', 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'})
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    return run.stdout


def both(case, dtype, unfold=True, device='cpu'):
    "Output and gradients of the fused kernels and of the definition in float64"
    from msnlan.attention.gpu import fused_attention
    (N, c, cv, H, W), grids, s, patch, options, room = case
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    maps = [rand(N, c, H, W)*.3, *(rand(N, c, h, w) for h, w in grids), *(rand(N, cv, s*h, s*w) for h, w in grids)]
    up, n = rand(N, cv, s*H, s*W), len(grids)
    def run(f, kind, **kw):
        a = [t.to(device, dtype).to(kind).requires_grad_() for t in maps]                  # the same rounded inputs
        out = f(a[0], a[1:n+1], a[n+1:], patch, 4., **options, **kw)
        return [t.double() for t in (out, *torch.autograd.grad(out, a, up.to(device, kind)))]
    return run(fused_attention, dtype, unfold=unfold, room=room), run(patch_attention_reference, torch.float64)


def relative(a, b): return ((a-b).abs().max()/b.abs().max().clamp_min(1e-30)).item()


BOUND = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}

def check_cases(cases, kinds=(torch.float64, torch.float32), unfold=(True, False), device='cpu'):
    for name, case in cases.items():
        for kind in kinds:
            for u in unfold:
                got, want = both(case, kind, u, device)
                worst = max(relative(a, b) for a, b in zip(got, want))
                assert worst < BOUND[kind], (name, kind, u, worst)


def check_cut_really():
    "The cases called strips are cut as their names say"
    from msnlan.attention.gpu import cut
    shape = lambda c: (c[0][0], (c[0][3], c[0][4] + c[3]//2), [(h, w + c[3]//2) for h, w in c[1]], c[3]//2, c[5] or 2**26)
    for name, case in {**CASES, **SLOW}.items():
        strips, blocks = cut(*shape(case), case[4].get('weighting') == 'sparsemax')
        assert (len(strips) > 1) == ('strips' in name), (name, strips)
        assert (len(blocks) > len(case[1])) == ('of_keys' in name), (name, blocks)


def check_zero_keys():
    q, k, v = torch.randn(1, 2, 4, 4, requires_grad=True), torch.zeros(1, 2, 4, 4, requires_grad=True), torch.randn(1, 2, 4, 4, requires_grad=True)
    patch_attention(q, k, v, 3, backend='triton').square().sum().backward()
    assert all(t.grad.isfinite().all() for t in (q, k, v))
    big = patch_attention(q.detach()*1000, torch.randn(1, 2, 4, 4), v.detach(), 3, backend='triton')
    assert big.isfinite().all()


def check_opcheck(device='cpu', utils=('test_schema', 'test_faketensor', 'test_autograd_registration')):
    from msnlan.attention.gpu import fused_op
    rand = lambda *s: torch.rand(*s, device=device).requires_grad_()
    for sparse in (False, True):
        args = rand(1, 2, 3, 4), [rand(1, 2, 3, 3)], [rand(1, 3, 3)], [rand(1, 3, 3, 3)], 3, sparse, True, 0
        assert set(torch.library.opcheck(fused_op, args, test_utils=utils).values()) == {'SUCCESS'}


class Block(torch.nn.Module):
    def __init__(self, weighting='softmax'):
        super().__init__(); self.conv, self.weighting = torch.nn.Conv2d(2, 4, 3, padding=1), weighting

    def forward(self, x):
        y = self.conv(x)
        return patch_attention(y[:, :2], y[:, 2:], y, 3, weighting=self.weighting, backend='triton')


def check_compile_and_autocast():
    block, x = Block(), torch.randn(1, 2, 4, 5)
    want = block(x)
    out = torch.compile(block, backend='aot_eager', fullgraph=True)(x)                     # fullgraph: an error at a break
    assert relative(out, want) < 1e-5
    out.sum().backward()
    grad = block.conv.weight.grad.clone(); block.zero_grad(); want.sum().backward()
    assert relative(grad, block.conv.weight.grad) < 1e-5
    assert torch._dynamo.explain(block)(x).graph_break_count == 0
    with torch.autocast('cpu', torch.bfloat16):
        half = block(x)
        half.float().sum().backward()
    assert half.dtype == torch.bfloat16 and relative(half.float(), want) < .05


CHECKS = dict(cases=lambda: check_cases(CASES, unfold=(True,), kinds=(torch.float64,)), in_kernel=lambda: check_cases(
    {k: CASES[k] for k in ('levels', 'sparsemax_p1')}, kinds=(torch.float32,), unfold=(False,)),
    half=lambda: check_cases({k: CASES[k] for k in ('levels', 'sparsemax_p1')}, (torch.float32, torch.bfloat16, torch.float16), (True,)),
    cut=check_cut_really, zero=check_zero_keys, opcheck=check_opcheck, compile=check_compile_and_autocast,
    wide=lambda: (check_cases(CASES), check_cases(SLOW)),
    opcheck_all=lambda: check_opcheck(utils=('test_schema', 'test_faketensor', 'test_autograd_registration', 'test_aot_dispatch_dynamic')))


@pytest.mark.parametrize('names', [['cases'], ['in_kernel', 'half', 'cut', 'zero', 'opcheck', 'compile']], ids=['cases', 'rest'])
def test_through_the_interpreter(names): assert in_interpreter(*names).split() == names


@pytest.mark.slow
@pytest.mark.parametrize('name', ['wide', 'opcheck_all'])
def test_widely_through_the_interpreter(name): in_interpreter(name, seconds=3000)


COMPILE = '''
import sys, triton
from triton.compiler import ASTSource
from triton.backends.compiler import GPUTarget
from msnlan.attention import tiles
POINTERS = 'X fac T top total stat out G dA part count mean column'.split()
for name in 'score_kernel threshold_kernel spread_kernel grad_kernel back_kernel'.split():
    kernel = getattr(tiles, name); args = kernel.arg_names
    for sparse, half in (False, 'bf16'), (True, 'fp32'):
        const = dict(RY=int(sys.argv[2])//2, RX=0, SPARSE=sparse, BM=32, BN=64)
        if name == 'threshold_kernel': const.update(BM=4, BN=512)
        kinds = {a: 'constexpr' if a in const else '*' + (half if a == 'out' else 'fp32') if a in POINTERS else 'i32' for a in args}
        source = ASTSource(kernel, kinds, constexprs={(args.index(a),): v for a, v in const.items() if a in args})
        made = triton.compile(source, target=GPUTarget('cuda', int(sys.argv[1]), 32))
        assert made.asm['cubin'] and made.metadata.shared < 48*1024
        print(name)
'''

@pytest.mark.parametrize('capability,patch', [(90, 3), *(pytest.param(c, 7, marks=pytest.mark.slow) for c in (80, 90))])
def test_kernels_compile_for_a_gpu(capability, patch, tmp_path):
    "Triton's own compiler makes machine code without a GPU: types and loops that the interpreter would let pass"
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'TRITON_CACHE_DIR': str(tmp_path)}; env.pop('TRITON_INTERPRET', None)
    run = subprocess.run([sys.executable, '-c', COMPILE, str(capability), str(patch)], capture_output=True, text=True, env=env, timeout=600)
    if 'Cannot find ptxas' in run.stderr: pytest.skip('this Triton has no assembler')
    assert run.returncode == 0, run.stderr[-3000:]
    assert len(run.stdout.split()) == 10


def test_choose(monkeypatch):
    choose = operator.choose
    monkeypatch.delenv('MSNLAN_BACKEND', raising=False)
    assert choose('cuda', 2**20) == 'triton' and choose('cpu', 2**10) == 'plain'
    monkeypatch.setattr(operator, '_TRITON', False)
    operator._say_once.cache_clear()
    with pytest.warns(UserWarning, match='pip install triton'): assert choose('cuda', 2**20) == 'strips'
    with pytest.warns(UserWarning) as seen: choose('cuda', 2**20); __import__('warnings').warn('other')
    assert len(seen) == 1                                                                  # said once
    monkeypatch.setenv('MSNLAN_BACKEND', 'strips'); assert choose('cpu', 2**10) == 'strips'
    monkeypatch.setenv('MSNLAN_BACKEND', 'strip')
    with pytest.raises(ValueError, match='strips'): choose('cpu', 2**10)


def test_without_gpu_or_triton(monkeypatch):
    x = torch.rand(1, 2, 4, 4)
    if not os.environ.get('TRITON_INTERPRET'):
        with pytest.raises(ValueError, match='needs a GPU'): patch_attention(x, x, x, backend='triton')
    monkeypatch.setattr(operator, '_TRITON', False)
    with pytest.raises(ImportError, match='pip install triton'): patch_attention(x, x, x, backend='triton')


def test_package_imports_without_triton():
    code = 'import sys; sys.modules["triton"] = None; import msnlan.attention.gpu, msnlan.models.zoo, msnlan.training.trainer'
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0


@CUDA
@pytest.mark.parametrize('kind', list(BOUND)[1:])
def test_on_the_gpu(kind): check_cases({**CASES, **SLOW}, (kind,), device='cuda')


@CUDA
def test_opcheck_on_the_gpu(): check_opcheck('cuda')


@CUDA
def test_large_on_the_gpu_in_bounded_memory():
    q, k, v = [torch.randn(1, c, 384, 384, device='cuda', requires_grad=True) for c in (32, 32, 64)]
    torch.cuda.reset_peak_memory_stats()
    patch_attention(q, k, v, 7, backend='triton').sum().backward()
    assert torch.cuda.max_memory_allocated() < 4e9


if __name__ == '__main__':
    for name in sys.argv[1:]: CHECKS[name](); print(name, flush=True)
