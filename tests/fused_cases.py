"""What the fused kernels must hold, without pytest: run by the tests through Triton's interpreter, and by `msnlan bench gpu` on a GPU.

    TRITON_INTERPRET=1 python tests/fused_cases.py [CHECK ...]"""
import sys
from pathlib import Path
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from msnlan.attention.definition import patch_attention_reference
from msnlan.attention.operator import patch_attention

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


def both(case, dtype, form='auto', device='cpu'):
    "Output and gradients of the fused kernels and of the definition in float64"
    from msnlan.attention.gpu import fused_attention
    (N, c, cv, H, W), grids, s, patch, options, max_scores = case
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    maps = [rand(N, c, H, W)*.3, *(rand(N, c, h, w) for h, w in grids), *(rand(N, cv, s*h, s*w) for h, w in grids)]
    up, n = rand(N, cv, s*H, s*W), len(grids)
    def run(f, kind, **kw):
        a = [t.to(device, dtype).to(kind).requires_grad_() for t in maps]                  # the same rounded inputs
        out = f(a[0], a[1:n+1], a[n+1:], patch, 4., **options, **kw)
        return [t.double() for t in (out, *torch.autograd.grad(out, a, up.to(device, kind)))]
    return run(fused_attention, dtype, form=form, max_scores=max_scores), run(patch_attention_reference, torch.float64)


def relative(a, b): return ((a-b).abs().max()/b.abs().max().clamp_min(1e-30)).item()


BOUND = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}

def check_cases(cases, kinds=(torch.float64, torch.float32), forms=('auto', 'box', 'wide', 'inside'), device='cpu'):
    for name, case in cases.items():
        for kind in kinds:
            for form in forms:
                got, want = both(case, kind, form, device)
                worst = max(relative(a, b) for a, b in zip(got, want))
                assert worst < BOUND[kind], (name, kind, form, worst)


