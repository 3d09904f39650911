"""Fetching against a small HTTP server on loopback that also misbehaves."""
import hashlib, io, threading, zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import numpy as np, pandas as pd, pytest
from PIL import Image
from msnlan.data import fetching, registry
from msnlan.data.patches import load_dataset
from msnlan.data.fetching import data_table, fetch, set_files, verify
from msnlan.images import imread, imwrite
from msnlan.data.registry import SetInfo, set_info

RNG = np.random.default_rng(0)


def sha(b): return hashlib.sha256(b).hexdigest()


def png(img):
    f = io.BytesIO()
    Image.fromarray(img).save(f, 'PNG')
    return f.getvalue()


class Server:
    "Serves `files` by path; `wrong[path]` is a list of misdeeds for the next requests of that path"
    def __init__(self):
        self.files, self.wrong, self.asked = {}, {}, []
        me = self
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_): pass
            def do_GET(self):
                me.asked.append(self.path)
                misdeed = me.wrong.get(self.path, [])
                misdeed = misdeed.pop(0) if misdeed else None
                body = me.files.get(self.path)
                if body is None or misdeed == '404': return self.send_error(404)
                if misdeed == '500': return self.send_error(500)
                if misdeed == 'bytes': body = body[:-20] + b'x'*20
                if misdeed == 'slow': me.stop.wait(3)
                self.send_response(200); self.send_header('Content-Length', str(len(body))); self.end_headers()
                try: self.wfile.write(body[:len(body)//2] if misdeed == 'cut' else body)
                except BrokenPipeError: return                      # the client gave up first
                if misdeed == 'cut': self.connection.close()
        self.stop = threading.Event()
        self.http = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.http.daemon_threads = True
        self.url = f'http://127.0.0.1:{self.http.server_port}'
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self): self.stop.set(); self.http.shutdown(); self.http.server_close()


@pytest.fixture
def server():
    s = Server(); yield s; s.close()


@pytest.fixture
def small_set5(server, monkeypatch, tmp_path):
    "Set5's entry of the registry with five tiny pictures, served as their repository would"
    true = registry.registry()
    t = true[true.dataset == 'Set5'].copy()
    pics = {n: RNG.integers(0, 256, (24, 24, 3), np.uint8) for n in t.name}
    body = {n: png(p) for n, p in pics.items()}
    t['sha256'] = [sha(body[n]) for n in t.name]
    t['pixels_sha256'] = [sha(pics[n].tobytes()) for n in t.name]
    monkeypatch.setattr(fetching, 'registry', lambda: t)
    files = set_files(set_info('Set5'), tmp_path, server.url)
    server.paths = {r.name: r.url.removeprefix(server.url) for r in files.itertuples()}
    for n, p in server.paths.items(): server.files[p] = body[n]
    return pics


def left(folder): return sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*'))


def test_fetch_verify_and_again(server, small_set5, tmp_path):
    folder = fetch('set5', tmp_path, mirror=server.url, progress=False)
    assert folder == tmp_path/'Set5'/'HR' and len(load_dataset('Set5', tmp_path)) == 5
    assert all((imread(folder/f'{n}.png') == p).all() for n, p in small_set5.items())
    assert set(verify('Set5', tmp_path).state) == {'ok'}
    n = len(server.asked)
    fetch('Set5', tmp_path, mirror=server.url, progress=False)
    assert n == len(server.asked) == 5                                  # nothing is fetched twice


def test_what_is_there_recompressed_is_kept_and_a_fetch_goes_on(server, small_set5, tmp_path):
    imwrite(tmp_path/'Set5'/'HR'/'baby.bmp', small_set5['baby'])
    fetch('Set5', tmp_path, mirror=server.url, progress=False)
    assert len(server.asked) == 4 and set(verify('Set5', tmp_path).state) == {'ok'}


@pytest.mark.parametrize('misdeed', ['cut', 'bytes', '500'])
def test_passing_misdeeds_are_tried_again(server, small_set5, tmp_path, misdeed):
    for p in server.paths.values(): server.wrong[p] = [misdeed, misdeed]
    fetch('Set5', tmp_path, mirror=server.url, progress=False)
    assert set(verify('Set5', tmp_path).state) == {'ok'} and len(left(tmp_path/'Set5'/'HR')) == 5


@pytest.mark.parametrize('misdeed,said', [
    ('cut', 'expected bird.*(cut|broken|other bytes)'), ('bytes', 'expected bird.*other bytes'),
    ('404', 'expected bird.*answer 404'), ('500', 'answer 500'), ('slow', 'no answer within')])
def test_lasting_misdeeds_end_in_one_line_and_leave_nothing_wrong(server, small_set5, tmp_path, misdeed, said):
    server.wrong[server.paths['bird']] = [misdeed]*9
    with pytest.raises(OSError, match=said) as e:
        fetch('Set5', tmp_path, mirror=server.url, progress=False, timeout=0.7, workers=2)
    assert '\n' not in str(e.value) and 'bird' in str(e.value)
    for f in (tmp_path/'Set5'/'HR').iterdir(): assert (imread(f) == small_set5[f.stem]).all()
    assert 'Set5/HR/bird.png' not in left(tmp_path)
    server.wrong.clear()
    fetch('Set5', tmp_path, mirror=server.url, progress=False)
    assert set(verify('Set5', tmp_path).state) == {'ok'}


def test_no_server_leaves_no_folder(small_set5, tmp_path):
    with pytest.raises(OSError, match='no connection'):
        fetch('Set5', tmp_path, mirror='http://127.0.0.1:9', progress=False)
    assert left(tmp_path) == []


def test_a_strange_file_is_not_overwritten(server, small_set5, tmp_path):
    mine = imwrite(tmp_path/'Set5'/'HR'/'baby.png', np.zeros((9, 9, 3), np.uint8))
    with pytest.raises(ValueError, match='move it away'): fetch('Set5', tmp_path, mirror=server.url, progress=False)
    assert imread(mine).max() == 0 and not server.asked
    with pytest.raises(ValueError, match='expected a set among'): fetch('Set6', tmp_path)


def test_a_missing_set_is_fetched_or_the_error_says_all(server, small_set5, tmp_path, monkeypatch):
    monkeypatch.delenv('MSNLAN_OFFLINE', raising=False)
    monkeypatch.setattr(fetching, 'GITHUB', server.url)
    assert len(load_dataset('Set5', tmp_path)) == 5
    monkeypatch.setattr(fetching, 'GITHUB', 'http://127.0.0.1:9')
    (tmp_path/'other').mkdir()
    with pytest.raises(FileNotFoundError, match='msnlan data fetch Set5.*no connection') as e:
        load_dataset('Set5', tmp_path/'other')
    assert '\n' not in str(e.value) and left(tmp_path/'other') == []
    monkeypatch.setenv('MSNLAN_OFFLINE', '1')
    with pytest.raises(FileNotFoundError, match='MSNLAN_OFFLINE'): load_dataset('Set5', tmp_path/'other')


def test_verify_tells_every_state(small_set5, tmp_path):
    folder = tmp_path/'Set5'/'HR'
    imwrite(folder/'baby.png', small_set5['baby']); imwrite(folder/'bird.png', small_set5['baby'])
    imwrite(folder/'cat.png', small_set5['baby']); imwrite(folder/'head.png', small_set5['head'])
    (folder/'head.png').write_bytes((folder/'head.png').read_bytes()[:90])
    t = verify('Set5', tmp_path).set_index('picture').state.to_dict()
    assert t == dict(baby='ok', bird='differs', butterfly='missing', cat='unknown', head='damaged', woman='missing')


def zipped(names):
    f = io.BytesIO()
    with zipfile.ZipFile(f, 'w') as z:
        for n in names: z.writestr(n, png(RNG.integers(0, 256, (8, 8, 3), np.uint8)))
    return f.getvalue()


def archive(server, monkeypatch, body, sha256=None):
    server.files['/a.zip'] = body
    files = (('a.zip', len(body), sha256 or sha(body)),)
    info = SetInfo('Arc', 'Arc/HR', 2, 'train', '', archives=files, address=server.url)
    monkeypatch.setattr(fetching, 'set_info', lambda n: info)


def test_archive(server, monkeypatch, tmp_path):
    archive(server, monkeypatch, zipped(['HR/1.png', 'HR/2.png']))
    server.wrong['/a.zip'] = ['cut', 'bytes']
    assert fetch('Arc', tmp_path, progress=False) == tmp_path/'Arc'/'HR'
    assert left(tmp_path) == ['Arc', 'Arc/HR', 'Arc/HR/1.png', 'Arc/HR/2.png']
    assert len(server.asked) == 3 and fetch('Arc', tmp_path, progress=False) and len(server.asked) == 3
    assert verify('Arc', tmp_path).state.tolist() == ['ok', 'ok']


@pytest.mark.parametrize('names,said', [
    (['HR/1.png', '../2.png'], 'plain names'), (['HR/1.png', '/tmp/2.png'], 'plain names'),
    (['HR/1.png'], 'expected 2 pictures'), (['LR/1.png', 'LR/2.png'], 'expected 2 pictures')])
def test_bad_archives_leave_nothing_unpacked(server, monkeypatch, tmp_path, names, said):
    archive(server, monkeypatch, zipped(names))
    (tmp_path/"root").mkdir()
    with pytest.raises(ValueError, match=said): fetch("Arc", tmp_path/"root", progress=False)
    assert not list(tmp_path.rglob('*.png')) and not list(tmp_path.rglob('.unpack*'))


def test_not_a_zip_and_a_wrong_checksum(server, monkeypatch, tmp_path):
    archive(server, monkeypatch, b'no zip at all')
    with pytest.raises(ValueError, match='expected a zip'): fetch('Arc', tmp_path, progress=False)
    for f in tmp_path.rglob('*.zip'): f.unlink()
    archive(server, monkeypatch, zipped(['HR/1.png', 'HR/2.png']), sha256='0'*64)
    with pytest.raises(OSError, match='other bytes'): fetch('Arc', tmp_path, progress=False)
    assert not [p for p in tmp_path.rglob('*') if p.is_file()]


def test_the_pack_is_what_the_registry_says(data_root):
    for name in ('Set5', 'Set12', 'Classic5'): assert set(verify(name, data_root).state) == {'ok'}
    t = data_table(data_root).set_index('set')
    assert t.on_disk['B100'] == 100 and t.on_disk['Manga109'] == 0 and t.pictures['Manga109'] == 109


@pytest.mark.slow
def test_all_of_the_pack_is_what_the_registry_says(data_root):
    for name in ('Set14', 'B100', 'McMaster18', 'BSDS400', 'T91'):
        assert set(verify(name, data_root).state) == {'ok'}, name
    assert verify('Urban100', data_root).state.value_counts().to_dict() == dict(ok=50, missing=50)
