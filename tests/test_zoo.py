"""The zoo: parameter counts, sizes, both layouts of weights, damaged files, the Hub, training of every system."""
import importlib.util, json, os, subprocess, sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import conformance
from conftest import ROOT
from msnlan.data.patches import PatchDataset, Picture
from msnlan.degradations import degrade
from msnlan.inference import predict
from msnlan.models.cards import kept_card, model_card
from msnlan.models.checkpoints import read_state, to_authors
from msnlan.models.zoo import SYSTEMS, create_model, infer_config, list_models, load_model, load_weights, save_weights, weights_folder

SMALL = {'msnlan': dict(n_feats=16, n_resgroups=2, n_resblocks=1), 'csnln': dict(n_feats=8, depth=2),
         'panet': dict(n_feats=8, n_resblocks=2, pa_reduction=2), 'hspan': dict(n_feats=8, n_resgroups=1, n_resblocks=1),
         'mlrn': dict(n_feats=16, n_modules=1, region=8)}
TASKS = [(name, 'sr', s) for name in SMALL for s in (2, 3, 4)] + [('panet', t, 1) for t in ('denoise', 'demosaic', 'dejpeg')]


def small(name, task='sr', scale=2, **config):
    torch.manual_seed(0)
    return create_model(name, scale=scale, **SMALL[name], **({'task': task} if name == 'panet' else {}), **config)


# ---- counts ----------------------------------------------------------------------------------------------------

COUNTS = {  # configuration -> total numbers, numbers in the authors' checkpoint, its keys (ARCHITECTURES section 8)
    ('msnlan', 2): (9_581_067, 9_581_070, 945), ('msnlan', 3): (9_765_707, 9_765_710, 945), ('msnlan', 4): (9_728_779, 9_728_782, 947),
    ('csnln', 2): (3_061_289, 3_061_290, 51), ('csnln', 3): (6_010_409, 6_010_410, 51), ('csnln', 4): (6_568_627, 6_568_629, 84),
    ('panet', 2): (40_811_870, 40_894_115, 160), ('panet', 3): (43_762_270, 43_844_515, 160), ('panet', 4): (43_172_190, 43_254_435, 162),
    ('panet', 'denoise', 80): (5_957_279, 5_957_359, 420), ('panet', 'denoise', 16): (1_230_495, 1_230_511, 100),
    ('panet', 'dejpeg', 80): (5_954_973, 5_955_053, 420), ('panet', 'dejpeg', 16): (1_228_189, 1_228_205, 100),
    ('panet', 'demosaic', 80): (5_957_279, 5_957_359, 420), ('panet', 'demosaic', 16): (1_230_495, 1_230_511, 100),
    ('hspan', 2): (32_288_698, 32_288_698, 283), ('hspan', 3): (33_948_538, 33_948_538, 283), ('hspan', 4): (33_616_570, 33_616_570, 285),
}


@pytest.mark.parametrize('key', COUNTS, ids=str)
def test_parameter_counts_are_the_authors(key):
    total, numbers, keys = COUNTS[key]
    net = create_model(key[0], scale=key[1]) if len(key) == 2 else create_model('panet', task=key[1], n_resblocks=key[2])
    assert sum(p.numel() for p in net.parameters()) == total
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == total - 24
    theirs = to_authors(net)
    assert (sum(t.numel() for t in theirs.values()), len(theirs)) == (numbers, keys)


