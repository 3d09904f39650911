"""A SLURM cluster of one node on the loopback interface, for as long as a test needs it."""
import os, secrets, shutil, socket, subprocess, time
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ['munged', 'slurmctld', 'slurmd', 'sbatch', 'squeue', 'sinfo']
CLIENTS = ['sbatch', 'squeue', 'scontrol', 'srun', 'scancel', 'sinfo', 'sacctmgr']
SBIN = os.environ.get('PATH', '') + ':/usr/sbin:/sbin'

CONF = """ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
MinJobAge=3600
SchedulerParameters=sched_interval=1
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def why_not()->str:
    "Why no cluster can be started here; empty where it can"
    missing = [p for p in PROGRAMS if not shutil.which(p, path=SBIN)]
    if missing: return f"needs {', '.join(missing)} (Debian: apt-get install slurmctld slurmd munge slurm-client)"
    return '' if os.geteuid() == 0 else 'needs root: slurmd starts jobs as their users'


def free_ports(n:int)->list:
    "Ports that nobody listens on"
    socks = [socket.socket() for _ in range(n)]
    for s in socks: s.bind(('127.0.0.1', 0))
    ports = [s.getsockname()[1] for s in socks]
    for s in socks: s.close()
    return ports


@contextmanager
def cluster(folder:Path):
    "Start munged, slurmctld and slurmd; gives the environment in which sbatch finds them. `RuntimeError` says why it does not start"
    host = socket.gethostname().split('.')[0]
    for name in ('state', 'spool'): (folder/name).mkdir(parents=True)
    (folder/'munge.key').write_bytes(secrets.token_bytes(128)); (folder/'munge.key').chmod(0o400)
    conf = folder/'slurm.conf'
    conf.write_text(CONF.format(host=host, folder=folder, ports=free_ports(2), cores=os.cpu_count()))
    (folder/'bin').mkdir()
    for name in CLIENTS:                          # jobs and Snakemake's plugin forget SLURM_CONF; the programs do not
        if not (real := shutil.which(name, path=SBIN)): continue
        (folder/'bin'/name).write_text(f'#!/bin/sh\nSLURM_CONF={conf} exec {real} "$@"\n')
        (folder/'bin'/name).chmod(0o755)
    env = os.environ | dict(SLURM_CONF=str(conf), PATH=f'{folder}/bin:{SBIN}')
    started = []
    def start(*command):
        log = open(folder/f'{command[0]}.out', 'w')
        started.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True))
        time.sleep(1)
        if started[-1].poll() is not None: raise RuntimeError(f"{command[0]} ended at once: {(folder/f'{command[0]}.out').read_text()[-300:]}")
    try:
        start('munged', '--foreground', '--force', f'--key-file={folder}/munge.key', f'--socket={folder}/munge.socket',
              f'--pid-file={folder}/munge.pid', f'--log-file={folder}/munge.log', f'--seed-file={folder}/munge.seed')
        start('slurmctld', '-D', '-f', str(conf)); start('slurmd', '-D', '-f', str(conf))
        for _ in range(60):
            said = subprocess.run(['sinfo', '-h', '-o', '%t'], env=env, capture_output=True, text=True)
            if said.stdout.strip() in ('idle', 'mix', 'alloc'): break
            time.sleep(1)
        else: raise RuntimeError(f'the node does not come up: {said.stdout}{said.stderr}')
        yield env
    finally:
        for p in reversed(started): p.terminate()
        for p in started:
            try: p.wait(20)
            except subprocess.TimeoutExpired: p.kill()
