"""What a modelled machine has and how fast it is: named profiles, and what was measured here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from flashserve.errors import InputError
from flashserve.policy.cost import Rates
from flashserve.store.calibration import read_calibration

GB = 10**9


@dataclasses.dataclass(frozen=True, slots=True)
class StepCosts:
    """Seconds of one step of a model of `size_bytes`, as a sum.

    fixed_s: of every step, whatever its size; weights_s: reading the weights once;
    prefill_token_s: each token of a prompt; decode_s: each sequence that decodes; adapter_s: each
    adapter among them.
    """

    size_bytes: int
    fixed_s: float
    weights_s: float
    prefill_token_s: float
    decode_s: float
    adapter_s: float = 0.0

    def of(self, size_bytes: int) -> StepCosts:
        """Of a model of another size, of the same kind: all but fixed_s grow with it."""
        if size_bytes == self.size_bytes:
            return self
        scale = size_bytes / self.size_bytes
        return StepCosts(
            size_bytes,
            self.fixed_s,
            self.weights_s * scale,
            self.prefill_token_s * scale,
            self.decode_s * scale,
            self.adapter_s * scale,
        )

    def step_s(self, prefill_tokens: int, num_decodes: int, num_adapters: int = 0) -> float:
        return (
            self.fixed_s
            + self.weights_s
            + self.prefill_token_s * prefill_tokens
            + self.decode_s * num_decodes
            + self.adapter_s * num_adapters
        )


@dataclasses.dataclass(frozen=True, slots=True)
class EngineShape:
    """The engine of one worker: its limits, and the memory beside the weights."""

    max_sequences: int = 32
    max_tokens: int = 512
    block_tokens: int = 16
    kv_tokens: int = 65536
    adapter_bytes: int = 256 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Speeds:
    """Rates and times of a node. The defaults are of a two-core machine without a GPU.

    Moves of one tier share its rate; one move of dram_bytes_per_s goes to one worker, and all
    together make no more than dram_total_bytes_per_s (None: every worker has a path of its own).
    init_s: of a start, beside the bytes; wake_s: the same on a worker where the model sleeps.
    executes_while_loading: a replica is ready before its bytes are there, and its first step waits.
    compute_at_once: as many workers' steps and builds go at full speed at once; more of them share
    that (None: every worker has an accelerator, or cores, of its own). load_compute_s_per_byte: of
    such cores, for each byte that comes to DRAM: copies, checksums and digests beside the move.
    """

    remote_bytes_per_s: float = 300e6
    disk_bytes_per_s: float = 1.5e9
    dram_bytes_per_s: float = 10e9
    dram_total_bytes_per_s: float | None = None
    init_s: float = 0.1
    wake_s: float = 0.1
    stop_s: float = 0.02
    worker_start_s: float = 2.0
    adapter_s: float = 0.005
    max_asleep: int = 8
    executes_while_loading: bool = False
    compute_at_once: float | None = None
    load_compute_s_per_byte: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Profile:
    """A kind of node. worker_cores: of each worker; None where each has an accelerator."""

    name: str
    num_workers: int
    dram_bytes: int
    disk_bytes: int
    speeds: Speeds
    costs: StepCosts
    engine: EngineShape
    worker_cores: float | None = None

    @property
    def rates(self) -> Rates:
        """What the controller would be told to start its predictions from."""
        speeds = self.speeds
        return Rates(speeds.remote_bytes_per_s, speeds.disk_bytes_per_s, speeds.dram_bytes_per_s)


THIS = Profile(
    name="this",
    # Two cores, one worker with both; 24 GiB of memory. benchmarks/results, 2026-11-24, the bf16
    # model of 135 million parameters (269 MB).
    num_workers=1,
    dram_bytes=12 * GB,
    disk_bytes=100 * GB,
    speeds=Speeds(
        # Four threads of ranges over loopback: 2.47 GB in 1.7 s.
        remote_bytes_per_s=1.45e9,
        # coldstart: first token 0.444 s cold from disk, 0.134 s from DRAM, of 269 MB.
        disk_bytes_per_s=0.87e9,
        # Walking 2.5 GB through a mapping that is there: 0.23 s.
        dram_bytes_per_s=10.9e9,
        # coldstart: 0.134 s from DRAM against 0.111 s warm.
        init_s=0.023,
        wake_s=0.015,
        stop_s=0.02,
        # coldstart: 4.38 s in a fresh process, of which 0.44 s are the start itself.
        worker_start_s=3.9,
        adapter_s=0.005,
        executes_while_loading=True,
        # A worker has both cores, so whatever computes beside it takes of the same.
        compute_at_once=1.0,
    ),
    costs=StepCosts(
        size_bytes=269_000_000,
        # engine, two threads: 21.4 tokens/s alone and 94.3 of eight, so steps of 46.7 and 84.8 ms.
        # The weights stream at 9.8 GB/s: 27 ms of the 41 that a step takes without its tokens.
        fixed_s=0.014,
        weights_s=0.027,
        # coldstart, warm: 1.109 s for a prompt of 512 tokens and 0.111 s for one of 32.
        prefill_token_s=0.00208,
        decode_s=0.0054,
        # engine: replaced linear layers cost 14 % of the throughput of 4 in one batch.
        adapter_s=0.003,
    ),
    # The settings' defaults: 512 MiB of keys and values of 23,040 bytes a token.
    engine=EngineShape(kv_tokens=23296),
    worker_cores=2,
)

H100_NODE = Profile(
    name="8xh100",
    # AWS p5.48xlarge: 8 H100 SXM of 80 GB, 2 TiB of memory, 8 NVMe of 3.84 TB (EC2 product page).
    num_workers=8,
    dram_bytes=1536 << 30,  # three quarters of it
    disk_bytes=27_600 * GB,  # nine tenths of it
    speeds=Speeds(
        # 25 Gb/s of network for one node's reads from an object store.
        remote_bytes_per_s=3.1e9,
        # ServerlessLLM on H100 (README of its store): 29.4 GB/s of NVMe.
        disk_bytes_per_s=29.4e9,
        # InstantTensor, tmpfs to one H200 over PCIe 5: 48.5 GB/s; ServerlessLLM about 52.
        dram_bytes_per_s=48.5e9,
        # Eight such paths stay below two sockets of eight channels of DDR5-4800, 614 GB/s.
        dram_total_bytes_per_s=388e9,
        # A module built on the meta device and bound: 30 to 100 ms of CPU for 1.2 billion
        # parameters here; a sleeping one keeps its module and its graphs.
        init_s=0.1,
        wake_s=0.02,
        stop_s=0.02,
        # Imports and context 5 s; registering the arena with CUDA takes 0.1 s per GB.
        worker_start_s=170.0,
        adapter_s=0.001,
        executes_while_loading=True,
    ),
    costs=StepCosts(
        size_bytes=14 * GB,
        # NVIDIA's data sheet of the H100 SXM: 3.35 TB/s of memory, of which 80 % are reached, and
        # 989 TFLOP/s of dense bf16, of which prefills reach half (2 FLOP a parameter and token).
        fixed_s=0.002,
        weights_s=14 / (3350 * 0.8),
        prefill_token_s=2 * 7e9 / (989e12 * 0.5),
        # 1,100 tokens of context of 131 kB each (32 layers, 8 heads of keys and values of 128),
        # read at the same rate.
        decode_s=0.00006,
        # Punica (arXiv:2310.18547): 2 ms a token for a batch of 32 different adapters.
        adapter_s=0.00006,
    ),
    # 80 GB less weights, activations and adapters leave 50 for keys and values.
    engine=EngineShape(max_sequences=32, max_tokens=2048, kv_tokens=380_000, adapter_bytes=4 << 30),
)

PROFILES: Mapping[str, Profile] = {profile.name: profile for profile in (THIS, H100_NODE)}


def load_profile(name: str) -> Profile:
    """A profile by its name, or by the data directory in which `flashserve calibrate` has measured.

    Measured rates replace those of the profile `this`.

    Raises:
        InputError: neither of both.
    """
    if profile := PROFILES.get(name):
        return profile
    measured = read_calibration(Path(name)) if Path(name).is_dir() else None
    if measured is None:
        raise InputError(
            f"no profile {name}: name one of {', '.join(PROFILES)}, or a data directory in which "
            "`flashserve calibrate` has measured"
        )
    speeds = dataclasses.replace(
        THIS.speeds,
        remote_bytes_per_s=measured.remote_bytes_per_s or THIS.speeds.remote_bytes_per_s,
        disk_bytes_per_s=measured.disk_bytes_per_s,
        dram_bytes_per_s=measured.dram_bytes_per_s,
        compute_at_once=measured.compute_at_once or THIS.speeds.compute_at_once,
        load_compute_s_per_byte=measured.load_compute_s_per_byte or 0.0,
    )
    return dataclasses.replace(THIS, name=name, speeds=speeds)
