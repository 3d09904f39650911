"""Pictures in and out, and MATLAB's resize against files that MATLAB wrote."""
import os, threading, time
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from msnlan.images import imread, imwrite, imresize, modcrop, resize_matrix, rgb_to_luma, to_image, to_tensor

RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (40, 60, 3), np.uint8)


def golden_lr(root): return sorted((root/'golden_lr').rglob('*.png'))


def test_golden_lr_is_reproduced_to_the_last_bit(data_root):
    files = golden_lr(data_root)
    assert len(files) == 40
    wrong = {}
    for f in files:
        boundary, name, scale = f.parts[-4], f.parts[-3], int(f.parts[-2][1:])
        stem = f.stem.removesuffix(f'x{scale}')
        hr = modcrop(imread(data_root/name/'HR'/f'{stem}.png', grey=None), scale)
        lr, want = imresize(hr, 1/scale, boundary), imread(f, grey=None)
        if lr.ndim == 2 and want.ndim == 3: lr = np.repeat(lr[..., None], 3, -1)
        assert lr.shape == want.shape, f
        if (lr != want).any(): wrong[str(f)] = int((lr != want).sum())
    assert not wrong


def test_resize_is_fast():
    img = RNG.integers(0, 256, (1024, 1024, 3), np.uint8)
    times = []
    for _ in range(4):
        t = time.perf_counter(); imresize(img, 1/2); times.append(time.perf_counter() - t)
    assert min(times) < 0.5, times


@pytest.mark.parametrize('boundary', ['symmetric', 'replicate'])
@pytest.mark.parametrize('n,scale', [(1, 1/2), (3, 1/4), (5, 4), (17, 1/3), (30, 1.5), (7, 0.9), (1, 3)])
def test_resize_matrix_equals_the_definition(n, scale, boundary):
    "Sample by sample, with the picture continued far beyond its edges"
    x = RNG.random(n)
    far = 40*n
    ext = np.pad(x, far, mode='symmetric' if boundary == 'symmetric' else 'edge')
    s, k = min(scale, 1), np.arange(-far, n + far)
    def kernel(d):
        d = abs(d)
        return 1.5*d**3 - 2.5*d**2 + 1 if d <= 1 else -.5*d**3 + 2.5*d**2 - 4*d + 2 if d <= 2 else 0
    m = int(np.ceil(round(n*scale, 9)))
    want = []
    for i in range(m):
        centre = (i + 0.5)/scale - 0.5
        w = np.array([kernel(s*(centre - j)) for j in k])
        want.append((w*ext).sum()/w.sum())
    np.testing.assert_allclose(resize_matrix(n, scale, boundary) @ x, want, rtol=0, atol=1e-12)


def test_resize_float_is_not_rounded_and_uint8_is_clipped():
    step = np.zeros((16, 16)); step[:, 8:] = 255
    big = imresize(step, 2)
    assert big.dtype == np.float64 and big.min() < 0 and big.max() > 255
    assert imresize(step.astype(np.uint8), 2).min() == 0


@pytest.mark.parametrize('bad', [np.zeros((4, 4), int), np.zeros(4), np.zeros((0, 4))])
def test_resize_refuses(bad):
    with pytest.raises(ValueError, match='expected a uint8 or float picture'): imresize(bad, 2)


@pytest.mark.parametrize('suffix', ['.png', '.bmp', '.tif', '.webp', '.PNG'])
@pytest.mark.parametrize('img', [PHOTO, PHOTO[..., 0]], ids=['colour', 'grey'])
def test_round_trip(tmp_path, suffix, img):
    f = imwrite(tmp_path/'deep'/f'a{suffix}', img)
    got = imread(f, grey=True) if img.ndim == 2 and suffix != '.webp' else imread(f)
    want = img if got.ndim == img.ndim else np.repeat(img[..., None], 3, -1)
    assert (got == want).all() and os.listdir(f.parent) == [f.name]


def test_jpeg_is_near(tmp_path):
    smooth = imresize(RNG.integers(60, 200, (8, 8, 3), np.uint8), 8)
    assert np.abs(imread(imwrite(tmp_path/'a.jpg', smooth)).astype(int) - smooth).max() < 25


