"""How long prompts and answers are: measured requests, or drawn from published statistics."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flashserve.errors import InputError

Ints = npt.NDArray[np.int64]
FILES = ("azure_llm2023_conv.parquet", "azure_llm2023_code.parquet")
_NUM_DRAWN = 10_000
_MAX_TOKENS = 10**7
_CSV_COLUMNS = ("ContextTokens", "GeneratedTokens")


@dataclasses.dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of requests of one kind, [requests]; row i of both is one request."""

    kind: str
    prompt: Ints
    output: Ints


def read_lengths(path: Path) -> Lengths:
    """From a trace with input_tokens and output_tokens (parquet), or Azure's own CSV.

    Raises:
        InputError: it cannot be read, or has no lengths.
    """
    try:
        prompt, output = _read_csv(path) if path.suffix == ".csv" else _read_parquet(path)
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise InputError(f"cannot read lengths of requests from {path}: {error}") from None
    if not len(prompt):
        raise InputError(f"{path} has no requests")
    if min(prompt.min(), output.min()) < 0 or max(prompt.max(), output.max()) > _MAX_TOKENS:
        raise InputError(f"{path} has a number of tokens that is not between 0 and {_MAX_TOKENS}")
    return Lengths(path.stem, np.maximum(prompt, 1), np.maximum(output, 1))


def lengths_in(folder: Path | None, seed: int = 0) -> tuple[Lengths, ...]:
    """Of the LLM traces in a folder of traces; the published statistics where it has none."""
    found = [folder / name for name in FILES if (folder / name).is_file()] if folder else []
    return tuple(read_lengths(path) for path in found) or published_lengths(seed)


def published_lengths(seed: int) -> tuple[Lengths, ...]:
    """Lognormal, with the medians of Azure's conversations and code.

    Source: Splitwise (arXiv:2311.18677), figure 3: prompts of 1,020 and 1,500 tokens in the median,
    and answers of 129 and 13; the spreads are those of the published requests.
    """
    rng = np.random.default_rng([seed, 2])
    return (
        Lengths("conversation", _drawn(rng, 1020, 1.0), _drawn(rng, 129, 0.9)),
        Lengths("code", _drawn(rng, 1500, 1.35), _drawn(rng, 13, 0.85)),
    )


def _drawn(rng: np.random.Generator, median: float, spread: float) -> Ints:
    values = rng.lognormal(np.log(median), spread, _NUM_DRAWN)
    return np.maximum(np.rint(values), 1).astype(np.int64)


def _read_csv(path: Path) -> tuple[Ints, Ints]:
    with path.open(newline="") as file:
        rows = [[int(row[name]) for name in _CSV_COLUMNS] for row in csv.DictReader(file)]
    table = np.array(rows, dtype=np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _read_parquet(path: Path) -> tuple[Ints, Ints]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError("reading parquet needs pyarrow: install flashserve[forecast]") from None
    try:
        table = pyarrow.parquet.read_table(path, columns=["input_tokens", "output_tokens"])
        columns = [table.column(name).to_numpy().astype(np.int64) for name in table.column_names]
    except pyarrow.ArrowException as error:
        raise InputError(f"{path} is damaged or has no lengths: {error}") from None
    return columns[0], columns[1]
