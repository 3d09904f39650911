"""The operator against its definition, its gradient, the authors' numbers, and the ways a model is run."""
import json
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from msnlan.attention.definition import attention_map, has_numba, patch_attention_reference, sparsemax
from msnlan.attention.operator import patch_attention

CASES = ['msnlan_csa_k5_c16_q9x14_k12x10', 'msnlan_csa_zerokeys_k3', 'msnlan_branch_k3_c16_13x17_n2',
         'msnlan_branch_k5_c16_13x17_n2', 'msnlan_branch_k7_c16_13x17_n2', 'msnlan_branch_k7_c16_6x4_n1',
         'csnln_csnl_s2_c128_8x6_n1', 'csnln_csnl_s2_c16_12x14_n2', 'csnln_csnl_s3_c16_12x9_n1',
         'csnln_csnl_s4_c8_12x8_n1', 'csnln_isnl_c16_13x17_n2', 'panet_pa_l3_c16_12x10_n1',
         'panet_pa_l5_c16_13x17_n2', 'panet_pa_l5_c8_90x6_n1', 'panet_pa_legacyresize_c16_13x17',
         'hspan_hspa_c16_13x17_k128_n1', 'hspan_hspa_c16_13x17_k8_n2', 'hspan_hspa_c16_6x7_k128_n1']
NUMBA = pytest.mark.skipif(not has_numba(), reason='needs numba')
FAST = ['whole', 'numba', 'strips'] if has_numba() else ['strips']


def relative(a, b): return ((a-b).abs().max()/b.abs().max().clamp_min(1e-30)).item()


@st.composite
def problems(draw):
    "Any configuration of the operator: levels, value scale, patch, key grids, weighting, divisor, norm"
    size = lambda: draw(st.integers(1, 9))
    patch = draw(st.sampled_from([1, 3, 5, 7, 9])); s = draw(st.integers(1, 4)); n = draw(st.integers(1, 2))
    c, cv = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    grids = [(size(), size()) for _ in range(draw(st.integers(1, 3)))]
    keys, values = [rand(n, c, h, w) for h, w in grids], [rand(n, cv, s*h, s*w) for h, w in grids]
    if draw(st.booleans()): keys[0][:, :, :2] = 0                          # key patches that are all zero
    options = dict(patch=patch, softmax_scale=draw(st.sampled_from([1., 10.])), divisor=draw(st.sampled_from([1., 6.])),
                   normalize_keys=draw(st.booleans()), weighting=draw(st.sampled_from(['softmax', 'sparsemax'])))
    return rand(n, c, size(), size())*draw(st.sampled_from([.1, 1.]))/c**.5, keys, values, options


def backends(options):
    compiled = ['whole', 'numba'] if options['weighting'] == 'softmax' else ['whole']
    pixels = ['sdpa'] if options['weighting'] == 'softmax' and options.get('patch') == 1 else []
    return ['plain', 'strips', *pixels] + (compiled if has_numba() else [])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(problems())
def test_equal_to_the_definition(problem):
    query, keys, values, options = problem
    want = patch_attention_reference(query, keys, values, **options)
    scale = want.abs().max().clamp_min(1e-3).item()
    for backend in backends(options):
        got = patch_attention(query, keys, values, backend=backend, **options)
        assert (got-want).abs().max().item() <= 1e-10*max(1, scale), backend
        single = [query.float(), [k.float() for k in keys], [v.float() for v in values]]
        error = (patch_attention(*single, backend=backend, **options) - want).abs().max().item()
        noise = (patch_attention_reference(*single, **options) - want).abs().max().item()   # of float32 itself
        assert error <= max(1e-5*max(1, scale), 4*noise), backend


@pytest.mark.parametrize('patch,s,levels,weighting', [(3, 1, 1, 'softmax'), (5, 2, 2, 'softmax'), (1, 1, 1, 'sparsemax'), (3, 1, 2, 'sparsemax')])
def test_gradcheck(patch, s, levels, weighting):
    torch.manual_seed(0)
    maps = [torch.randn(1, 2, 4, 3).double()*.4] + [torch.randn(1, 2, 3, 4).double() for _ in range(levels)] \
        + [torch.randn(1, 2, 3*s, 4*s).double() for _ in range(levels)]
    maps = [t.requires_grad_() for t in maps]
    for backend in backends(dict(weighting=weighting)):
        f = lambda q, *m: patch_attention(q, list(m[:levels]), list(m[levels:]), patch, 2., backend=backend, weighting=weighting)
        assert torch.autograd.gradcheck(f, maps, atol=1e-6, fast_mode=s > 1), backend       # the large one on a random projection


@pytest.mark.parametrize('backend', FAST)
@pytest.mark.parametrize('patch,size', [(3, 30), (7, 26)])
def test_gradients_in_float32(backend, patch, size):
    torch.manual_seed(1)
    q, k, v, g = [torch.randn(1, c, n, n) for c, n in [(8, size), (8, size+4), (6, size+4), (6, size)]]
    q = q*.1
    def run(f, dtype):
        a = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        out = f(*a); return [out, *torch.autograd.grad(out, a, g.to(dtype))]
    want = run(lambda *a: patch_attention_reference(*a, patch), torch.float64)
    for a, b in zip(run(lambda *a: patch_attention(*a, patch, backend=backend), torch.float32), want): assert relative(a, b) < 1e-5


