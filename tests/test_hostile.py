"""Whatever a file holds: a right result or one clear line; no traceback, no hang, no half-written file, within time and memory."""
import collections, json, os, signal, subprocess, sys, time
from contextlib import contextmanager
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from conftest import ROOT
from hostile import NAMES, bomb, file_of
from msnlan.batch import Task, convert
from msnlan.basics import peak_memory
from msnlan.correlation.explorer import decode
from msnlan.evaluation.scores import score_folder
from msnlan.models.zoo import create_model, load_model, save_weights
from msnlan.photos import Photo, encode, read_photo, write_photo

SECONDS, BYTES = 60, 3*2**30     # a file may take so long through one door, and the process grow by so much
EXPECTED = (ValueError, OSError, MemoryError)


@contextmanager
def time_limit(what):
    "An error instead of a hang"
    def ring(*_): raise AssertionError(f'{what} took more than {SECONDS} s')
    signal.signal(signal.SIGALRM, ring); signal.alarm(SECONDS)
    try: yield
    finally: signal.alarm(0)


@pytest.fixture(scope='module')
def nets():
    torch.manual_seed(0)
    return dict(up=create_model('msnlan', scale=2, n_feats=16, n_resgroups=2, n_resblocks=1).eval(),
                back=create_model('panet', task='denoise', n_feats=16, n_resblocks=2).eval())


def weight_files(net, folder):
    "The same weights in the three endings"
    out = [('safetensors', save_weights(net, folder/'w.safetensors').read_bytes())]
    small = {k: v for k, v in net.state_dict().items()}
    for name in ('pt', 'pth'):
        torch.save(small if name == 'pt' else dict(state_dict=small), folder/f'w.{name}')
        out.append((name, (folder/f'w.{name}').read_bytes()))
    return out


def doors(path, nets, folder):
    "What a file is sent through: name -> call; each gives the picture or the network it made"
    if path.suffix in ('.pt', '.pth', '.safetensors'): return dict(load_model=lambda: load_model(path))
    def through(net, name):
        out = folder/f'{name}.png'
        out.unlink(missing_ok=True)
        convert(Task(str(path), target=str(out)), [net])
        return read_photo(out).pixels, net.scale
    def scored():
        from msnlan.data.registry import Picture
        (folder/'sr').mkdir(exist_ok=True)
        for old in (folder/'sr').iterdir(): old.unlink()
        copy = folder/'sr'/f'a{path.suffix}'
        copy.write_bytes(path.read_bytes())
        return score_folder(folder/'sr', [Picture('a', copy)], 1)
    return dict(upscale=lambda: through(nets['up'], 'up'), restore=lambda: through(nets['back'], 'back'), score=scored,
                upload=lambda: decode(path.name, path.read_bytes()))


def send(seed, numbers, nets, folder):
    "Send files through all doors; what happened, counted, and every breach of the rule"
    weights, count, wrong = weight_files(nets['up'], folder), collections.Counter(), []
    (folder/'in').mkdir(); (folder/'out').mkdir()
    before = peak_memory()
    for i in numbers:
        name, data = file_of(seed, i, weights)
        path = folder/'in'/name
        path.write_bytes(data)
        for door, call in doors(path, nets, folder/'out').items():
            try:
                with time_limit(f'{door} of file {i}'): call()
                count[door, 'right'] += 1
            except EXPECTED as e:
                count[door, 'refused'] += 1
                if not str(e).strip(): wrong.append(f'{i} {door}: an empty message')
            except BaseException as e: wrong.append(f'{i} {door} {name!r}: {type(e).__name__}: {str(e)[:200]}')
            left = [p.name for p in (folder/'out').rglob('.*')]
            if left: wrong.append(f'{i} {door}: left {left}')
            if peak_memory() - before > BYTES: wrong.append(f'{i} {door}: {peak_memory() - before} bytes more'); before = peak_memory()
        path.unlink()
    return count, wrong


def check(count, wrong):
    assert wrong == [], '\n'.join([f'{len(wrong)} breaches', *wrong[:10]])
    for door in ('upscale', 'restore', 'score', 'upload', 'load_model'):
        assert count[door, 'right'] and count[door, 'refused'], f'{door}: {count}'


@pytest.mark.filterwarnings('ignore')
def test_hostile_files(nets, tmp_path): check(*send(1, range(300), nets, tmp_path))


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_ten_thousand_hostile_files(nets, tmp_path):
    count, wrong = send(2, range(10_000), nets, tmp_path)
    print(json.dumps({' '.join(k): v for k, v in sorted(count.items())}))
    check(count, wrong)


def msnlan(*args, cwd, stdin=None, before=None):
    "Run the command, in bytes; small weights are in `cwd`"
    return subprocess.run([sys.executable, '-m', 'msnlan.cli', *map(str, args)], cwd=cwd, input=stdin, capture_output=True, timeout=240,
                          preexec_fn=before, env=dict(os.environ, PYTHONPATH=str(ROOT)))


