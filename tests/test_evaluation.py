"""Scores of whole sets against published tables; logs, intervals, foreign pictures."""
import warnings
import numpy as np, pandas as pd, pytest, torch
from torch import nn
from msnlan.data.patches import Picture, load_dataset
from msnlan.degradations import cached_bicubic, noise, seed_of
from msnlan.evaluation.scores import as_model, bootstrap, compare, evaluate, score_folder, summarise
from msnlan.evaluation.tables import means, score_table
from msnlan.metrics import perceptual_distance
from msnlan.images import imwrite
from msnlan.models.zoo import create_model

FAST = [(n, s) for n in ('Set5', 'Set14') for s in (2, 3, 4)]
SLOW = [pytest.param(n, s, marks=pytest.mark.slow) for n in ('B100', 'Urban100') for s in (2, 3, 4)]
RNG = np.random.default_rng(0)
PICS = [Picture(f'p{i}', array=RNG.integers(0, 256, (40, 36 + i, 3), np.uint8)) for i in range(4)]


def bicubic(name, scale, root, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)                       # the first half of Urban100
        return evaluate('bicubic', name, scale=scale, data_root=root, progress=False, **kw)


def per_picture(shared, name, scale, variant):
    t = pd.read_csv(shared/'published'/'bicubic_per_image.csv', dtype={'image': str})
    t = t[(t.dataset == name) & (t.scale == scale) & (t.variant == variant)]
    return t.assign(image=t.image.str.replace(r'\.png$', '', regex=True)).set_index('image')


@pytest.mark.parametrize('name,scale', FAST + SLOW)
def test_bicubic_means_and_pictures(shared, data_root, name, scale):
    "Every printed digit of the means; per picture 1e-5"
    t = pd.read_csv(shared/'published'/'bicubic_means.csv', dtype=str)
    want = t[(t.dataset.str.startswith(name)) & (t.scale == str(scale))].iloc[0]
    for protocol, variant in (('cnn', 'pngfY-sym'), ('bicubic', 'vdsr(clip16-235)')):
        got = bicubic(name, scale, data_root, protocol=protocol)
        assert f'{got.psnr.mean():.3f}' == want[f'{protocol}_psnr']
        assert f'{got.ssim.mean():.4f}' == want[f'{protocol}_ssim']
        there = per_picture(shared, name, scale, variant)
        if protocol == 'cnn': got = got[got.picture != 'bridge']           # listed there on its grey values
        there = there.loc[got.picture]
        assert np.abs(got.psnr.values - there.psnr.values).max() < 1e-5
        assert np.abs(got.ssim.values - there.ssim.values).max() < 1e-5


# Of Urban100 only x4: at x2 their pictures have half the size, x3 they do not have
@pytest.mark.parametrize('name,scale', FAST + SLOW[:3] + SLOW[5:])
def test_selfexsr_bicubic_per_picture(shared, data_root, name, scale):
    "The edge rule of old MATLAB meets another group's numbers"
    got = bicubic(name, scale, data_root, protocol='png', boundary='replicate')
    pub = pd.read_csv(shared/'published'/'selfexsr_per_image.csv', dtype={'image': str})
    names = pd.read_csv(shared/'published'/'selfexsr_names.csv', dtype=str)
    theirs = 'BSD100' if name == 'B100' else name
    pub = pub[(pub.dataset == theirs) & (pub.scale == scale) & (pub.method == 'Bicubic')].set_index('image')
    ids = names[names.dataset == theirs].set_index('name').selfexsr_id
    rows = [(r, pub.loc[ids.get(r.picture, r.picture)]) for r in got.itertuples()]
    assert len(rows) >= 5
    assert max(abs(r.psnr - p.psnr) for r, p in rows) < 1e-4
    assert max(abs(r.ssim - p.ssim) for r, p in rows) < 1e-5


def test_imdn_folder_and_its_names(shared, data_root, tmp_path):
    t = score_folder(data_root/'sr_outputs'/'IMDN'/'Set5_x4', 'Set5', 4, data_root)
    assert (f'{t.psnr.mean():.3f}', f'{t.ssim.mean():.4f}') == ('32.211', '0.8948')
    endings = ('x4', '_x4', '_SR', '_x4_SR', '-IMDN')
    for f, end in zip(sorted((data_root/'sr_outputs'/'IMDN'/'Set5_x4').glob('*.png')), endings):
        (tmp_path/f'{f.stem}{end}.png').write_bytes(f.read_bytes())
    again = score_folder(tmp_path, 'Set5', 4, data_root)
    assert again.psnr.tolist() == t.psnr.tolist()
    with pytest.raises(ValueError, match='expected a result of shape') as e: score_folder(tmp_path, 'Set5', 3, data_root)
    assert '\n' not in str(e.value)
    (tmp_path/'womanx4.png').write_bytes(b'')
    with pytest.raises(ValueError, match='given twice'): score_folder(tmp_path, 'Set5', 4, data_root)
    with pytest.raises(FileNotFoundError, match='folder of pictures'): score_folder(tmp_path/'no', 'Set5', 4, data_root)