LISTED = {'msnlan_default_x2': ('msnlan', dict(scale=2)), 'msnlan_default_x4': ('msnlan', dict(scale=4)),
          'csnln_default_x2': ('csnln', dict(scale=2)), 'csnln_default_x4': ('csnln', dict(scale=4)),
          'panet_default_dn': ('panet', dict(task='denoise')), 'panet_default_sr_x2': ('panet', dict(scale=2)),
          'hspan_default_x2': ('hspan', dict(scale=2)),
          'msnlan_small_x2_f16_g4_b1': ('msnlan', dict(scale=2, n_feats=16, n_resgroups=4, n_resblocks=1)),
          'csnln_x3_f128_d2': ('csnln', dict(scale=3, depth=2)), 'csnln_x4_f128_d2': ('csnln', dict(scale=4, depth=2)),
          'panet_dn_f64_b2': ('panet', dict(task='denoise', n_resblocks=2)),
          'panet_sr_x4_f256_b2': ('panet', dict(scale=4, n_resblocks=2)),
          'hspan_x3_f16_g1_b2': ('hspan', dict(scale=3, n_feats=16, n_resgroups=1, n_resblocks=2))}


@pytest.mark.parametrize('listing', LISTED)
def test_every_key_and_shape_is_the_authors(golden, listing):
    lists = {**json.loads((golden/'default_state_keys.json').read_text()), **json.loads((golden/'small_state_keys.json').read_text())}
    assert set(lists) == set(LISTED)
    name, config = LISTED[listing]
    net = create_model(name, **config)
    theirs = to_authors(net)
    assert {k:list(v.shape) for k,v in theirs.items()} == lists[listing]
    system, found = infer_config(theirs)
    assert system == name and found == {k:net.config[k] for k in found}


# ---- sizes -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name,task,scale', TASKS)
def test_any_size_from_one_pixel_up(name, task, scale): conformance.any_size(small(name, task, scale))


@pytest.mark.parametrize('name,task,scale', TASKS)
def test_gradients_are_finite_on_flat_pictures(name, task, scale): conformance.finite_gradients(small(name, task, scale))


# ---- configurations --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', SMALL)
def test_unknown_keywords_and_bad_values_name_the_accepted(name):
    conformance.bad_values_are_refused(name)
    conformance.config_makes_it_again(small(name))


def test_unknown_names_and_missing_weights():
    with pytest.raises(ValueError, match="model is 'srcnn'; expected one of msnlan, csnln"): create_model('srcnn')
    with pytest.raises(FileNotFoundError, match='no weights for csnln at scale 2'): create_model('csnln', scale=2, pretrained=True)


@pytest.mark.parametrize('stem', list_models(pretrained=True))
def test_pretrained_weights_load(stem):
    whole = load_model(stem)
    name = next(n for n in list_models() if stem.startswith(n + '-') and n.endswith('-tiny'))
    given = dict(scale=whole.scale) if whole.task == 'sr' else dict(task=whole.task)
    level = stem.removeprefix(f'{name}-{whole.task}-')
    level = True if level == stem else int(level)                            # a task with several levels asks for one
    net = create_model(name, pretrained=level, **given)
    assert (net.scale, net.task) == (whole.scale, whole.task) and stem == f'{name}-' + (f'x{net.scale}' if net.task == 'sr' else net.task if level is True else f'{net.task}-{level}')
    with pytest.raises(ValueError, match='were trained with'): create_model(name, rgb_range=77, pretrained=level, **given)


def test_a_task_with_several_levels_asks_which():
    with pytest.raises(FileNotFoundError, match='dejpeg, come with the package: .*-10, .*-20; say which level'):
        create_model('panet-tiny', task='dejpeg', pretrained=True)


# ---- weights ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name,task,scale', TASKS)
def test_weights_come_back_bit_equal(name, task, scale, tmp_path):
    net = small(name, task, scale)
    conformance.weights_come_back(net, tmp_path)
    if not net.marks: return                                   # MLRN: no authors' program
    torch.save({'epoch': 3, 'state_dict': {f'module.{k}':v for k,v in to_authors(net).items()}}, tmp_path/'theirs.pt')
    back = load_model(tmp_path/'theirs.pt', **({'task': task} if task == 'demosaic' else {}))
    conformance.same_weights(net, back)


