"""`msnlan upscale` and `restore` on what people really have: bad files among good ones, odd names, full targets, sizes in two steps."""
import io, resource, sys
import numpy as np, pytest
from PIL import Image
from msnlan.cli import main
from msnlan.images import imread, imwrite

rng = np.random.default_rng(0)
picture = lambda h=6, w=5: rng.integers(0, 256, (h, w, 3), dtype=np.uint8)


@pytest.fixture()
def msnlan(monkeypatch, capsys, tmp_path):
    "Call the command in an empty folder: exit status, stdout, lines of stderr"
    monkeypatch.chdir(tmp_path)
    def call(*args):
        monkeypatch.setattr(sys, 'argv', ['msnlan', *map(str, args)])
        with pytest.raises(SystemExit) as end: main()
        said = capsys.readouterr()
        assert 'Traceback' not in said.err
        return end.value.code or 0, said.out, [l for l in said.err.splitlines() if l.strip()]
    return call


def refused(found, *texts):
    status, _, err = found
    assert status == 1 and err[-1].startswith('msnlan: '), found
    for t in texts: assert t in err[-1], err[-1]


def test_bad_files_among_good_ones(msnlan, tmp_path):
    good = ('a b.png', 'grün.jpg', 'sub/写真.bmp', 'z.tif')
    for n in good: imwrite(tmp_path/'in'/n, picture()) if not n.endswith('tif') else Image.fromarray(picture()).save(tmp_path/'in'/n)
    whole = (tmp_path/'in/a b.png').read_bytes()
    for n, data in {'cut.png': whole[:len(whole)//2], 'empty.jpg': b'', 'words.png': b'not a picture'}.items(): (tmp_path/'in'/n).write_bytes(data)
    (tmp_path/'in/link.png').symlink_to('nowhere.png')
    status, out, err = msnlan('upscale', 'in', '-o', 'out')
    assert status == 1 and '4 pictures, x2' in out
    made = sorted(p.relative_to(tmp_path/'out').as_posix() for p in (tmp_path/'out').rglob('*') if p.is_file())
    assert made == sorted(n.rpartition('.')[0] + '_x2.png' for n in good), 'the good ones are made, and nothing else'
    failed = [l for l in err if l.startswith('failed: ')]
    assert len(failed) == 4 and all(any(n in l for l in failed) for n in ('cut.png', 'empty.jpg', 'words.png', 'link.png'))
    assert '4 of 8 pictures failed' in err[-1] and err[-5:-1] == failed, 'listed at the end'
    assert imread(tmp_path/'out/sub/写真_x2.png').shape == (12, 10, 3)


def test_eight_is_two_after_four(msnlan, tmp_path):
    imwrite(tmp_path/'a.png', picture())
    assert msnlan('upscale', 'a.png', '-o', 'b.png', '--scale', '8')[0] == 0
    assert imread(tmp_path/'b.png').shape == (48, 40, 3)
    refused(msnlan('upscale', 'a.png', '-o', 'c.png', '--scale', '5'), 'expected 2, 3, 4 or 8')
    assert not (tmp_path/'c.png').exists()


def test_nothing_is_overwritten_unasked(msnlan, tmp_path):
    imwrite(tmp_path/'a.png', picture())
    (tmp_path/'b.png').write_bytes(b'mine')
    refused(msnlan('upscale', 'a.png', '-o', 'b.png'), 'b.png is there already', '--overwrite')
    assert (tmp_path/'b.png').read_bytes() == b'mine'
    assert msnlan('upscale', 'a.png', '-o', 'b.png', '--overwrite')[0] == 0 and imread(tmp_path/'b.png').shape == (12, 10, 3)


def test_a_full_target_keeps_no_half(msnlan, tmp_path):
    imwrite(tmp_path/'a.png', picture(30, 30))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))             # no file may grow beyond, as on a full disk
    try: refused(msnlan('upscale', 'a.png', '-o', 'out/b.png'), 'b.png')
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p for p in (tmp_path/'out').rglob('*')] == [], 'nothing half-written'


def test_targets_that_cannot_be(msnlan, tmp_path):
    imwrite(tmp_path/'a.png', picture()); (tmp_path/'file').write_text('x')
    refused(msnlan('upscale', 'a.png', '-o', 'file/b.png'), 'file')
    refused(msnlan('upscale', 'a.png', '-o', 'file'), 'file', 'expected a folder')
    refused(msnlan('upscale', 'a.png', '-o', 'b.gif'), 'expected a name ending in')
    refused(msnlan('upscale', 'a.png', '-o', 'b.txt'), 'expected a name ending in', 'a folder is written b.txt/')
    refused(found := msnlan('upscale', 'none.png', '-o', 'b.png'), 'none.png', 'found nothing')
    assert found[1] == '', 'nothing is said to be made'
    refused(msnlan('upscale', '*.webp', '-o', 'out'), 'has no pictures')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.png', 'file']


def test_options_that_cannot_be(msnlan, tmp_path):
    imwrite(tmp_path/'a.png', picture())
    refused(msnlan('upscale', 'a.png', '-o', 'b.png', '--tile', '20'), '--tile 20: expected auto, whole, chop or a side')
    refused(msnlan('upscale', 'a.png', '-o', 'b.png', '--device', 'tpu'), '--device tpu')
    refused(msnlan('upscale', 'a.png', '-o', 'b.png', '--model', 'msnlan', '--scale', '2'), 'no weights for msnlan', 'msnlan-tiny-x2')
    refused(msnlan('restore', 'a.png', '-o', 'b.png', '--model', 'msnlan-tiny-x2'), 'msnlan upscale uses it')
    assert not (tmp_path/'b.png').exists()


def test_a_command_that_cannot_be(msnlan):
    for args in (('nothing',), ('upscale',), ('upscale', 'a.png'), ('upscale', 'a.png', '-o', 'b.png', '--jobs', '0'), ('data', 'nothing')):
        found = msnlan(*args)
        refused(found, '--help says what there is')
        assert len(found[2]) == 1
    refused(msnlan('restore', 'a.png', '-o', 'b.png', '--model', 'panet-tiny'), 'panet-tiny-denoise-30')


def test_through_pipes(msnlan, monkeypatch, tmp_path):
    out = io.BytesIO(); Image.fromarray(picture()).save(out, 'PNG')
    class Stream(io.StringIO):
        buffer = io.BytesIO(out.getvalue())
    monkeypatch.setattr(sys, 'stdin', Stream())
    assert msnlan('upscale', '-', '-o', 'b.png')[0] == 0
    assert imread(tmp_path/'b.png').shape == (12, 10, 3)