@pytest.mark.parametrize('quality', [10, 20, 30, 40])
def test_jpeg_inputs_score_as_published(shared, data_root, quality):
    pub = pd.read_csv(shared/'published'/'panet_car.csv')
    pub = pub[(pub.method == 'JPEG') & (pub.dataset == 'Classic5') & (pub.setting == f'q{quality}')].iloc[0]
    t = evaluate('input', 'Classic5', data_root=data_root, task='dejpeg', setting=quality, progress=False)
    assert round(t.psnr.mean(), 2) == pub.psnr_db and round(t.ssim.mean(), 4) == pub.ssim


@pytest.mark.parametrize('name', ['McMaster18', pytest.param('CBSD68', marks=pytest.mark.slow)])
def test_mosaicked_inputs_score_as_published(shared, data_root, name):
    pub = pd.read_csv(shared/'published'/'panet_demosaic.csv').query('method == "Mosaiced"').set_index('dataset')
    t = evaluate('input', name, data_root=data_root, task='demosaic', progress=False)
    assert round(t.psnr.mean(), 2) == pub.psnr_db[name]
    assert abs(t.ssim.mean() - pub.ssim[name]) < (0.00005 if name == 'McMaster18' else 0.0002)   # CBSD68: 0.0849, printed 0.0850


@pytest.mark.slow
@pytest.mark.parametrize('task,name,setting', [
    ('sr', 'Set5', 4), ('denoise', 'CBSD68:3', 30), ('demosaic', 'McMaster18:3', None), ('dejpeg', 'Classic5', 10)])
def test_every_task_of_panet_on_real_sets(data_root, task, name, setting):
    torch.manual_seed(0)
    net = create_model('panet', task=task, n_feats=4, n_resblocks=2, pa_reduction=2, scale=setting if task == 'sr' else 1)
    kw = dict(scale=net.scale, data_root=data_root, task=task, setting=None if task == 'sr' else setting, progress=False)
    t = evaluate(net, name, **kw, tile='chop')
    assert len(t) == len(load_dataset(name, data_root)) and np.isfinite(t[['psnr', 'ssim']]).all().all()
    given = evaluate('bicubic' if task == 'sr' else 'input', name, **kw)
    assert compare(t, given).psnr[0] < 0                                # untrained: worse than what it was given


def test_noise_is_fixed_and_of_its_level(data_root):
    a, b = (evaluate('input', 'Set5', data_root=data_root, task='denoise', setting=30, clip=False, progress=False)
            for _ in range(2))
    assert a.psnr.tolist() == b.psnr.tolist() and a.psnr.between(18.5, 20.2).all()      # 18.59 dB before clipping
    assert len({seed_of(n, s) for n in 'abc' for s in (10, 30)}) == 6
    x, _ = noise(np.full((99, 99, 3), 128, np.uint8), 50, 1, clip=False)
    assert abs(x.std() - 50) < 1 and np.abs(np.corrcoef(x.reshape(-1, 3).T) - np.eye(3)).max() < 0.05


class Net(nn.Module):
    def __init__(self, scale, n_colors=3):
        super().__init__()
        torch.manual_seed(0)
        self.scale, self.n_colors, self.task = scale, n_colors, 'sr' if scale > 1 else 'denoise'
        self.config = dict(scale=scale, n_colors=n_colors)
        sizes = [n_colors] + 5*[48]
        body = [m for a, b in zip(sizes, sizes[1:]) for m in (nn.Conv2d(a, b, 3, padding=1), nn.GELU())]
        last = nn.Conv2d(48, n_colors*scale**2, 3, padding=1)
        self.body = nn.Sequential(*body, last, nn.PixelShuffle(scale))

    def forward(self, x): return self.body(x)


@pytest.mark.parametrize('task,setting,colors', [
    ('sr', None, 3), ('denoise', 10, 3), ('demosaic', None, 3), ('dejpeg', 20, 1)])