def test_equal_weights_give_equal_bytes(tmp_path):
    "In processes whose hashes are seeded differently"
    code = ('import sys, torch; from msnlan.models.zoo import create_model, save_weights; torch.manual_seed(0)\n'
            'net = create_model("msnlan-tiny", scale=2)\n'
            'for i in range(3): save_weights(net, f"{sys.argv[1]}-{i}.safetensors", dict(steps=3, recipe=dict(lr=1e-3, data=["T91"]), device="cpu"))')
    for seed in '12': subprocess.run([sys.executable, '-c', code, tmp_path/seed], env=dict(os.environ, PYTHONHASHSEED=seed), check=True)
    found = {p.read_bytes() for p in tmp_path.iterdir()}
    assert len(list(tmp_path.iterdir())) == 6 and len(found) == 1


def test_files_with_a_text_per_entry_are_read(tmp_path):
    "The layout of the first weight files"
    net = small('hspan')
    texts = dict(format='pt', system='hspan', config=json.dumps(net.config), steps='3', device='cpu', recipe='{"lr": 0.001}')
    save_file({k:v.contiguous() for k,v in net.state_dict().items()}, tmp_path/'old.safetensors', texts)
    back, about = load_model(tmp_path/'old.safetensors'), read_state(tmp_path/'old.safetensors')[1]
    assert back.config == net.config and all(torch.equal(v, back.state_dict()[k]) for k,v in net.state_dict().items())
    assert (about['steps'], about['device'], about['recipe']) == (3, 'cpu', {'lr': 0.001})
    save_weights(back, tmp_path/'new.safetensors', {k:v for k,v in texts.items() if k not in ('format', 'system', 'config')})
    assert read_state(tmp_path/'new.safetensors')[1] == about
    texts['config'] = texts['config'][:-9]
    save_file(net.state_dict(), tmp_path/'cut.safetensors', texts)
    with pytest.raises(ValueError, match='metadata that cannot be read'): load_model(tmp_path/'cut.safetensors')


def test_authors_weights_as_safetensors(tmp_path):
    net = small('csnln')
    save_file(to_authors(net), tmp_path/'theirs.safetensors', {'format': 'pt'})
    assert all(torch.equal(v, net.state_dict()[k]) for k,v in load_model(tmp_path/'theirs.safetensors').state_dict().items())


@pytest.mark.parametrize('stem', list_models(pretrained=True))
def test_cards_are_made_from_the_weights(stem):
    path = weights_folder()/f'{stem}.safetensors'
    assert model_card(path, kept_card(path)) == path.with_suffix('.md').read_text(), 'msnlan models card writes it'


def damaged(kind, state, path):
    "Write a checkpoint that is damaged in one way"
    first, second = list(state)[6:8]
    if kind == 'renamed': state = {f'{first}x' if k == first else k:v for k,v in state.items()}
    if kind == 'missing': state = {k:v for k,v in state.items() if k != first}
    if kind == 'surplus': state = {**state, 'extra.weight': torch.ones(2)}
    if kind == 'shape': state = {**state, first: torch.ones(5, 7, 1)}
    if kind == 'nan': state = {**state, first: state[first]*float('nan')}
    save_file({k:v.clone().contiguous() for k,v in state.items()}, path) if path.suffix == '.safetensors' else torch.save(state, path)
    if kind == 'cut short': path.write_bytes(path.read_bytes()[:-300])
    if kind == 'empty': path.write_bytes(b'')
    if kind == 'garbled head': path.write_bytes(b'\xff'*40 + path.read_bytes()[40:])
    return first


MESSAGES = {'renamed': '1 missing: .*1 surplus: ', 'missing': '1 missing: ', 'surplus': '1 surplus: extra.weight', 'shape': r'is \(5, 7, 1\), expected ',
            'nan': 'not finite', 'cut short': 'damaged or cut short', 'empty': 'damaged or cut short', 'garbled head': 'damaged or cut short|refused'}


