"""Clients that other people use to have a checkpoint out of S3, and a parallel one of few lines."""

from __future__ import annotations

import concurrent.futures
import pathlib
import shutil
import subprocess
import sys
from typing import Any

from peers.job import Job, Load, Loaded, faulted_buffer, pieces, tensors_in, touched_model

RANGE_BYTES = 16 << 20
RANGE_THREADS = 4


def _objects(job: Job) -> tuple[Any, str, list[tuple[str, int]]]:
    """A client, the bucket, and its objects (key and bytes) below the job's prefix."""
    import boto3

    client = boto3.client("s3")
    bucket, _, prefix = job.path.partition("/")
    listing = client.list_objects_v2(Bucket=bucket, Prefix=prefix + "/")
    return client, bucket, [(entry["Key"], entry["Size"]) for entry in listing["Contents"]]


def _from_pretrained(directory: pathlib.Path) -> Loaded:
    from transformers import AutoModelForCausalLM

    return touched_model(AutoModelForCausalLM.from_pretrained(directory, dtype="auto"))


def boto3_download(job: Job) -> Load:
    """The usual client: download_file with its defaults, then from_pretrained."""
    client, bucket, objects = _objects(job)
    directory = pathlib.Path(job.scratch)

    def load() -> Loaded:
        for key, _ in objects:
            client.download_file(bucket, key, str(directory / pathlib.PurePath(key).name))
        return _from_pretrained(directory)

    return load


def s5cmd_copy(job: Job) -> Load:
    """s5cmd cp with its defaults, then from_pretrained."""
    beside = pathlib.Path(sys.executable).with_name("s5cmd")
    binary = str(beside) if beside.exists() else shutil.which("s5cmd")
    if binary is None:
        raise ModuleNotFoundError("s5cmd is not installed")
    command = [binary, "--endpoint-url", job.env["AWS_ENDPOINT_URL"], "--log", "error", "cp"]
    command += [f"s3://{job.path}/*", job.scratch + "/"]

    def load() -> Loaded:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return _from_pretrained(pathlib.Path(job.scratch))

    return load


def runai_s3(job: Job) -> Load:
    from peers.local import runai_streamer

    _, bucket, objects = _objects(job)
    job.options["urls"] = [
        f"s3://{bucket}/{key}" for key, _ in objects if key.endswith(".safetensors")
    ]
    return runai_streamer(job)


def range_parallel(job: Job) -> Load:
    """4 threads of 16 MiB ranges into memory that is already there: as good as a client gets."""
    client, bucket, objects = _objects(job)
    ((key, num_bytes),) = [entry for entry in objects if entry[0].endswith(".safetensors")]
    buffer = faulted_buffer(num_bytes)
    view = memoryview(buffer.numpy())
    pool = concurrent.futures.ThreadPoolExecutor(RANGE_THREADS)

    def fetch(begin: int, length: int) -> None:
        wanted = f"bytes={begin}-{begin + length - 1}"
        body = client.get_object(Bucket=bucket, Key=key, Range=wanted)["Body"]
        done = 0
        while done < length:
            count = body.readinto(view[begin + done : begin + length])
            if not count:
                raise EOFError(f"{key} is shorter than its listing says")
            done += count

    def load() -> Loaded:
        list(pool.map(lambda piece: fetch(*piece), pieces(num_bytes, RANGE_BYTES)))
        return tensors_in(buffer)

    return load
