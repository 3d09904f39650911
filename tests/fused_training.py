"""The fused kernels in training: two processes share a batch and have the gradient of one; a step as a GPU does it (compiled, bf16,
channels last) is one graph. Run by the tests through Triton's interpreter.

    TRITON_INTERPRET=1 python tests/fused_training.py
    TRITON_INTERPRET=1 python -m torch.distributed.run --standalone --nproc_per_node=2 tests/fused_training.py"""
import functools, os, tempfile
from pathlib import Path
import torch
import torch.distributed as dist
from fused_cases import Block, relative
from torch.nn.parallel import DistributedDataParallel


def shared_batch():
    dist.init_process_group('gloo')
    rank, world = dist.get_rank(), dist.get_world_size()
    for weighting in ('softmax', 'sparsemax'):
        torch.manual_seed(0)
        net, batch = Block(weighting), torch.randn(2*world, 2, 5, 4)
        alone = Block(weighting); alone.load_state_dict(net.state_dict())
        shared = DistributedDataParallel(net)
        shared(batch[rank::world]).square().mean().backward()
        alone(batch).square().mean().backward()
        for p, q in zip(net.parameters(), alone.parameters()): assert relative(p.grad, q.grad) < 1e-5, weighting
        mine = torch.cat([p.grad.flatten() for p in net.parameters()])
        every = [torch.empty_like(mine) for _ in range(world)]
        dist.all_gather(every, mine)
        assert all(torch.equal(mine, g) for g in every)
    if rank == 0: print(f'{world} processes')
    dist.destroy_process_group()


def trainer():
    "Two steps of the trainer itself; the table of choices sends every call to the kernels, as on a GPU"
    from test_checkpoints import small_run
    from msnlan.attention import operator
    from msnlan.training.trainer import train
    seen = torch._dynamo.utils.counters
    operator.CHOICES, operator._MEASURED = (('', '', None, '', None, None, 'triton'),), ()
    torch.compile = functools.partial(torch.compile, backend='aot_eager')      # what breaks a graph is found before a backend sees it
    with tempfile.TemporaryDirectory() as folder:
        settings = small_run(Path(folder), steps=2, precision='bf16', channels_last=True, compile=True, validation=[], batch=2)
        train(settings, Path(folder)/'run', quiet=True, cpu=True)
    assert not seen['graph_break'], seen['graph_break']
    print(f"{seen['stats']['unique_graphs']} graph, {sum(seen['graph_break'].values())} breaks")


if __name__ == '__main__': shared_batch() if 'RANK' in os.environ else trainer()
