"""The authors' golden numbers: what each case is in our classes, and how it is checked. A script too, without pytest:

    python tests/golden_cases.py [--device cuda] [--backend triton] [CASE ...]"""
import argparse, json, math, os, sys, zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from msnlan.models.layers import ChannelAttention, PatchAttention
from msnlan.models import csnln, hspan, msnlan, panet
from msnlan.models.checkpoints import from_authors
from msnlan.models.names import authors_names
from msnlan.models.zoo import create_model, infer_config, load_model

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = next((p for p in (ROOT.parent/'shared/golden', ROOT/'shared/golden') if p.is_dir()), None)
CASES = sorted(p.stem for p in GOLDEN.glob('*.safetensors')) if GOLDEN else []


# ---- what each case is, in our classes -------------------------------------------------------------------------

class Gate(torch.nn.Module):
    "MSNLAN's channel attention alone, under the authors' names"
    def __init__(self, channels, reduction, contrast):
        super().__init__(); self.gate = ChannelAttention(channels, reduction, contrast)
    def forward(self, x): return self.gate(x)


def gate_names(module):
    part = {'squeeze': 'conv_du.0', 'excite': 'conv_du.2'}
    return {f'gate.{p}.{k}':[f'{n}.{k}'] for p,n in part.items() for k in ('weight', 'bias')}


class Attend(torch.nn.Module):
    "The inside of an MSNLAN branch, with a map of its own for keys and values"
    def __init__(self, channels, kernel, res_scale):
        super().__init__()
        branch = msnlan.Branch(channels, kernel, res_scale)
        self.query, self.key, self.value, self.attention = branch.query, branch.key, branch.value, branch.attention
        self.res_scale = res_scale
    def forward(self, x, s): return msnlan.Branch.attend(self, x, s)


def attend_names(module):
    names = authors_names(msnlan.Branch(16, 3))
    return {k:[n.removeprefix('stoL.') for n in v] for k,v in names.items() if not k.startswith('key_map')}


BLOCKS = {  # beginning of a case's name -> its module, from the case's configuration
    'msnlan_ca_': lambda c: Gate(c['channels'], c['reduction'], False),
    'msnlan_cca_': lambda c: Gate(c['channels'], c['reduction'], True),
    'msnlan_rmab_': lambda c: msnlan.RMAB(c['channels']),
    'msnlan_rg_': lambda c: msnlan.ResidualGroup(c['channels'], c['n_resblocks']),
    'msnlan_branch_': lambda c: msnlan.Branch(c['channels'], c['kernel'], c['res_scale'], c['softmax_scale']),
    'msnlan_csa_': lambda c: Attend(c['channels'], c['kernel'], c['res_scale']),
    'msnlan_msnlab_': lambda c: msnlan.MSNLAB(c['channels'], c['kernels'], c['res_scale']),
    'csnln_isnl_': lambda c: csnln.InScaleAttention(c['channels']),
    'csnln_csnl_': lambda c: csnln.CrossScaleAttention(c['channels'], c['scale']),
    'csnln_msp_': lambda c: csnln.Projection(c['channels'], c['scale']),
    'csnln_sem_': lambda c: csnln.Cell(c['channels'], c['scale']),
    'panet_pa_': lambda c: panet.PyramidAttention(c['channels'], c['reduction'], c['levels'], c['res_scale'], c.get('legacy_resize', False)),
    'hspan_hspa_': lambda c: hspan.HSPA(c['channels'], c['reduction'], c['res_scale']),
}
NETWORKS = {  # beginning of a case's name -> name in the zoo and keywords, from the case's configuration
    'msnlan_full_': lambda c: ('msnlan', c),
    'msnlan_default_': lambda c: ('msnlan', c),
    'csnln_full_': lambda c: ('csnln', c),
    'csnln_default_': lambda c: ('csnln', c),
    'panet_full_sr_': lambda c: ('panet', c),
    'panet_full_car_': lambda c: ('panet', {'task': 'dejpeg', **c}),
    'panet_full_dn_': lambda c: ('panet', {'task': 'denoise', **c}),
    'panet_default_dn_': lambda c: ('panet', {'task': 'denoise', **c}),
    'hspan_full_': lambda c: ('hspan', c),
}
SMALL = ['msnlan_csa_zerokeys_k3', 'hspan_hspa_c16_6x7_k128_n1', 'csnln_csnl_s4_c8_12x8_n1']   # seconds by the interpreter
BLOCK_CASES = [c for c in CASES if c.startswith(tuple(BLOCKS))]
NETWORK_CASES = [c for c in CASES if c.startswith(tuple(NETWORKS))]


def names_of(module):
    return {Gate: gate_names, Attend: attend_names}.get(type(module), authors_names)(module)


def pick(table, case): return next(v for k,v in table.items() if case.startswith(k))


# ---- the case's data -------------------------------------------------------------------------------------------

def read(case):
    return load_file(GOLDEN/f'{case}.safetensors'), json.loads((GOLDEN/f'{case}.json').read_text())


def hashed(name, shape, lo, hi):
    "Tensor of `shape` from the hash of its name, uniform in [lo, hi)"
    v = np.arange(math.prod(shape), dtype=np.uint32)*np.uint32(2654435761) + np.uint32(zlib.crc32(name.encode()))
    v ^= v >> np.uint32(16); v *= np.uint32(2246822519)
    v ^= v >> np.uint32(13); v *= np.uint32(3266489917); v ^= v >> np.uint32(16)
    return torch.from_numpy((lo + (hi - lo)*(v/2**32)).astype(np.float32)).reshape(shape)