def test_modes(tmp_path):
    "Palette, 1-bit, grey with alpha, 16-bit, CMYK"
    grey = PHOTO[..., 0]
    def read(img, name='a.png', grey=None, **kw):
        img.save(tmp_path/name, **kw); return imread(tmp_path/name, grey=grey)
    flat = np.repeat(np.arange(60, dtype=np.uint8)[None]*4, 40, 0)
    colours = np.dstack([flat, flat[:, ::-1], flat//2])
    assert np.abs(read(Image.fromarray(colours).quantize(256)).astype(int) - colours).max() < 12
    assert (read(Image.fromarray(flat).convert('P')) == flat).all()  # stays grey
    assert set(np.unique(read(Image.fromarray(grey > 127)))) == {0, 255}
    la = np.dstack([grey, np.where(np.arange(60) < 30, 255, 0).astype(np.uint8)[None].repeat(40, 0)])
    got = read(Image.merge('LA', [Image.fromarray(la[..., i].copy()) for i in (0, 1)]))
    assert got.ndim == 2 and (got[:, :30] == grey[:, :30]).all() and (got[:, 30:] == 255).all()
    deep = grey.astype(np.uint16)*256 + 200
    assert (read(Image.fromarray(deep)) == grey).all()
    assert (read(Image.fromarray(deep), 'a.tif') == grey).all()
    import tifffile
    tifffile.imwrite(tmp_path/'rgb16.tif', PHOTO.astype(np.uint16)*257, photometric='rgb')
    assert (imread(tmp_path/'rgb16.tif') == PHOTO).all()
    assert read(Image.fromarray(PHOTO).convert('CMYK'), 'a.jpg').shape == PHOTO.shape
    with pytest.raises(ValueError, match='found 32'): read(Image.fromarray(grey.astype(np.float32)), 'f.tif')


def test_grey_flag(tmp_path):
    f, g = imwrite(tmp_path/'c.png', PHOTO), imwrite(tmp_path/'g.png', PHOTO[..., 0])
    assert imread(f).shape == imread(g).shape == (40, 60, 3)
    assert (imread(f, grey=True) == np.floor(rgb_to_luma(PHOTO) + .5)).all()
    assert (imread(g, grey=True) == PHOTO[..., 0]).all() and imread(g, grey=None).ndim == 2
    a = imread(f); a[:] = 0  # its own array


def test_exif_rotation_is_honoured(tmp_path):
    exif = Image.Exif(); exif[0x0112] = 6  # 90 degrees clockwise
    Image.fromarray(PHOTO).save(tmp_path/'a.png', exif=exif)
    assert (imread(tmp_path/'a.png') == np.rot90(PHOTO, -1)).all()


@pytest.mark.parametrize('suffix', ['.png', '.jpg', '.bmp', '.tif', '.webp'])
@pytest.mark.parametrize('part', [0, 0.05, 0.5, 0.9])
def test_truncated_files_are_errors(tmp_path, suffix, part):
    f = imwrite(tmp_path/f'a{suffix}', PHOTO)
    data = f.read_bytes(); f.write_bytes(data[:int(len(data)*part)])
    with pytest.raises(ValueError, match='expected a whole picture') as e: imread(f)
    assert '\n' not in str(e.value)


def test_missing_and_wrong_files(tmp_path):
    with pytest.raises(FileNotFoundError, match='expected a picture'): imread(tmp_path/'no.png')
    with pytest.raises(FileNotFoundError): imread(tmp_path)
    (tmp_path/'text.png').write_text('hello')
    with pytest.raises(ValueError, match='whole picture'): imread(tmp_path/'text.png')


def test_imwrite_is_atomic(tmp_path, monkeypatch):
    f = imwrite(tmp_path/'a.png', PHOTO)
    before = f.read_bytes()
    monkeypatch.setattr(Image.Image, 'save', lambda *a, **k: (_ for _ in ()).throw(OSError('disk full')))
    with pytest.raises(OSError, match='disk full'): imwrite(f, PHOTO[::-1].copy())
    assert f.read_bytes() == before and os.listdir(tmp_path) == ['a.png']


def test_readers_never_see_half_a_file(tmp_path):
    a, b, f = PHOTO, 255 - PHOTO, tmp_path/'a.png'
    imwrite(f, a); bad, stop = [], threading.Event()
    def read():
        while not stop.is_set():
            try:
                got = imread(f)
                if not ((got == a).all() or (got == b).all()): bad.append('mixed')
            except Exception as e: bad.append(e)
    t = threading.Thread(target=read); t.start()
    for i in range(40): imwrite(f, (a, b)[i % 2])
    stop.set(); t.join()
    assert not bad


@pytest.mark.parametrize("img,name", [
    (PHOTO/255, 'a.png'), (PHOTO[..., :2], 'a.png'), (PHOTO, 'a.xyz'), (PHOTO, 'a')])
def test_imwrite_refuses(tmp_path, img, name):
    with pytest.raises(ValueError, match='expected'): imwrite(tmp_path/name, img)
    assert not list(tmp_path.iterdir())


def test_tensors():
    assert (to_image(to_tensor(PHOTO)) == PHOTO).all()
    assert (to_image(to_tensor(PHOTO[..., 0])) == PHOTO[..., 0]).all()
    levels = torch.arange(256.)
    assert (to_image((levels/255).view(1, 1, -1)) == levels.numpy()).all()
    halves = ((torch.arange(255) + .5)/255).double().view(1, 1, -1).float()
    assert to_tensor(PHOTO).shape == (1, 3, 40, 60) and to_image(halves).max() <= 255
    for bad in (torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4), torch.zeros(4, 4)):
        with pytest.raises(ValueError, match='expected one picture'): to_image(bad)
    with pytest.raises(ValueError, match='nan'): to_image(torch.full((3, 2, 2), float('nan')))