@pytest.mark.parametrize('backend', ['plain', *FAST])
def test_zero_keys_have_finite_gradients(backend):
    q, k, v = torch.randn(1, 4, 8, 8, requires_grad=True), torch.zeros(1, 4, 8, 8, requires_grad=True), torch.randn(1, 3, 8, 8, requires_grad=True)
    patch_attention(q, k, v, 3, backend=backend).square().sum().backward()
    assert all(t.grad.isfinite().all() for t in (q, k, v))


@pytest.mark.parametrize('backend', FAST)
def test_same_bits_whatever_the_threads(backend):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 8, 40, 33), torch.randn(2, 8, 42, 35), torch.randn(2, 8, 42, 35)
    def run():
        a = [t.clone().requires_grad_() for t in (q, k, v)]
        out = patch_attention(*a, 5, backend=backend); out.sum().backward(); return [out, *(t.grad for t in a)]
    first, n = run(), torch.get_num_threads()
    assert all(torch.equal(a, b) for a, b in zip(first, run()))
    if backend == 'strips': return
    try:
        torch.set_num_threads(1 if n > 1 else 2)
        other = run()
    finally: torch.set_num_threads(n)
    assert all(torch.equal(a, b) for a, b in zip(other, first))


@pytest.mark.parametrize('backend', FAST)
def test_views_half_and_autocast(backend):
    q, k, v = [torch.randn(2, 20, 22, 6).permute(0, 3, 1, 2) for _ in range(3)]
    want = patch_attention_reference(q, k, v, 3)
    assert relative(patch_attention(q, k, v, 3, backend=backend), want) < 1e-5
    with torch.autocast('cpu', torch.bfloat16): assert relative(patch_attention(q, k, v, 3, backend=backend), want) < 1e-5
    half = patch_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), 3, backend=backend)
    assert half.dtype == torch.bfloat16
    assert relative(half.float(), patch_attention_reference(*[t.bfloat16().float() for t in (q, k, v)], 3)) < 1e-2


class Block(torch.nn.Module):
    def __init__(self, weighting):
        super().__init__(); self.conv, self.weighting = torch.nn.Conv2d(3, 8, 3, padding=1), weighting

    def forward(self, x):
        y = self.conv(x)
        return patch_attention(y[:, :4], y[:, 4:], y, 3, weighting=self.weighting)


@pytest.mark.parametrize('weighting', ['softmax', 'sparsemax'])
def test_export_with_any_size(weighting):
    block, dim = Block(weighting).eval(), torch.export.Dim
    shapes = ({2: dim('h', min=4, max=64), 3: dim('w', min=4, max=64)},)
    program = torch.export.export(block, (torch.randn(1, 3, 12, 14),), dynamic_shapes=shapes).module()
    for h, w in [(12, 14), (9, 17), (30, 21)]:
        x = torch.randn(1, 3, h, w)
        assert relative(program(x), block(x)) < 1e-5


def test_compile_around_it():
    block, x = Block('softmax'), torch.randn(1, 3, 24, 26)
    out = torch.compile(block, backend='aot_eager')(x)
    assert relative(out, block(x)) < 1e-5
    out.sum().backward()
    assert block.conv.weight.grad.isfinite().all()


def test_errors_say_what_was_expected():
    q, k, v = torch.randn(1, 4, 5, 5), torch.randn(1, 4, 5, 5), torch.randn(1, 2, 7, 7)
    for call, words in [(lambda: patch_attention(q, k, v), 'one integer s'), (lambda: patch_attention(q, k, k, 2), 'odd'),
                        (lambda: patch_attention(q, k[:, :3], k), 'agree'), (lambda: patch_attention(q, k, k, backend='x'), 'backend'),
                        (lambda: patch_attention(q, k, k, weighting='x'), 'softmax'), (lambda: patch_attention(q, [], []), 'levels'),
                        (lambda: attention_map(q, k, [(5, 0)]), 'points')]:
        with pytest.raises(ValueError, match=words): call()


@pytest.mark.parametrize('topk', ['8', 'None'])
def test_soft_threshold(golden, topk):
    case = load_file(golden/f'hspan_soft_threshold_k{topk}.safetensors')
    assert (sparsemax(case['input']) - case['output']).abs().max() < 1e-6
    assert (sparsemax(case['input'].double()) - case['output_f64']).abs().max() < 1e-9


@pytest.mark.parametrize('row', [torch.zeros(1, 70000), torch.rand(1, 70000)*1e-6, (torch.arange(70000)[None] % 7)*1.,
                                 torch.cat([torch.ones(1, 5), torch.zeros(1, 69995)], 1)])