def check_cut_really(device=None):
    "The cases called strips are cut as their names say"
    from msnlan.attention.gpu import cut_work
    shape = lambda c: (c[0][0], (c[0][3], c[0][4] + c[3]//2), [(h, w + c[3]//2) for h, w in c[1]], c[3]//2, c[5] or 2**26)
    for name, case in {**CASES, **SLOW}.items():
        strips, blocks = cut_work(*shape(case), case[4].get('weighting') == 'sparsemax')
        assert (len(strips) > 1) == ('strips' in name), (name, strips)
        assert (len(blocks) > len(case[1])) == ('of_keys' in name), (name, blocks)


def check_zero_keys(device='cpu'):
    q, k, v = [f(1, 2, 4, 4, device=device, requires_grad=True) for f in (torch.randn, torch.zeros, torch.randn)]
    patch_attention(q, k, v, 3, backend='triton').square().sum().backward()
    assert all(t.grad.isfinite().all() for t in (q, k, v))
    big = patch_attention(q.detach()*1000, torch.randn(1, 2, 4, 4, device=device), v.detach(), 3, backend='triton')
    assert big.isfinite().all()


def check_opcheck(device='cpu', utils=('test_schema', 'test_faketensor', 'test_autograd_registration')):
    from msnlan.attention.gpu import fused_op
    rand = lambda *s: torch.rand(*s, device=device).requires_grad_()
    for sparse in (False, True):
        args = rand(1, 2, 3, 4), [rand(1, 2, 3, 3)], [rand(1, 3, 3)], [rand(1, 3, 3, 3)], 3, sparse, 'auto', 0
        assert set(torch.library.opcheck(fused_op, args, test_utils=utils).values()) == {'SUCCESS'}


class Block(torch.nn.Module):
    def __init__(self, weighting='softmax'):
        super().__init__(); self.conv, self.weighting = torch.nn.Conv2d(2, 4, 3, padding=1), weighting

    def forward(self, x):
        y = self.conv(x)
        return patch_attention(y[:, :2], y[:, 2:], y, 3, weighting=self.weighting, backend='triton')


def check_compile_and_autocast(device='cpu'):
    block, x = Block().to(device), torch.randn(1, 2, 4, 5, device=device)
    want = block(x)
    out = torch.compile(block, backend='aot_eager', fullgraph=True)(x)                     # fullgraph: an error at a break
    assert relative(out, want) < 1e-5
    out.sum().backward()
    grad = block.conv.weight.grad.clone(); block.zero_grad(); want.sum().backward()
    assert relative(grad, block.conv.weight.grad) < 1e-5
    assert torch._dynamo.explain(block)(x).graph_break_count == 0
    with torch.autocast(device, torch.bfloat16):
        half = block(x)
        half.float().sum().backward()
    assert half.dtype == torch.bfloat16 and relative(half.float(), want) < .05


def check_plan(device='cpu'):
    "What the kernels' program allocates is what was planned, whichever way the work is cut"
    from msnlan.attention import gpu
    from msnlan.attention.gpu import LiveBytes, Maps, planned_bytes, run_backward, run_forward
    launch, gpu.launch_kernel = gpu.launch_kernel, lambda *args, **options: None             # the interpreter holds its arguments for a while
    for name in ('levels', 'sparsemax_p1', 'strips', 'strips_of_keys'):
        (N, c, cv, H, W), grids, _, patch, options, max_scores = CASES[name]
        shapes = (N, c, H, W), [(N, c, *g) for g in grids], [(N, cv, *g) for g in grids]
        sparse = options.get('weighting') == 'sparsemax'
        with LiveBytes() as live:
            maps = [torch.ones(shapes[0]), [torch.ones(s) for s in shapes[1]], [torch.ones(N, *g) for g in grids],
                    [torch.ones(s) for s in shapes[2]], patch, sparse, 'auto', max_scores]
            out, stat = run_forward(Maps(*maps))
            run_backward(Maps(*maps), out, stat)
        planned = planned_bytes(*shapes, patch, sparse, max_scores=max_scores)
        assert abs(planned/live.peak - 1) < .01, (name, live.peak, planned)
    gpu.launch_kernel = launch


def check_networks(device='cpu', trained=False):
    "The five networks are one graph each, with the same numbers; where `trained`, with the same gradients in bf16 autocast too"
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from msnlan.models.layers import PatchAttention
    from msnlan.models.zoo import create_model
    small = {'msnlan': dict(n_feats=16, n_resgroups=2, n_resblocks=1, patches=(3,)), 'csnln': dict(n_feats=4, depth=1),
             'panet': dict(n_feats=4, n_resblocks=2, pa_reduction=2, levels=2), 'hspan': dict(n_feats=4, n_resgroups=1, n_resblocks=1),
             'mlrn': dict(n_feats=16, n_modules=1, region=8)}
    for name, config in small.items():
        torch.manual_seed(0)
        net = create_model(name, scale=2, **config).to(device)
        for m in net.modules():
            if isinstance(m, PatchAttention): m.backend = 'triton'
        x, graphs = torch.rand(1, 3, 6, 4, device=device), []
        def count(graph, inputs): graphs.append(graph); return graph.forward
        torch._dynamo.reset()
        with torch.no_grad(): assert relative(torch.compile(net, backend=count, fullgraph=True)(x), net(x)) < 1e-4, name
        assert len(graphs) == 1, name
        if not trained: continue
        graphs.clear(); torch._dynamo.reset()
        def boxed(graph, inputs): graphs.append(graph); return make_boxed_func(graph.forward)
        compiled = torch.compile(net, backend=aot_autograd(fw_compiler=boxed, bw_compiler=boxed), fullgraph=True)
        def step(run):
            net.zero_grad()
            with torch.autocast(device, torch.bfloat16): out = run(x)
            out.float().square().mean().backward()
            return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
        assert relative(step(compiled), step(net)) < 2e-2, name
        assert len(graphs) == 2, name                                                      # one forward, one backward


CHECKS = dict(
    plan=check_plan, networks=check_networks,
    cases=lambda d: check_cases(CASES, (torch.float64, torch.float32), ('auto',), d),
    in_kernel=lambda d: check_cases({k: CASES[k] for k in ('levels', 'sparsemax_p1')}, (torch.float32,), ('box', 'inside'), d),
    half=lambda d: check_cases({k: CASES[k] for k in ('levels', 'sparsemax_p1')}, (torch.float32, torch.bfloat16, torch.float16), ('wide', 'inside'), d),
    cut=check_cut_really, zero=check_zero_keys, opcheck=check_opcheck, compile=check_compile_and_autocast,
    networks_trained=lambda d: check_networks(d, trained=True),
    wide=lambda d: (check_cases(CASES, device=d), check_cases(SLOW, device=d)),
    opcheck_all=lambda d: check_opcheck(d, ('test_schema', 'test_faketensor', 'test_autograd_registration', 'test_aot_dispatch_dynamic')))


if __name__ == '__main__':
    for name in sys.argv[1:] or CHECKS: CHECKS[name]('cuda' if torch.cuda.is_available() else 'cpu'); print(name, flush=True)
