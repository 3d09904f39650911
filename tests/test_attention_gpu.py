"""The fused kernels: through Triton's interpreter at toy sizes, compiled for a GPU that need not be there, and on one where there is."""
import os, subprocess, sys
import pytest, torch
from conftest import ROOT
from fused_cases import BOUND, CASES, SLOW, check_cases, check_opcheck
from msnlan.attention import definition, operator
from msnlan.attention.definition import has_triton
from msnlan.attention.operator import patch_attention

pytestmark = pytest.mark.skipif(not has_triton(), reason='needs Triton')
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')


def by_interpreter(*command, seconds=900):
    "A script in a process that loads Triton with its interpreter; what it printed"
    run = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=seconds, cwd=ROOT,
                         env={**os.environ, 'TRITON_INTERPRET': '1', 'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT/"tests"}', 'OMP_NUM_THREADS': '1'})
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    return run.stdout


def in_interpreter(*names, seconds=900): return by_interpreter(ROOT/'tests/fused_cases.py', *names, seconds=seconds)


@pytest.mark.parametrize('names', [['cases'], ['in_kernel', 'half', 'cut', 'zero', 'opcheck', 'compile'], ['plan', 'networks']], ids=['cases', 'rest', 'networks'])
def test_through_the_interpreter(names): assert in_interpreter(*names).split() == names


@pytest.mark.slow
@pytest.mark.parametrize('name', ['wide', 'opcheck_all', 'networks_trained'])
def test_widely_through_the_interpreter(name): in_interpreter(name, seconds=3000)


@pytest.mark.parametrize('examples', [4, pytest.param(120, marks=pytest.mark.slow)])
def test_drawn_problems(examples):
    "Equal to the definition with every gradient, however the work is cut; hypothesis draws always the same problems"
    seen = dict(word.split('=') for word in by_interpreter(ROOT/'tests/fused_property.py', examples, seconds=3000).split())
    assert sum(int(seen[k]) for k in ('whole', 'strips', 'strips_of_keys')) >= examples
    assert examples < 100 or min(map(int, seen.values())) >= 5, seen                      # every way was met


def test_two_processes_share_a_batch():
    assert '2 processes' in by_interpreter('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', ROOT/'tests/fused_training.py')


@pytest.mark.slow
def test_a_compiled_training_step_is_one_graph(): assert by_interpreter(ROOT/'tests/fused_training.py').strip() == '1 graph, 0 breaks'


COMPILE = '''
import sys, triton
from triton.compiler import ASTSource
from triton.backends.compiler import GPUTarget
from msnlan.attention import tiles
POINTERS = 'X Y fac T top total stat out G dA part count mean column'.split()
for name in 'score_kernel threshold_kernel spread_kernel grad_kernel back_kernel'.split():
    kernel = getattr(tiles, name); args = kernel.arg_names
    inside = int(sys.argv[2]) == 3 and name in ('score_kernel', 'grad_kernel')
    for sparse, half in (False, 'bf16'), (True, 'fp32'):
        const = dict(RY=int(sys.argv[2])//2, RX=0, SPARSE=sparse, BM=64 if inside else 32, BN=64, BC=32, INSIDE=inside, PRECISE=False)
        if name == 'threshold_kernel': const.update(BM=4, BN=512)
        kinds = {a: 'constexpr' if a in const else '*' + (half if a in ('out', 'X', 'Y', 'G') else 'fp32') if a in POINTERS else 'i32' for a in args}
        source = ASTSource(kernel, kinds, constexprs={(args.index(a),): v for a, v in const.items() if a in args})
        made = triton.compile(source, target=GPUTarget('cuda', int(sys.argv[1]), 32))
        assert made.asm['cubin'] and made.metadata.shared <= 48*1024
        print(name)
'''

@pytest.mark.parametrize('capability,patch', [(90, 3), *(pytest.param(c, 7, marks=pytest.mark.slow) for c in (80, 90))])
def test_kernels_compile_for_a_gpu(capability, patch, tmp_path):
    "Triton's own compiler makes machine code without a GPU: types and loops that the interpreter would let pass"
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'TRITON_CACHE_DIR': str(tmp_path)}; env.pop('TRITON_INTERPRET', None)
    run = subprocess.run([sys.executable, '-c', COMPILE, str(capability), str(patch)], capture_output=True, text=True, env=env, timeout=600)
    if 'Cannot find ptxas' in run.stderr: pytest.skip('this Triton has no assembler')
    assert run.returncode == 0, run.stderr[-3000:]
    assert len(run.stdout.split()) == 10


