"""Finding sets, refusing incomplete ones, and patches that are a pure function of (seed, i)."""
import time, warnings
import numpy as np, pytest, torch
from torch.utils.data import DataLoader
from msnlan.data.patches import PatchDataset, Picture, dihedral, list_pictures, load_dataset, patch_tensor, planes
from msnlan.data.registry import find_dataset, find_root
from msnlan.images import imread, imresize, imwrite, modcrop

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def offline(monkeypatch): monkeypatch.setenv('MSNLAN_OFFLINE', '1')    # tests/test_fetch.py has the network


PICS = [Picture(f'p{i}', array=RNG.integers(0, 256, (60 + 7*i, 50 + 9*i, 3), np.uint8)) for i in range(4)]


@pytest.mark.parametrize('name,n', [
    ('Set5', 5), ('set14', 14), ('BSD100', 100), ('Urban100:50', 50), ('McMaster18', 18), ('Classic5', 5),
    ('Set12', 12), ('CBSD68', 68), ('BSD68:3', 3), ('BSDS400', 399), ('T91', 91), ('SunHays80_odd', 40)])
def test_layout_of_the_pack(data_root, name, n):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        pics = load_dataset(name, data_root)
    assert len(pics) == len({p.name for p in pics}) == n
    assert pics[0].read().ndim == 3


def test_half_of_urban100_is_said_aloud(data_root):
    with pytest.warns(UserWarning, match='first 50 of 100'):
        assert len(load_dataset('Urban100', data_root)) == 50


def test_environment_and_paths(data_root, monkeypatch, tmp_path):
    monkeypatch.setenv('MSNLAN_DATA', str(data_root))
    assert find_root() == data_root and find_root(tmp_path) == tmp_path and len(load_dataset('Set5')) == 5
    assert len(load_dataset(str(data_root/'Set14'/'HR'))) == len(load_dataset(str(data_root/'Set14'))) == 14
    monkeypatch.delenv('MSNLAN_DATA'); monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    assert find_root() == tmp_path/'msnlan'/'data' and find_dataset('Set5') is None
    with pytest.raises(FileNotFoundError, match='MSNLAN_DATA|expected a folder'): find_root(tmp_path/'no')


def fill(folder, names, n=24):
    for x in names: imwrite(folder/f'{x}.png', RNG.integers(0, 256, (n, n, 3), np.uint8))


def test_missing_empty_incomplete_and_strange_sets(tmp_path):
    for name in ('Set5', 'NoSuchSet'):
        with pytest.raises(FileNotFoundError, match='expected') as e: load_dataset(name, tmp_path)
        assert '\n' not in str(e.value)
    (tmp_path/'Set5'/'HR').mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match='msnlan data fetch Set5'): load_dataset('Set5', tmp_path)
    fill(tmp_path/'Set5'/'HR', ['baby', 'bird', 'butterfly', 'head'])
    with pytest.raises(ValueError, match=r'found 4: 1 missing \(woman\)'): load_dataset('Set5', tmp_path)
    fill(tmp_path/'Set5'/'HR', ['woman', 'cat'])
    with pytest.raises(ValueError, match=r'1 unknown \(cat\)'): load_dataset('Set5', tmp_path)
    assert len(load_dataset(str(tmp_path/'Set5'))) == 6                    # named by path: taken as it is
    with pytest.raises(ValueError, match='1 to 6'): load_dataset('Set5:9', tmp_path)
    fill(tmp_path/'Urban100'/'HR', [f'img_{i:03}' for i in (1, 2, 4)])
    with pytest.raises(ValueError, match='97 missing'): load_dataset('Urban100', tmp_path)


def test_folders_of_the_authors_programs(tmp_path):
    fill(tmp_path/'benchmark'/'Mine'/'HR', ['a', 'b'])
    fill(tmp_path/'benchmark'/'Mine'/'LR_bicubic'/'X2', ['ax2', 'bx2'])
    assert [p.name for p in load_dataset('Mine', tmp_path)] == ['a', 'b']