def test_a_network_runs_every_task(task, setting, colors, tmp_path):
    net = Net(2 if task == 'sr' else 1, colors).eval()
    kw = dict(scale=net.scale, task=task, setting=setting, progress=False)
    t = evaluate(net, PICS, **kw, save=tmp_path)
    assert len(t) == len(list(tmp_path.iterdir())) == 4
    assert np.isfinite(t[['psnr', 'ssim', 'seconds', 'peak_mb']]).all().all()
    if task == 'denoise': assert np.isfinite(evaluate(net, PICS, **kw, clip=False).psnr).all()
    if task == 'sr':
        assert (evaluate(net, PICS, **kw, self_ensemble=True).psnr != t.psnr).all()
        np.testing.assert_allclose(evaluate(net, PICS, **kw, tile=200).psnr, t.psnr, atol=0.2)


def test_set14_spends_its_time_in_the_network(data_root):
    import time
    net = create_model('msnlan-tiny', scale=4, patches=()).eval()                # 0.2 M parameters, the attention left out
    start = time.perf_counter()
    t = evaluate(net, 'Set14', scale=4, data_root=data_root, progress=False)
    share = t.seconds.sum()/(time.perf_counter() - start)
    assert share > 0.6, share                                                # the notebook shows what an idle machine gives


def test_low_resolution_from_the_cache(tmp_path, data_root):
    kw = dict(scale=3, data_root=data_root, progress=False)
    want = evaluate(Net(3).eval(), 'Set5:2', **kw)
    for _ in range(2):
        got = evaluate(Net(3).eval(), 'Set5:2', **kw, cache=tmp_path)
        assert got.psnr.tolist() == want.psnr.tolist() and len(list(tmp_path.glob('*.png'))) == 2
    for f in tmp_path.iterdir(): imwrite(f, np.zeros((9, 9, 3), np.uint8))
    assert evaluate(Net(3).eval(), 'Set5:2', **kw, cache=tmp_path).psnr.tolist() == want.psnr.tolist()


def test_more_columns(monkeypatch):
    "Distances beside the scores, here a stand-in that needs no features"
    monkeypatch.setattr('msnlan.metrics.perceptual_distance', lambda sr, hr, metric: float(np.abs(sr*1. - hr).mean()))
    t = evaluate('bicubic', PICS, scale=2, perceptual=['lpips'], progress=False)
    s = summarise(t).iloc[0]
    assert (t.lpips > 0).all() and s.lpips == pytest.approx(t.lpips.mean()) and s.lpips_low <= s.lpips <= s.lpips_high
    assert compare(t, t).lpips[0] == 0 and 'dists' not in t
    both = pd.concat([t, evaluate('bicubic', PICS, scale=2, label='without', progress=False)])
    one, other = score_table(means(both)).iloc[:, 1]
    assert one == f'{t.psnr.mean():.2f} / {t.ssim.mean():.4f} / {t.lpips.mean():.4f}' and other == one.rpartition(' / ')[0]


def test_what_is_no_picture_names_the_picture():
    class Nan(Net):
        def forward(self, x): return super().forward(x)*float('nan')
    odd = [(Nan(2), 'p0 of pictures: expected numbers, found .* nan'), (lambda lr: lr/255., 'p0 .* uint8 picture .* found float64'),
           (lambda lr: None, 'found NoneType'), (lambda lr: lr, r'p0 .* expected a result of shape'),
           (lambda lr: np.zeros((40, 36), np.uint8), r'p0 .* expected a result of shape')]
    for model, said in odd:
        with pytest.raises(ValueError, match=said): evaluate(model, PICS, scale=2, progress=False)
    perfect = evaluate('input', PICS, task='denoise', setting=0, progress=False)
    assert np.isinf(perfect.psnr).all() and (perfect.ssim == 1).all()      # infinite, and said so where a mean is asked for
    with pytest.raises(ValueError, match='infinite PSNR'): summarise(perfect)


def test_log_is_resumed_and_guarded(tmp_path):
    calls, log = [], tmp_path/'a'/'log.jsonl'
    def double(lr): calls.append(1); return lr.repeat(2, 0).repeat(2, 1)
    def stop(lr):
        if len(calls) == 2: raise KeyboardInterrupt
        return double(lr)
    stop.__qualname__ = double.__qualname__; stop.__name__ = double.__name__
    with pytest.raises(KeyboardInterrupt): evaluate(stop, PICS, scale=2, log=log, progress=False)
    done = evaluate(double, PICS, scale=2, log=log, progress=False)
    assert len(calls) == 4 and done.psnr.tolist() == evaluate(double, PICS, scale=2, progress=False).psnr.tolist()
    with pytest.raises(ValueError, match='another one'): evaluate(double, PICS, scale=3, log=log, progress=False)
    a, b = Net(2), Net(2); b.body[0].bias.data += 1
    evaluate(a, PICS, scale=2, log=tmp_path/'n', progress=False)
    with pytest.raises(ValueError, match='another one'): evaluate(b, PICS, scale=2, log=tmp_path/'n', progress=False)