@pytest.mark.parametrize('kind', MESSAGES)
@pytest.mark.parametrize('name', SMALL)
def test_damaged_checkpoints_are_refused(name, kind, tmp_path):
    net = small(name)
    before = {k:v.clone() for k,v in net.state_dict().items()}
    layouts = [('own.safetensors', net.state_dict()), ('own.pt', net.state_dict())] + ([('theirs.pt', to_authors(net))] if name != 'mlrn' else [])
    for file, state in layouts:
        first = damaged(kind, dict(state), tmp_path/file)
        with pytest.raises(ValueError, match=MESSAGES[kind]) as e: load_weights(net, tmp_path/file)
        assert '\n' not in str(e.value)
        if kind in ('renamed', 'missing', 'shape', 'nan') and name != 'panet': assert first in str(e.value)
        if file == 'theirs.pt':
            with pytest.raises(ValueError): load_model(tmp_path/file)
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items())    # untouched by what was refused


class Bomb:
    "An object whose unpickling makes a folder"
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir, (self.path,)


@pytest.mark.parametrize('legacy', [False, True])
def test_code_in_a_checkpoint_does_not_run(tmp_path, legacy):
    net = small('msnlan')
    torch.save({**to_authors(net), 'note': Bomb(tmp_path/'ran')}, tmp_path/'bomb.pt', _use_new_zipfile_serialization=not legacy)
    for load in load_model, lambda p: load_weights(net, p):
        with pytest.raises(ValueError, match='refused: .*would run code'): load(tmp_path/'bomb.pt')
    assert not (tmp_path/'ran').exists()
    torch.save(net, tmp_path/'whole.pt', _use_new_zipfile_serialization=not legacy)   # a whole pickled network
    with pytest.raises(ValueError, match='refused'): load_model(tmp_path/'whole.pt')


def test_wrong_system_scale_and_range_are_said_in_words(tmp_path):
    for layout in ('own', 'theirs'):
        def file(net):
            path = tmp_path/f'{layout}.{"safetensors" if layout == "own" else "pt"}'
            save_weights(net, path) if layout == 'own' else torch.save(to_authors(net), path)
            return path
        with pytest.raises(ValueError, match='weights of csnln; the model is hspan'): load_weights(small('hspan'), file(small('csnln')))
        with pytest.raises(ValueError, match='weights for scale 4; the model has scale 2'): load_weights(small('panet'), file(small('panet', scale=4)))
        with pytest.raises(ValueError, match='another rgb_range'): load_weights(small('msnlan', rgb_range=1), file(small('msnlan')))
    with pytest.raises(FileNotFoundError, match='is not a file'): load_weights(small('msnlan'), tmp_path/'none.pt')
    with pytest.raises(ValueError, match='does not say which model'): load_model(dict(small('msnlan').state_dict()))


def test_authors_old_torch_format_is_read(tmp_path):
    net = small('panet', 'denoise', 1)
    torch.save(to_authors(net), tmp_path/'old.pt', _use_new_zipfile_serialization=False)
    assert all(torch.equal(v, net.state_dict()[k]) for k,v in load_model(tmp_path/'old.pt').state_dict().items())


def test_shared_tensors_must_agree():
    state = to_authors(small('panet', 'denoise', 1)); state['body.2.body.1.weight'] = torch.tensor([0.5])
    with pytest.raises(ValueError, match='should be one tensor and differ'): load_model(state)