def test_names_stay_unique_and_hidden_files_are_passed_over(tmp_path):
    fill(tmp_path/'x', 'ab'); fill(tmp_path/'y', 'a'); fill(tmp_path/'.cache', 'q')
    (tmp_path/'notes.txt').write_text('no picture')
    assert [p.name for p in list_pictures(tmp_path)] == ['x/a', 'x/b', 'y/a']


def test_built_in_sets_need_no_files():
    test, train = load_dataset('skimage-test'), load_dataset('skimage-train')
    assert not {p.name for p in test} & {p.name for p in train}
    assert all(p.read().shape[-1] == 3 and min(p.read().shape[:2]) >= 96 for p in test + train)


@pytest.mark.parametrize('scale', [1, 2, 3, 4])
def test_items_are_pure_and_aligned(scale):
    data = PatchDataset(PICS, scale=scale, patch=12, length=64, seed=5)
    again = PatchDataset(PICS, scale=scale, patch=12, length=64, seed=5)
    for i in (63, 0, 17):
        (lr, hr), (lr2, hr2) = data[i], again[i]
        assert torch.equal(lr, lr2) and torch.equal(hr, hr2) and lr.shape == (3, 12, 12)
        n, y, x, k, _ = data.draw(i)
        whole = modcrop(PICS[n].array, scale)
        small = imresize(whole, 1/scale) if scale > 1 else whole
        cut = small[y:y + 12, x:x + 12], whole[y*scale:(y + 12)*scale, x*scale:(x + 12)*scale]
        for got, w in zip((lr, hr), cut): assert torch.equal(got, patch_tensor(dihedral(planes(w), k)))
    other = PatchDataset(PICS, scale=scale, patch=12, length=64, seed=6)
    assert any(not torch.equal(data[i][0], other[i][0]) for i in range(4))


def test_inputs_from_the_cache_are_the_same(tmp_path):
    plain = PatchDataset(PICS, scale=2, patch=12, length=8)
    for _ in range(2):
        kept = PatchDataset(PICS, scale=2, patch=12, length=8, cache=tmp_path)
        assert len(list(tmp_path.glob('*.png'))) == len(PICS)
        assert all(torch.equal(a, b) for i in range(8) for a, b in zip(plain[i], kept[i]))


def test_draws_cover_pictures_places_and_symmetries():
    data = PatchDataset(PICS, scale=2, patch=24, length=4000)
    draws = [data.draw(i)[:4] for i in range(4000)]
    counts = np.bincount([n for n, *_ in draws])
    assert abs(counts/1000 - 1).max() < 0.15 and {k for *_, k in draws} == set(range(8))
    h, w = data.pairs[0][0].shape[1:]
    places = {(y, x) for n, y, x, _ in draws if n == 0}
    assert {y for y, _ in places} == set(range(h - 23)) and {x for _, x in places} == set(range(w - 23))


def test_workers_give_the_same_batches():
    data = PatchDataset(PICS, scale=2, patch=16, length=32)
    plain = [b[0] for b in DataLoader(data, batch_size=8)]
    forked = [b[0] for b in DataLoader(data, batch_size=8, num_workers=2)]
    assert all(torch.equal(a, b) for a, b in zip(plain, forked))


def test_small_pictures_are_left_out_aloud():
    with pytest.warns(UserWarning, match='2 of 4'): data = PatchDataset(PICS, scale=2, patch=33)
    assert data.names == ['p2', 'p3']
    for bad in (dict(patch=99), dict(patch=0), dict(length=0)):
        with pytest.raises(ValueError, match='expected'): PatchDataset(PICS, scale=2, **bad)
    with pytest.raises(ValueError, match='empty'): PatchDataset([], scale=2)
    with pytest.raises(IndexError): PatchDataset(PICS, scale=2, patch=8, length=5)[5]


def test_a_batch_takes_milliseconds():
    picture = Picture('a', array=RNG.integers(0, 256, (400, 500, 3), np.uint8))
    data = PatchDataset([picture], scale=2, patch=48, length=9999)
    times = []
    for b in range(5):
        t = time.perf_counter(); [data[16*b + i] for i in range(16)]; times.append(time.perf_counter() - t)
    assert min(times) < 0.03, times
