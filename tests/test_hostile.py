"""Whatever a file holds: a right result or one clear line; no traceback, no hang, no half-written file, within time and memory."""
import collections, json, signal, sys
from contextlib import contextmanager
from pathlib import Path
import numpy as np, pytest, torch
from hostile import file_of
from msnlan.batch import Task, convert
from msnlan.basics import peak_memory
from msnlan.reproduce.provenance import environment
from msnlan.correlation.scenes import decode_upload
from msnlan.evaluation.scores import score_folder
from msnlan.models.zoo import create_model, load_model, save_weights
from msnlan.photos import read_photo

SECONDS, BYTES = 120, 3*2**30     # processor time that a file may take through one door, more for many pixels; growth of the process
PATIENCE = 10     # seconds on the clock for one of the processor
EXPECTED = (ValueError, OSError, MemoryError)


@contextmanager
def time_limit(what, seconds):
    "An error instead of a hang: by processor time, as other work may share the machine, and on the clock for one that only waits"
    def ring(*_): raise AssertionError(f'{what} took more than {seconds:.0f} s')
    signal.signal(signal.SIGPROF, ring); signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds); signal.setitimer(signal.ITIMER_REAL, PATIENCE*seconds)
    try: yield
    finally: signal.setitimer(signal.ITIMER_PROF, 0); signal.setitimer(signal.ITIMER_REAL, 0)


def seconds_for(data):
    "A millisecond a pixel where a picture has more than 120,000"
    try: return max(SECONDS, np.prod(read_photo(data).pixels.shape[:2])/1000)
    except EXPECTED: return SECONDS


def small_nets():
    "One that enlarges and one that restores"
    torch.manual_seed(0)
    return dict(up=create_model('msnlan', scale=2, n_feats=16, n_resgroups=2, n_resblocks=1).eval(),
                back=create_model('panet', task='denoise', n_feats=16, n_resblocks=2).eval())


@pytest.fixture(scope='module')
def nets(): return small_nets()


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
                upload=lambda: decode_upload(path.name, path.read_bytes()))


def send(seed, numbers, nets, folder):
    "Send files through all doors; what happened, counted, and every breach of the rule"
    weights, count, wrong = weight_files(nets['up'], folder), collections.Counter(), []
    (folder/'in').mkdir(); (folder/'out').mkdir()
    before = peak_memory()
    for i in numbers:
        name, data = file_of(seed, i, weights)
        path = folder/'in'/name
        path.write_bytes(data)
        seconds = seconds_for(data)
        for door, call in doors(path, nets, folder/'out').items():
            try:
                with time_limit(f'{door} of file {i}', seconds): call()
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


def in_chunks(out, seed=2, total=10_000, step=250):
    "The same, a chunk a file below `out`: what is there is not done again; python tests/test_hostile.py OUT"
    import tempfile, time
    global PATIENCE
    PATIENCE = 1000    # such a run gets what other processes leave
    for first in range(0, total, step):
        path = Path(out)/f'{seed}-{first:05}.json'
        if path.exists(): continue
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as d:
            start = time.process_time()
            count, wrong = send(seed, range(first, min(total, first + step)), small_nets(), Path(d))
            path.write_text(json.dumps(dict(first=first, files=min(total, first + step) - first, count={' '.join(k): v for k, v in sorted(count.items())}, wrong=wrong, cpu_seconds=time.process_time() - start)))
    chunks = [json.loads(p.read_text()) for p in sorted(Path(out).glob(f'{seed}-*.json'))]
    count = sum((collections.Counter(c['count']) for c in chunks), collections.Counter())
    found = dict(seed=seed, files=sum(c['files'] for c in chunks), count=dict(sorted(count.items())), wrong=[w for c in chunks for w in c['wrong']],
                 cpu_seconds=round(sum(c['cpu_seconds'] for c in chunks)), machine=environment(),
                 limits=dict(seconds=SECONDS, bytes=BYTES))
    (Path(out)/'hostile.json').write_text(json.dumps(found, indent=1) + '\n')
    print(json.dumps(found, indent=1))


if __name__ == '__main__': in_chunks(sys.argv[1])