def test_choose(monkeypatch):
    choose = operator.choose
    monkeypatch.delenv('MSNLAN_BACKEND', raising=False)
    assert choose('cuda', 2**20) == 'triton' and choose('cpu', 2**10) == 'plain'
    assert choose('cuda', 2**20, patch=1) == 'sdpa' and choose('cuda', 2**20, 'sparsemax', patch=1) == 'triton'
    monkeypatch.setattr(definition, '_TRITON', False)
    operator._say_once.cache_clear()
    with pytest.warns(UserWarning, match='pip install triton'): assert choose('cuda', 2**20) == 'strips'
    with pytest.warns(UserWarning) as seen: choose('cuda', 2**20); __import__('warnings').warn('other')
    assert len(seen) == 1                                                                  # said once
    monkeypatch.setenv('MSNLAN_BACKEND', 'strips'); assert choose('cpu', 2**10) == 'strips'
    monkeypatch.setenv('MSNLAN_BACKEND', 'strip')
    with pytest.raises(ValueError, match='strips'): choose('cpu', 2**10)


def test_measured_lines_go_first(monkeypatch, tmp_path):
    monkeypatch.delenv('MSNLAN_BACKEND', raising=False)
    table = tmp_path/'choices.json'
    table.write_text('{"lines": [["cuda", "softmax", 3, "one", null, 1000, "reference"]]}')
    monkeypatch.setenv('MSNLAN_CHOICES', str(table))
    monkeypatch.setattr(operator, '_MEASURED', operator.read_choices())
    assert [operator.choose('cuda', n, patch=p) for n, p in ((1000, 3), (1001, 3), (1000, 5))] == ['reference', 'triton', 'triton']
    assert operator.choose('cuda', 1000, samples=2) == 'triton' and operator.choose('cpu', 1000) == 'plain'
    table.write_text('{"lines": [["cuda", "softmax", 3, "one", null, 1000, "referenz"]]}')
    with pytest.raises(ValueError, match='referenz.*MSNLAN_CHOICES='): operator.read_choices()
    assert operator.read_choices(tmp_path/'none.json') == ()


def test_without_gpu_or_triton(monkeypatch):
    x = torch.rand(1, 2, 4, 4)
    if not os.environ.get('TRITON_INTERPRET'):
        with pytest.raises(ValueError, match='needs a GPU'): patch_attention(x, x, x, backend='triton')
    monkeypatch.setattr(definition, '_TRITON', False)
    with pytest.raises(ImportError, match='pip install triton'): patch_attention(x, x, x, backend='triton')


def test_384_in_under_4_gb():
    "What the kernels' own program allocates with the largest score arrays that a GPU allows; 3.1 GB"
    from types import SimpleNamespace
    from msnlan.attention.gpu import default_max_scores, planned_bytes
    least = default_max_scores(SimpleNamespace(is_cuda=False))
    assert least == 2**26
    shapes = (1, 32, 384, 384), [(1, 32, 384, 384)], [(1, 64, 384, 384)]
    sizes = [planned_bytes(*shapes, 7, max_scores=n) for n in (least, 5*2**25)]
    assert sizes[0] < sizes[1] < 4e9


def test_score_arrays_follow_the_free_memory(monkeypatch):
    from types import SimpleNamespace
    from msnlan.attention.gpu import default_max_scores
    for free, entries in ((2**30, 2**26), (16*2**30, 2**27), (80*2**30, 5*2**25)):
        monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (free, 2*free))
        assert default_max_scores(SimpleNamespace(is_cuda=True, device='cuda')) == entries


def test_package_imports_without_triton_and_notebook_tools():
    "A GPU machine may have PyTorch, and none of these"
    code = ('import sys\nfor m in ("triton", "nbdev", "fastcore", "execnb", "papermill", "ipykernel", "pytest"): sys.modules[m] = None\n'
            'import msnlan.attention.gpu, msnlan.models.zoo, msnlan.training.trainer, msnlan.training.budget, msnlan.benchmarks.gpu\n'
            'import msnlan.attention, msnlan.models, msnlan.training')
    run = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@CUDA
@pytest.mark.parametrize('kind', list(BOUND)[1:])
def test_on_the_gpu(kind): check_cases({**CASES, **SLOW}, (kind,), device='cuda')


@CUDA
def test_opcheck_on_the_gpu(): check_opcheck('cuda')


@CUDA
def test_large_on_the_gpu_in_bounded_memory():
    q, k, v = [torch.randn(1, c, 384, 384, device='cuda', requires_grad=True) for c in (32, 32, 64)]
    torch.cuda.reset_peak_memory_stats()
    patch_attention(q, k, v, 7, backend='triton').sum().backward()
    assert torch.cuda.max_memory_allocated() < 4e9