def hash_init(module, meta):
    "Fill a network by the rule `hash32-v1`; mean shifts keep their values"
    modules = dict(module.named_modules())
    for ours, names in authors_names(module).items():
        owner, _, leaf = ours.rpartition('.')
        p = dict(module.named_parameters()).get(ours)
        if p is None or ours.startswith(('entry', 'exit')): continue
        name, layer = names[0], modules[owner]
        f = math.prod(factor for part, factor in meta['init_rules'] if part in name)
        if isinstance(layer, torch.nn.PReLU): lo, hi = 0.15, 0.35
        elif p.ndim >= 2:
            up = isinstance(layer, torch.nn.ConvTranspose2d)
            fan = p.shape[0]*p[0, 0].numel()/layer.stride[0]**2 if up else p[0].numel()
            hi = meta['init_gain']*f*math.sqrt(3/fan); lo = -hi
        else: hi = 0.05*min(f, 1); lo = -hi
        p.data = hashed(name, p.shape, lo, hi)


def build(case, device='cpu', backend='auto'):
    "Module of the case with its weights, the case's tensors and fields"
    tensors, meta = read(case)
    state = {k[6:]:v for k,v in tensors.items() if k.startswith('state.')}
    if case in BLOCK_CASES:
        module = pick(BLOCKS, case)(meta['config'])
        names = names_of(module)
        assert {n for ns in names.values() for n in ns} == set(state)
        module.load_state_dict({k:state[names[k][0]] for k in module.state_dict()})
    elif state:
        name, config = pick(NETWORKS, case)(meta['config'])
        module = load_model(state, **{k:v for k,v in config.items() if k not in infer_config(state)[1]})
        assert infer_config(state)[0] == name
        assert config.items() <= module.config.items()        # what was inferred is what the file's author says
    else:
        name, config = pick(NETWORKS, case)(meta['config'])
        module = create_model(name, **config)
        hash_init(module, meta)
    for m in module.modules():
        if isinstance(m, PatchAttention): m.backend = backend
    return module.eval().to(device), {k:v.to(device) for k,v in tensors.items()}, meta


def run(module, tensors, dtype, grad=False):
    "Inputs and outputs of the case, both in the authors' range of values"
    r = getattr(module, 'rgb_range', 1)
    inputs = [tensors[k].to(dtype).requires_grad_(grad) for k in ('input', 'input_s') if k in tensors]
    outputs = module(*[x/r for x in inputs])
    return inputs, [y*r for y in (outputs if isinstance(outputs, (tuple, list)) else [outputs])]


def outputs_of(tensors, stem='output'):
    return [tensors[k] for k in (stem, f'{stem}.0', f'{stem}.1') if k in tensors]


# ---- the checks ------------------------------------------------------------------------------------------------

def check_outputs(case, device='cpu', backend='auto'):
    module, tensors, meta = build(case, device, backend)
    with torch.no_grad():
        _, out = run(module, tensors, torch.float32)
        for y, want, noise in zip(out, outputs_of(tensors), meta['max_abs_f32_minus_f64'], strict=True):
            assert y.shape == want.shape
            error, bound = (y - want).abs().max().item(), max(1e-5*max(1, want.abs().max().item()), 4*noise)
            assert error <= bound, f'{case}: float32 differs by {error:.1e}, at most {bound:.1e} expected'
        _, out = run(module.double(), tensors, torch.float64)
        want = [tensors[k] for k in ('output_f64', 'output_f64.0', 'output_f64.1', 'output.0_f64', 'output.1_f64') if k in tensors]
        for y, w in zip(out, want, strict=True):
            error = ((y - w).abs().max()/w.abs().max().clamp_min(1)).item()
            assert error <= 1e-9, f'{case}: float64 differs by {error:.1e}'


def has_gradients(case):
    with safe_open(GOLDEN/f'{case}.safetensors', 'pt') as f: return any(k.startswith('grad_') for k in f.keys())


def check_gradients(case, device='cpu', backend='auto'):
    "Gradients of the input, and of every parameter by its norm, against the float32 numbers of the programs"
    module, tensors, meta = build(case, device, backend)
    module.double()
    for kind in 'sum', 'up':
        inputs, out = run(module, tensors, torch.float64, grad=True)
        weights = outputs_of(tensors, 'upstream.output') if kind == 'up' else [torch.ones((), device=device) for _ in out]
        module.zero_grad()
        sum((y*w.double()).sum() for y, w in zip(out, weights, strict=True)).backward()
        for x, k in zip(inputs, ('input', 'input_s')):
            want = tensors[f'grad_{kind}.{k}']
            assert (x.grad - want).abs().max() <= 2e-5*max(1, want.abs().max()), f'{case}: gradient of {k}'
        if kind == 'sum' and meta.get('param_grad_l2_of_sum'):
            check_norms(module, meta['param_grad_l2_of_sum'])


def check_norms(module, want):
    "Norms of the parameters' gradients; none where the program has none"
    ours = dict(module.named_parameters())
    noise = 1e-6*max(v for v in want.values() if v is not None)    # float32 sums that cancel
    for k, names in names_of(module).items():
        if k not in ours: continue
        norm = next((want[n] for n in names if n in want), None)
        if norm is None: assert ours[k].grad is None or not ours[k].requires_grad
        else: assert math.isclose(ours[k].grad.norm().item(), norm, rel_tol=1e-4, abs_tol=noise), k


def check(case, device='cpu', backend='auto'):
    "Outputs, and gradients where the case has them"
    check_outputs(case, device, backend)
    if has_gradients(case): check_gradients(case, device, backend)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('cases', nargs='*', help='names; without: all'); p.add_argument('--device', default='cpu')
    p.add_argument('--backend', default='auto')
    a = p.parse_args()
    torch.backends.cudnn.allow_tf32 = False
    for case in a.cases or BLOCK_CASES + NETWORK_CASES: check(case, a.device, a.backend); print(case, flush=True)