def test_sparsemax_ties_and_full_support(row):
    want = sparsemax(row.double().clone()[:, :60000]), sparsemax(row[:, :60000])          # below the size of the compiled loop
    assert relative(want[1].double(), want[0]) < 1e-3
    w = sparsemax(row.double())
    assert abs(w.sum().item()-1) < 1e-9 and (w >= 0).all()
    assert w.max() - w[row.double() == row.double().max()].min() < 1e-12


def embed(x, state, name, stem):
    "conv 1 then PReLU"
    a, b, c = [state[f'{stem}{name}.{t}'] for t in ('0.weight', '0.bias', '1.weight')]
    return F.prelu(F.conv2d(x, a, b), c)


def resize(x, factor, legacy):
    size = [int(n*factor) for n in x.shape[-2:]]
    if legacy: return F.interpolate(x, size=size, mode='bicubic', align_corners=False)
    return F.interpolate(x, scale_factor=factor, mode='bicubic', align_corners=False, recompute_scale_factor=False)


def maps_of(kind, state, case, config):
    "query, keys, values, options of the operator, and what the module does with its output"
    x = case['input']
    emb = lambda t, name, stem='': embed(t, state, name, stem)
    if kind.startswith('msnlan'):
        k, stem, s = config['kernel'], '', case.get('input_s')
        if 'branch' in kind:
            stem = 'stoL.'
            s = F.prelu(F.conv2d(x, state['down_sample.0.weight'], state['down_sample.0.bias'], padding=k//2), state['down_sample.1.weight'])
        r = config['res_scale']
        after = (lambda y: x + r*(y + r*x)) if 'branch' in kind else (lambda y: y + r*x)
        return emb(x, 'conv_match_1', stem), emb(s, 'conv_match_2', stem), emb(s, 'conv_assembly', stem), dict(patch=k), after
    if kind.startswith('csnln_csnl'):
        y = F.interpolate(x, scale_factor=1/config['scale'], mode='bilinear', align_corners=False)
        return emb(x, 'conv_match_1'), emb(y, 'conv_match_2'), emb(x, 'conv_assembly'), dict(patch=3, divisor=6.), lambda y: y
    if kind.startswith('panet'):
        levels = [x if i == 0 else resize(x, 1-i/10, config.get('legacy_resize', False)) for i in range(config['levels'])]
        return (emb(x, 'conv_match_L_base'), [emb(t, 'conv_match') for t in levels], [emb(t, 'conv_assembly') for t in levels],
                dict(patch=3, divisor=4.), lambda y: y + config['res_scale']*x)
    options = dict(patch=1, softmax_scale=1., normalize_keys=False)
    if kind.startswith('hspan'): options['weighting'] = 'sparsemax'
    r = config.get('res_scale', 0)
    return (emb(x, 'conv_match1'), emb(x, 'conv_match2'), emb(x, 'conv_assembly'), options,
            (lambda y: r*y + x) if kind.startswith('hspan') else (lambda y: y))


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_authors_numbers(golden, name, dtype):
    meta, case = json.loads((golden/f'{name}.json').read_text()), load_file(golden/f'{name}.safetensors')
    case = {k: v.to(dtype) if v.is_floating_point() else v for k, v in case.items()}
    state = {k[6:]: v for k, v in case.items() if k.startswith('state.')}
    case['input'].requires_grad_()
    q, k, v, options, after = maps_of(name, state, case, meta['config'])
    noise = max(meta['max_abs_f32_minus_f64'])
    top = max(1, case['output'].abs().max().item())
    want = case['output' if dtype == torch.float32 else 'output_f64']
    bound = max(1e-5*top, 4*noise) if dtype == torch.float32 else 1e-9*top
    for backend in backends(dict(weighting=options.get('weighting', 'softmax'))):
        out = after(patch_attention(q, k, v, backend=backend, **options))
        assert (out-want).abs().max().item() <= bound, backend
        if 'grad_up.input' not in case: continue
        grad, = torch.autograd.grad(out, case['input'], case['upstream.output'], retain_graph=True)
        assert relative(grad, case['grad_up.input']) < 1e-4, backend
    options.pop('divisor', None)
    points = meta['query_positions']
    weights = attention_map(q, k, points, **options)
    seen = 0
    for key, value in case.items():
        if not key.startswith('attn.'): continue
        b = int(key.split('.b')[1].split('.')[0]) if '.b' in key else 0
        y, x = map(int, key.rsplit('.q', 1)[1].split('_')); seen += 1
        got = weights[b if '.b' in key else slice(None), points.index([y, x])].reshape(-1)
        assert (got - value.reshape(-1)).abs().max() < 2e-5*max(1, noise*1e5), key
    assert seen


@pytest.mark.parametrize('size', [5, 30])
def test_large_scores_stay_finite(size):
    "Columns that are no queries must not overflow the exponential: weight 0 times infinity was a NaN once"
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, c, 26, 31, generator=g) for c in (8, 8, 16))
    out = patch_attention(q*size, k, v, patch=3)
    want = patch_attention_reference((q*size).double(), k.double(), v.double(), patch=3)
    assert torch.isfinite(out).all()
    assert (out - want).abs().max() <= 1e-4*want.abs().max()   # float32 scores in the thousands