def is_one_line(run, *texts):
    "Exit status 1, the reason last, no traceback"
    text = run.stderr.decode()
    assert run.returncode == 1 and 'Traceback' not in text, text
    last = text.strip().splitlines()[-1]
    assert last.startswith('msnlan: ') and all(t in last for t in texts), last


@pytest.fixture()
def desk(nets, tmp_path):
    "A folder with small weights and pictures"
    save_weights(nets['up'], tmp_path/'w.safetensors')
    rng = np.random.default_rng(0)
    for name in ('a', 'two words ü'): write_photo(tmp_path/f'in/{name}.png', Photo(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)))
    return tmp_path

UP = ('--model', 'w.safetensors')


def test_a_bad_file_among_good_ones(desk):
    (desk/'in/b.png').write_bytes((desk/'in/a.png').read_bytes()[:60])
    os.symlink('nowhere.png', desk/'in/link.png')
    run = msnlan('upscale', 'in', '-o', 'out', *UP, cwd=desk)
    is_one_line(run, '2 of 4 pictures failed')
    assert sorted(p.name for p in (desk/'out').iterdir()) == ['a_x2.png', 'two words ü_x2.png']
    assert b'link.png' in run.stderr and b'b.png' in run.stderr
    made = (desk/'out/a_x2.png').read_bytes()
    is_one_line(msnlan('upscale', 'in/a.png', '-o', 'out', *UP, cwd=desk), 'out/a_x2.png is there already', '--overwrite')
    assert msnlan('upscale', 'in/a*.png', '-o', 'out', '--overwrite', '--jobs', 2, *UP, cwd=desk).returncode == 0
    assert (desk/'out/a_x2.png').read_bytes() == made


def test_from_stdin_to_stdout(desk):
    run = msnlan('upscale', '-', '-o', '-', *UP, cwd=desk, stdin=(desk/'in/a.png').read_bytes())
    assert run.returncode == 0 and read_photo(run.stdout).pixels.shape == (12, 14, 3), run.stderr
    is_one_line(msnlan('upscale', '-', '-o', '-', *UP, cwd=desk, stdin=b''), 'found 0 bytes')


def test_targets_that_cannot_be_written(desk):
    import resource
    full = lambda: (resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)), signal.signal(signal.SIGXFSZ, signal.SIG_IGN))
    is_one_line(msnlan('upscale', 'in/a.png', '-o', 'full/a.png', *UP, cwd=desk, before=full), 'File too large')
    assert [p for p in (desk/'full').rglob('*') if p.is_file()] == []
    is_one_line(msnlan('upscale', 'in/a.png', '-o', '/proc/a.png', *UP, cwd=desk))
    is_one_line(msnlan('upscale', 'in/a.png', '-o', 'a.gif', *UP, cwd=desk), 'expected a name ending in .png')
    is_one_line(msnlan('upscale', 'in/a.png', 'in/two words ü.png', '-o', 'in/a.png', *UP, cwd=desk), 'is a file; expected a folder')


def test_requests_that_cannot_be_met(desk):
    is_one_line(msnlan('upscale', 'in/a.png', '-o', 'o', '--scale', 5, cwd=desk), 'expected 2, 3, 4 or 8')
    is_one_line(msnlan('upscale', 'in/a.png', '-o', 'o', '--model', 'mlrn', '--scale', 3, cwd=desk), 'no weights for mlrn', 'msnlan-tiny-x2')
    is_one_line(msnlan('upscale', 'in/a.png', '-o', 'o', '--device', 'abacus', *UP, cwd=desk), 'abacus')
    is_one_line(msnlan('upscale', 'in/a.png', '-o', 'o', '--tile', 'big', *UP, cwd=desk), 'expected auto, whole, chop')
    (desk/'bomb.png').write_bytes(bomb(np.random.default_rng(1)))
    is_one_line(msnlan('upscale', 'bomb.png', '-o', 'o', *UP, cwd=desk), 'bomb.png')
    assert not (desk/'o').exists()


@pytest.mark.slow
def test_eight_is_two_after_four(desk):
    assert msnlan('upscale', 'in/a.png', '-o', 'a8.png', '--scale', 8, cwd=desk).returncode == 0
    assert read_photo(desk/'a8.png').pixels.shape == (48, 56, 3)


@pytest.mark.parametrize('shape', [(1, 1), (1, 5000), (5000, 1)])
def test_thin_pictures(nets, shape, tmp_path):
    write_photo(tmp_path/'a.png', Photo(np.full(shape, 99, np.uint8)))
    convert(Task(str(tmp_path/'a.png'), target=str(tmp_path/'b.png')), [nets['up']], tile='64')
    assert read_photo(tmp_path/'b.png').pixels.shape == (2*shape[0], 2*shape[1])
