"""Properties of the fused kernels on drawn problems, as `test_attention.py` has them for the CPU: equal to the definition with every
gradient, whichever way the work is cut and the products are made; the same bits twice; a batch is its pictures. Run by the tests.

    TRITON_INTERPRET=1 python tests/fused_property.py [EXAMPLES]"""
import sys
import torch
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from fused_cases import relative
from msnlan.attention.gpu import FORMS, cut_work, fused_attention
from msnlan.attention.definition import patch_attention_reference
from msnlan.attention.operator import patch_attention

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
SEEN = dict(whole=0, strips=0, strips_of_keys=0, sparsemax=0)


def results(f, maps, up, n, kind):
    "Output and gradients of query, keys, values, computed in `kind`"
    a = [t.to(DEVICE, kind).requires_grad_() for t in maps]
    out = f(a[0], a[1:n+1], a[n+1:])
    return [out, *torch.autograd.grad(out, a, up.to(DEVICE, kind))]


def how_cut(query, keys, options, max_scores):
    "Whether the problem is cut, and which way"
    r, W = options['patch']//2, query.shape[-1]
    strips, blocks = cut_work(query.shape[0], (query.shape[-2], W + r), [(k.shape[-2], k.shape[-1] + r) for k in keys], r,
                              max_scores or 2**26,
                         options['weighting'] == 'sparsemax')
    return 'strips_of_keys' if len(blocks) > len(keys) else 'strips' if len(strips) > 1 else 'whole'


@st.composite
def cases(draw):
    "A problem of the operator, how its products are made, and how many entries a score array may have (0: any)"
    size, patch = lambda most: draw(st.integers(1, most)), draw(st.sampled_from([1, 3, 3, 5, 7]))
    n, c, cv, s, H, W = size(2), size(4), size(3), size(3), size(6), size(4)
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    grids = [(size(5), size(4)) for _ in range(size(2))]
    keys, values = [rand(n, c, h, w) for h, w in grids], [rand(n, cv, s*h, s*w) for h, w in grids]
    if draw(st.booleans()): keys[0][:, :, :2] = 0                          # key patches that are all zero
    options = dict(patch=patch, softmax_scale=draw(st.sampled_from([1., 10.])), divisor=draw(st.sampled_from([1., 6.])),
                   normalize_keys=draw(st.booleans()), weighting=draw(st.sampled_from(['softmax', 'sparsemax'])))
    problem = rand(n, c, H, W)*draw(st.sampled_from([.1, 1.]))/c**.5, keys, values, options
    row = (W + patch//2)*sum(h*(w + patch//2) for h, w in grids)
    return problem, draw(st.sampled_from(FORMS if patch <= 3 else ('wide', 'inside'))), draw(st.sampled_from([0, 0, H*row//2]))


def equal_to_the_definition(case):
    (query, keys, values, options), form, max_scores = case
    n, maps, s = len(keys), [query, *keys, *values], values[0].shape[-2]//keys[0].shape[-2]
    up = torch.randn(query.shape[0], values[0].shape[1], s*query.shape[-2], s*query.shape[-1], generator=torch.Generator().manual_seed(1),
                     dtype=torch.float64)
    SEEN[how_cut(query, keys, options, max_scores)] += 1
    SEEN['sparsemax'] += options['weighting'] == 'sparsemax'
    fused = lambda q, k, v: fused_attention(q, k, v, form=form, max_scores=max_scores, **options)
    plain = lambda q, k, v: patch_attention_reference(q, k, v, **options)
    want = results(plain, maps, up, n, torch.float64)
    for got, good in zip(results(fused, maps, up, n, torch.float64), want):
        assert (got - good).abs().max() <= 1e-8*max(1., good.abs().max())
    single = [results(f, maps, up, n, torch.float32) for f in (fused, fused, plain)]
    assert all(map(torch.equal, *single[:2]))                                    # no order is left to chance
    smooth = len(want) if options['weighting'] == 'softmax' else 1               # rounding may change a sparsemax's support
    for got, good, other in [*zip(single[0], want, single[2])][:smooth]:
        assert (got - good).abs().max() <= max(1e-5*max(1., good.abs().max()), 8*(other - good).abs().max())
    if query.shape[0] > 1:
        one = fused(*(maps[0][-1:].to(DEVICE), [k[-1:].to(DEVICE) for k in keys], [v[-1:].to(DEVICE) for v in values]))
        assert relative(one, want[0][-1:]) < 1e-8


def run(examples):
    "Let hypothesis draw `examples` cases, always the same ones"
    given(cases())(settings(max_examples=examples, deadline=None, derandomize=True, database=None, phases=[Phase.generate, Phase.shrink],
                            suppress_health_check=list(HealthCheck))(equal_to_the_definition))()


if __name__ == '__main__':
    run(int((sys.argv[1:] or ['6'])[0]))
    print(*(f'{k}={v}' for k, v in SEEN.items()))
