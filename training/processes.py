"""The processes of a training run and the CPU devices of each, before JAX looks for devices.

Start with `connect`.
"""

import os

import jax

from config import TrainConfig
from mesh import MOST_CPU_DEVICES, devices_named, largest_divisor, simulate_cpu_devices

# Seconds after which a process that does not answer is given up, and all processes end.
HEARTBEAT_TIMEOUT = 60
# FLOPs of a micro-batch below which one more CPU device costs more time than it saves.
CPU_DEVICE_FLOPS = 500_000_000


def connect(config: TrainConfig) -> int:
    """Join the other processes of this run, if any, and return how many there are in all.

    config.coordinator_address and its kin say who they are. Without them jax.distributed finds out,
    where the environment says that there is more than one: in a SLURM step, under Open MPI, on a
    TPU pod. Must come before any use of JAX."""
    if config.num_processes is None:
        processes = processes_in_environment()
        if processes > 1:
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT)
        return processes
    if config.num_processes > 1:
        jax.distributed.initialize(
            coordinator_address=config.coordinator_address,
            num_processes=config.num_processes,
            process_id=config.process_id,
            cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
        )
    return config.num_processes


def processes_in_environment() -> int:
    """Return how many processes SLURM, Open MPI or a TPU pod has started together with this one."""
    slurm = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    open_mpi = int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1))
    tpu_pod = len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(","))
    return max(slurm, open_mpi, tpu_pod)


def use_cpu_cores(config: TrainConfig, processes: int = 1) -> None:
    """Where JAX runs on CPU, have it show as many devices as cpu_device_count says.

    Must come before JAX's first use of a device. Does nothing to other platforms."""
    simulate_cpu_devices(max(1, cpu_device_count(config, processes)))


def cpu_device_count(config: TrainConfig, processes: int) -> int:
    """Return how many CPU devices this process should have: as many as config.mesh asks for.

    Without a mesh it is one per core, as long as they divide the batch and each has enough to do:
    XLA on CPU uses a second core badly on small operations. JAX_NUM_CPU_DEVICES in the environment
    wins over both."""
    if "JAX_NUM_CPU_DEVICES" in os.environ:
        return int(os.environ["JAX_NUM_CPU_DEVICES"])
    if config.mesh is not None:
        return min(devices_named(config.mesh) // processes, MOST_CPU_DEVICES)
    flops = config.model.flops_per_token * config.batch_size * config.model.block_size
    cores = len(os.sched_getaffinity(0))
    return largest_divisor(config.batch_size // processes, min(cores, flops // CPU_DEVICE_FLOPS))
