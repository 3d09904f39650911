"""Scores against the authors' programs, another implementation, and pictures of another network."""
import json, math
import numpy as np, pytest
from safetensors.numpy import load_file
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from msnlan.images import imread, rgb_to_luma
from msnlan.metrics import PROTOCOLS, program_psnr, psnr, score, ssim

RNG = np.random.default_rng(0)
HR = RNG.integers(0, 256, (48, 40, 3), np.uint8)
SR = (HR.astype(int) + RNG.integers(-20, 21, HR.shape)).clip(0, 255).astype(np.uint8)


def test_golden_program_psnr(golden):
    cases = json.loads((golden/'metrics.json').read_text())['entries']
    data = load_file(golden/'metrics.safetensors')
    for c in cases:
        sr, hr, q = (data[f"{c['index']}.{k}"][0].transpose(1, 2, 0) for k in ('sr', 'hr', 'quantized'))
        kw = {k: c[k] for k in ('scale', 'rgb_range', 'benchmark')}
        kw['restoration'] = c['variant'] == 'dn'
        assert program_psnr(sr, hr, **kw) == pytest.approx(c['psnr'], abs=1e-4), c
        assert program_psnr(q, hr, **kw) == pytest.approx(c['psnr'], abs=1e-4), c


def test_imdn_pictures_score_as_published(data_root):
    stems = ['baby', 'bird', 'butterfly', 'head', 'woman']
    sr, hr = data_root/'sr_outputs/IMDN/Set5_x4', data_root/'Set5/HR'
    rows = [score(imread(sr/f'{s}.png'), imread(hr/f'{s}.png'), 4) for s in stems]
    assert f"{np.mean([r['psnr'] for r in rows]):.3f}" == '32.211'
    assert f"{np.mean([r['ssim'] for r in rows]):.4f}" == '0.8948'


def test_against_scikit_image():
    a, b = rgb_to_luma(SR)[4:-4, 4:-4], rgb_to_luma(HR)[4:-4, 4:-4]
    assert psnr(SR, HR) == pytest.approx(peak_signal_noise_ratio(b, a, data_range=255), abs=1e-9)
    kw = dict(data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    _, full = structural_similarity(b, a, full=True, **kw)
    assert ssim(SR, HR) == pytest.approx(full[5:-5, 5:-5].mean(), abs=1e-9)
    assert psnr(SR, HR, 0, luma=False) == pytest.approx(peak_signal_noise_ratio(HR, SR), abs=1e-9)


def test_protocols_differ_and_are_named():
    got = {p: score(SR, HR, 2 if PROTOCOLS[p].border else 1, p) for p in PROTOCOLS}
    assert len({round(v['psnr'], 6) for v in got.values()}) == 4
    with pytest.raises(ValueError, match='cnn, bicubic'): score(SR, HR, 2, 'matlab')


def test_equal_pictures():
    assert score(HR, HR, 2) == dict(psnr=math.inf, ssim=1.)


@pytest.mark.parametrize('sr,hr,scale,said', [
    (SR[:46], HR, 2, 'expected a result of shape'), (SR[..., 0], HR, 2, 'expected a result of shape'),
    (SR[:8, :8], HR[:8, :8], 4, 'expected more than 8 pixels'), (SR[:14, :14], HR[:14, :14], 2, '11x11'),
    (np.full(HR.shape, np.nan), HR, 2, 'finite'), (SR, HR, 64, 'at least 64x64')])
def test_errors_say_what_was_found(sr, hr, scale, said):
    with pytest.raises(ValueError, match=said) as e: score(sr, hr, scale)
    assert '\n' not in str(e.value)


def test_score_cuts_the_truth_to_a_multiple():
    sr = SR[:48, :39]
    assert score(sr, HR, 3) == score(sr, HR[:48, :39], 3)
