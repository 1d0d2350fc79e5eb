"""Loaders that other people use, from files on a disk; each as its documentation shows it."""

from __future__ import annotations

import concurrent.futures
import mmap
import os
import pathlib

import torch

from peers.job import Job, Load, Loaded, pieces, touched, touched_model

RAW_THREADS = 8
RAW_BYTES = 8 << 20


def safetensors_load_file(job: Job) -> Load:
    from safetensors.torch import load_file

    def load() -> Loaded:
        tensors: dict[str, torch.Tensor] = {}
        for file in job.weight_files():
            tensors |= load_file(file)
        return touched(tensors)

    return load


def safetensors_clone(job: Job) -> Load:
    from safetensors.torch import load_file

    def load() -> Loaded:
        tensors: dict[str, torch.Tensor] = {}
        for file in job.weight_files():
            tensors |= {name: tensor.clone() for name, tensor in load_file(file).items()}
        return tensors

    return load


def from_pretrained(job: Job) -> Load:
    from transformers import AutoModelForCausalLM

    return lambda: touched_model(AutoModelForCausalLM.from_pretrained(job.path, dtype="auto"))


def torch_load_mmap(job: Job) -> Load:
    return lambda: touched(torch.load(job.path, mmap=True, weights_only=True))


def runai_streamer(job: Job) -> Load:
    from runai_model_streamer import SafetensorsStreamer

    def load() -> Loaded:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files(job.options.get("urls") or job.weight_files())
            # A tensor is good until the next one comes, so it is copied, as its README does.
            return {name: tensor.clone() for name, tensor in streamer.get_tensors()}

    return load


def fastsafetensors(job: Job) -> Load:
    from fastsafetensors import SafeTensorsFileLoader

    def load() -> Loaded:
        loader = SafeTensorsFileLoader(None, device="cpu", nogds=True)
        loader.add_filenames({0: job.weight_files()})
        buffers = loader.copy_files_to_device()
        job.options["alive"] = (loader, buffers)  # the tensors lie in its memory
        return {name: buffers.get_tensor(name) for name in loader.get_keys()}

    return load


def tensorizer(job: Job) -> Load:
    from tensorizer import TensorDeserializer

    def load() -> Loaded:
        deserializer = TensorDeserializer(job.path, device="cpu")
        job.options["alive"] = deserializer
        return touched({name: tensor.data for name, tensor in deserializer.items()})

    return load


def raw_o_direct(job: Job) -> Load:
    """The ceiling: preadv of 8 MiB with O_DIRECT by 8 threads into memory that is already there."""
    (name,) = job.weight_files()
    num_bytes = pathlib.Path(name).stat().st_size
    buffer = mmap.mmap(-1, -(-num_bytes // RAW_BYTES) * RAW_BYTES)
    for begin in range(0, len(buffer), mmap.PAGESIZE):
        buffer[begin] = 1
    view = memoryview(buffer)
    descriptor = os.open(name, os.O_RDONLY | os.O_DIRECT)
    pool = concurrent.futures.ThreadPoolExecutor(RAW_THREADS)

    def read(begin: int, length: int) -> None:
        done = 0
        while done < length:
            count = os.preadv(descriptor, [view[begin + done : begin + RAW_BYTES]], begin + done)
            if not count:
                raise EOFError(name)
            done += count

    def load() -> Loaded:
        list(pool.map(lambda piece: read(*piece), pieces(num_bytes, RAW_BYTES)))
        return None

    return load


def save_for_torch(job: Job) -> Load:
    """Prepares: the checkpoint as a file of torch.save."""
    from safetensors.torch import load_file

    def save() -> Loaded:
        (file,) = job.weight_files()
        torch.save(load_file(file), job.options["target"])
        return None

    return save


def save_for_tensorizer(job: Job) -> Load:
    """Prepares: the checkpoint as tensorizer serialises it."""
    from safetensors.torch import load_file
    from tensorizer import TensorSerializer

    def save() -> Loaded:
        (file,) = job.weight_files()
        serializer = TensorSerializer(job.options["target"])
        serializer.write_state_dict(load_file(file))
        serializer.close()
        return None

    return save