# ---- the Hub ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', SMALL)
def test_hub_folder_comes_back_bit_equal(name, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    net = small(name)
    net.save_pretrained(tmp_path/'m')
    back = SYSTEMS[name].from_pretrained(tmp_path/'m')
    assert back.config == net.config
    assert all(torch.equal(v, back.state_dict()[k]) for k,v in net.state_dict().items())


def test_torch_hub_entries():
    net = torch.hub.load(str(ROOT), 'msnlan', source='local', scale=2, pretrained=False, **SMALL['msnlan'])
    assert net.system == 'msnlan' and net.scale == 2
    assert {n.replace('-', '_') for n in list_models()} <= set(dir(_hubconf()))


def _hubconf():
    spec = importlib.util.spec_from_file_location('hubconf', ROOT/'hubconf.py')
    module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
    return module


# ---- MLRN, which has no golden numbers -------------------------------------------------------------------------

def test_covariance_root_is_the_eigenvalues_root():
    from msnlan.models.mlrn import covariance, matrix_root
    x = torch.randn(3, 12, 11, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma = covariance(x)
    assert np.allclose(sigma[1].numpy(), np.cov(x[1].flatten(1).numpy(), bias=True))
    val, vec = np.linalg.eigh(sigma.numpy())
    exact = (vec*np.sqrt(val)[:, None])@vec.transpose(0, 2, 1)
    errors = [np.abs(matrix_root(sigma, n).numpy() - exact).max() for n in (2, 5, 10, 20)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-8


def test_region_attention_is_plain_attention_inside_a_region():
    from msnlan.models.mlrn import RegionNonLocal
    torch.manual_seed(0)
    block = RegionNonLocal(16, region=6).double(); torch.nn.init.normal_(block.out.weight)
    x = torch.randn(2, 16, 13, 9, dtype=torch.float64)
    y = block(x)
    for rows in (slice(0, 6), slice(6, 12), slice(12, 13)):
        for cols in (slice(0, 6), slice(6, 9)):
            part = x[:, :, rows, cols]
            q, k, v = (m(part).flatten(2) for m in (block.query, block.key, block.value))
            plain = (v@(q.mT@k).softmax(-1).mT).unflatten(2, part.shape[2:])
            assert torch.allclose(y[:, :, rows, cols], part + block.out(plain), atol=1e-10)


# ---- training --------------------------------------------------------------------------------------------------

def picture(patch=64):
    "A real picture that ships inside scikit-image"
    from skimage import data
    return np.ascontiguousarray(data.astronaut()[96:96+patch, 160:160+patch])


def degraded(net, img):
    "Input and target of the network's task: reduced, noisy (sigma 50), mosaicked, or through JPEG at quality 10"
    return degrade(img, net.task, {'sr': net.scale, 'denoise': 50, 'dejpeg': 10}.get(net.task), 'astronaut')


def pairs(net, size=12, batch=4):
    "Batches of input and target patches of a real picture for the network's task"
    data = PatchDataset([Picture('astronaut', array=picture(144))], net.scale, size, degradation=lambda img: degraded(net, img))
    for i in range(0, len(data), batch): yield [torch.stack(t) for t in zip(*[data[i+k] for k in range(batch)])]


def train(net, steps=20):
    "Loss of one batch before and after training on `steps` others"
    batches = pairs(net)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 3e-3)
    loss = lambda x, y: (net(x) - y).abs().mean()
    held = next(batches)
    with torch.no_grad(): before = loss(*held).item()
    for _, batch in zip(range(steps), batches):
        optimizer.zero_grad(); loss(*batch).backward(); optimizer.step()
    with torch.no_grad(): return before, loss(*held).item()


def check_training(name, task, scale, tmp_path):
    net = small(name, task, scale)
    first, last = train(net)
    assert last < first, (first, last)
    back = load_model(save_weights(net, tmp_path/'trained.safetensors', dict(steps=20)))
    assert all(torch.equal(v, back.state_dict()[k]) for k,v in net.state_dict().items())
    given, target = degraded(net, picture(24*scale))
    out = predict(back, given, tile='chop')
    assert out.shape == target.shape and out.std() > 5
    assert np.array_equal(out, predict(net, given, tile='chop'))


def test_a_network_trains_saves_and_upscales(tmp_path): check_training('msnlan', 'sr', 2, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('name,task,scale', TASKS)
def test_every_system_trains_saves_and_upscales(name, task, scale, tmp_path): check_training(name, task, scale, tmp_path)