@pytest.mark.parametrize('kw,said', [
    (dict(task='paint'), 'expected a task'), (dict(protocol='matlab'), 'expected a protocol'),
    (dict(scale=1), 'at least 2'), (dict(scale=2.5), 'whole scale'), (dict(task='denoise', setting=10), 'scale 1'),
    (dict(task='denoise', scale=1), "'input'"), (dict(task='demosaic', model='input', scale=1, protocol='jpeg'), "'rgb'"), (dict(model='input'), "'bicubic'"),
    (dict(model='no-such-model'), 'no-such-model'), (dict(model=Net(3)), 'scale'),
    (dict(model=Net(2), protocol='bicubic'), "use 'cnn'"), (dict(dataset=[]), 'empty list')])
def test_errors(kw, said):
    kw = dict(model='bicubic', dataset=PICS, scale=2, progress=False) | kw
    with pytest.raises(ValueError, match=said) as e: evaluate(**kw)
    assert '\n' not in str(e.value)
    if kw['dataset']:
        bad = [Picture('tiny', array=np.zeros((8, 8, 3), np.uint8))]
        with pytest.raises(ValueError, match='expected'): evaluate('bicubic', bad, scale=4, progress=False)


def test_intervals_and_paired_differences():
    a = evaluate('bicubic', PICS, scale=2, progress=False)
    s = summarise(a).iloc[0]
    assert s.psnr == pytest.approx(a.psnr.mean()) and a.psnr.min() <= s.psnr_low <= s.psnr <= s.psnr_high <= a.psnr.max()
    better = a.assign(psnr=a.psnr + [1, 1.1, 0.9, 1], model='better')
    d = compare(better, a).iloc[0]
    assert d.psnr == pytest.approx(1) and 0.9 <= d.psnr_low < d.psnr_high <= 1.1 and d.better == 1 and d.ssim == 0
    with pytest.raises(ValueError, match='same pictures'): compare(a, a[:3])
    with pytest.raises(ValueError, match='finite'): bootstrap([1, np.nan])


def test_optional_packages_say_what_to_install(tmp_path):
    import importlib.util
    with pytest.raises(FileNotFoundError, match='spandrel:FILE'): as_model(f'spandrel:{tmp_path}/x.pth', 4)
    (tmp_path/'x.pth').touch()
    if not importlib.util.find_spec('spandrel'):
        with pytest.raises(ImportError, match='pip install spandrel'): as_model(f'spandrel:{tmp_path}/x.pth', 4)
    if not importlib.util.find_spec('torchvision'):
        with pytest.raises(ImportError, match='pip install torchvision'): perceptual_distance(PICS[0].array, PICS[0].array)


def test_spandrel_through_its_interface(monkeypatch, tmp_path):
    "With a stand-in for the package, as its documentation describes it"
    import sys, types
    class Described:
        scale, input_channels, output_channels = 2, 3, 3
        def __init__(self): self.model = Net(2)
        def __call__(self, x): return self.model(x)
        def to(self, *a, **k): self.model.to(*a, **k)
    class Loader:
        def __init__(self, device=None): pass
        def load_from_file(self, path): return Described()
    monkeypatch.setitem(sys.modules, 'spandrel', types.SimpleNamespace(ModelLoader=Loader))
    (tmp_path/'some.pth').touch(); name = f'spandrel:{tmp_path}/some.pth'
    got = evaluate(name, PICS, scale=2, progress=False)
    assert set(got.model) == {'some'} and got.psnr.tolist() == evaluate(Net(2).eval(), PICS, scale=2, progress=False).psnr.tolist()
    with pytest.raises(ValueError, match='for x4'): evaluate(name, PICS, scale=4, progress=False)
    Described.output_channels = 4
    with pytest.raises(ValueError, match='found 3 to 4'): evaluate(name, PICS, scale=2, progress=False)


def test_cache_is_verified_and_safe_for_several_processes(tmp_path):
    from concurrent.futures import ProcessPoolExecutor
    import multiprocessing as mp
    img = PICS[0].array
    want = cached_bicubic(img, 2, tmp_path/'x')[0]
    with ProcessPoolExecutor(2, mp.get_context('spawn')) as pool:
        got = list(pool.map(cached_bicubic, [img]*6, [2]*6, [tmp_path]*6))
    assert all((g[0] == want).all() for g in got)
    f, = tmp_path.glob('*.png')
    imwrite(f, 255 - want)                                        # a valid picture under a wrong name
    assert (cached_bicubic(img, 2, tmp_path)[0] == want).all()
    assert (cached_bicubic(255 - img, 2, tmp_path)[0] != want).any() and not list(tmp_path.glob('.*'))
