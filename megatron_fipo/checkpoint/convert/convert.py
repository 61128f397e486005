"""Hugging Face folder <-> Megatron checkpoint folder, offline: one process, no GPU, piece by piece.

The model is cut into pieces (`moves.py`), and a few threads each read one and write it, so memory does not grow with the
model. The checkpoint folder is the one that a run writes (`manifest.json`, `weights/`, `hf/`), and reads: `to_hf` takes a run's
checkpoints too.

Tensors keep the dtype they are stored in, bit for bit, unless another is asked for (`dtypes.py`).
"""

import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import TypeVar

import torch

from megatron_fipo.checkpoint.convert.dtypes import cast, dtypes_in_megatron, target_dtype
from megatron_fipo.checkpoint.convert.name_map import megatron_shape
from megatron_fipo.checkpoint.convert.pieces import Move, moves_to_hf, moves_to_megatron
from megatron_fipo.checkpoint.convert.torch_dist import (
    WEIGHTS,
    Piece,
    WeightsReader,
    extra_state_keys,
    in_parallel,
    stacked_key,
    write_weights,
)
from megatron_fipo.checkpoint.hf_import import check_tensors
from megatron_fipo.checkpoint.hf_writer import HFWriter, copy_companions, hidden_name
from megatron_fipo.checkpoint.manifest import NAME as MANIFEST
from megatron_fipo.checkpoint.manifest import (
    FileRecord,
    Manifest,
    check_files,
    hash_files,
    list_files,
    read_manifest,
    write_manifest,
)
from megatron_fipo.checkpoint.safetensors_folder import SafetensorsFolder, listing
from megatron_fipo.checkpoint.shard_layouts import join, shard
from megatron_fipo.errors import UserError, writing
from megatron_fipo.families.family import Architecture, Layout, Weight
from megatron_fipo.families.registry import read_model_config

HF = "hf"
"""The folder of config, tokenizer and the like within a checkpoint."""
SHARES = 64
"""Steps in which progress shows while files are hashed."""

Result = TypeVar("Result")
Progress = Callable[[str, int, int], None]
"""Called with (what is done, bytes done, bytes in all), from one thread at a time."""


@dataclass
class Summary:
    """What a conversion did."""

    tensors: int
    """Hugging Face tensors."""
    bytes: int
    """Of their values, as written."""
    rounded: set[str] = field(default_factory=set)
    """Tensors that lost bits in a cast that was asked for: Megatron's names, in the whole model."""


def to_megatron(source: Path, target: Path, dtype: str, progress: Progress) -> Summary:
    """Convert a Hugging Face folder to a checkpoint folder at `target`, which appears only when it is complete.

    UserError: unknown architecture; shards, tensors or shapes that are not what config.json asks for; a dtype that cannot be kept;
    `source` of another kind; `target` exists or cannot be written.
    """
    _refuse_other_kind(source, "to-megatron")
    _refuse_existing(target)
    family, architecture = read_model_config(source)
    folder = SafetensorsFolder(source)
    weights = list(family.weights(architecture))
    check_tensors(weights, architecture, folder)
    dtypes = dtypes_in_megatron(weights, folder, dtype)
    moves = {
        move.piece: move
        for weight in weights
        for move in moves_to_megatron(weight, architecture, dtypes[stacked_key(weight)].itemsize)
    }
    size = sum(prod(piece.size) * dtypes[piece.key].itemsize for piece in moves)
    summary = Summary(sum(len(weight.names) for weight in weights), size)
    meter = _Meter("converting", size, progress)

    def read(piece: Piece) -> torch.Tensor:
        values = _read_hf(moves[piece], architecture, folder)
        result, changed = cast(values, dtypes[piece.key])
        if changed:
            summary.rounded.add(moves[piece].weight.megatron)
        meter.add(result.nbytes)
        return result

    with _staged(target) as partial:
        for name in (WEIGHTS, HF):
            (partial / name).mkdir(parents=True)
        copy_companions(source, partial / HF)
        wanted = [(piece, dtypes[piece.key]) for piece in moves]
        extra_states = extra_state_keys(weights, architecture.num_layers)
        write_weights(partial / WEIGHTS, wanted, extra_states, {"architecture": asdict(architecture)}, read)
        files = _hash(partial, progress)
        write_manifest(partial, files, {"converted_from": source.absolute().name, "family": family.name})
    return summary


def to_hf(source: Path, target: Path, dtype: str, progress: Progress) -> Summary:
    """Convert a checkpoint folder (converted, or of a run) to a Hugging Face folder at `target`; of a run only the model is read.

    UserError: files that are not what the manifest says; tensors or shapes that are not what hf/config.json asks for; `source` of
    another kind; `target` exists or cannot be written.
    """
    _refuse_other_kind(source, "to-hf")
    _refuse_existing(target)
    manifest = read_manifest(source)
    family, architecture = read_model_config(source / HF)
    reader = WeightsReader(source / WEIGHTS)
    weights = list(family.weights(architecture))
    _check_stored(weights, architecture, reader)
    dtypes = {
        name: target_dtype(reader.tensors[stacked_key(weight)].properties.dtype, dtype, name)
        for weight in weights
        for name in weight.names
    }
    _check_manifest(source, manifest, progress)
    shapes = {
        name: shape for weight in weights for name, shape in zip(weight.names, weight.shapes, strict=True)
    }
    writer = HFWriter(source / HF, target, shapes, dtypes)
    summary = Summary(len(shapes), writer.total_bytes)
    meter = _Meter("converting", writer.total_bytes, progress)

    def convert(move: Move) -> None:
        values = reader.read(move.piece).reshape(move.shape)
        for name, part in _hf_parts(move, values, architecture):
            result, changed = cast(part, dtypes[name])
            if changed:
                summary.rounded.add(move.weight.megatron)
            writer.add(name, result, move.first_row)
            meter.add(result.nbytes)

    try:
        in_parallel(
            convert, [move for weight in weights for move in _stored_moves(weight, architecture, reader)]
        )
        writer.finish()
    except BaseException:
        writer.discard()
        raise
    return summary


# What is read and written


def _read_hf(move: Move, architecture: Architecture, folder: SafetensorsFolder) -> torch.Tensor:
    """A piece's values from the Hugging Face tensors; rows behind a vocabulary's end are zero."""
    if move.name is None:
        return shard(move.weight, [folder.slice(name) for name in move.weight.names], architecture, 0, 1)
    last = min(move.first_row + move.rows, folder.tensors[move.name].shape[0])
    values = folder.slice(move.name)[move.first_row : last]
    missing = move.rows - len(values)
    return torch.cat((values, values.new_zeros(missing, *values.shape[1:]))) if missing else values


def _stored_moves(weight: Weight, architecture: Architecture, reader: WeightsReader) -> Iterator[Move]:
    stored = reader.tensors[stacked_key(weight)]
    yield from moves_to_hf(
        weight, architecture, tuple(stored.size)[0 if weight.layer is None else 1 :], stored.chunks
    )


def _hf_parts(move: Move, values: torch.Tensor, architecture: Architecture) -> list[tuple[str, torch.Tensor]]:
    """What a stored piece is in Hugging Face tensors."""
    if move.name is not None:
        return [(move.name, values)]
    return list(zip(move.weight.names, join(move.weight, [values], architecture), strict=True))


def _check_stored(weights: Sequence[Weight], architecture: Architecture, reader: WeightsReader) -> None:
    """UserError unless the checkpoint holds exactly the model's tensors; its optimizer's may be there too."""
    found = {key for key in reader.tensors if not key.startswith("optimizer.")}
    expected = {stacked_key(weight): weight for weight in weights}
    missing, unexpected = expected.keys() - found, found - expected.keys()
    if missing or unexpected:
        parts = [f"lacks {listing(missing)}"] if missing else []
        parts += (
            [f"holds {listing(unexpected)} that its hf/config.json does not ask for"] if unexpected else []
        )
        raise UserError(f"checkpoint {reader.folder} {' and '.join(parts)}")
    for key, weight in expected.items():
        stored, whole = tuple(reader.tensors[key].size), megatron_shape(weight)
        wanted = whole if weight.layer is None else (architecture.num_layers, *whole)
        if weight.layout is Layout.VOCABULARY and stored[0] >= architecture.vocab_size:
            wanted = (stored[0], *wanted[1:])
        if stored != wanted:
            raise UserError(
                f"{key} in {reader.folder} has shape {list(stored)}; hf/config.json asks for {list(wanted)}"
            )


# Folders


def _refuse_other_kind(source: Path, command: str) -> None:
    """UserError that says what the source is, where it is not what the command takes."""
    takes_hf = command == "to-megatron"
    wanted = (
        "a Hugging Face folder (config.json and safetensors)"
        if takes_hf
        else f"a checkpoint folder (with {MANIFEST})"
    )
    if not source.is_dir():
        raise UserError(f"there is no folder {source}; {command} takes {wanted}")
    is_hf, is_checkpoint = (source / "config.json").is_file(), (source / MANIFEST).is_file()
    if is_hf if takes_hf else is_checkpoint:
        return
    if is_checkpoint:
        found = "a Megatron checkpoint already; convert to-hf goes the other way"
    elif is_hf:
        found = "a Hugging Face folder already; convert to-megatron goes the other way"
    elif (source / WEIGHTS).is_dir():
        found = f"a checkpoint without {MANIFEST}, so it was not written to its end"
    elif (source / "checkpoints").is_dir():
        found = (
            f"a run's folder; give one of {source / 'checkpoints'}"
            if not takes_hf
            else f"a run's folder; give {source / 'model'}"
        )
    else:
        found = "neither a Hugging Face folder nor a checkpoint"
    raise UserError(f"{command} takes {wanted}, and {source} is {found}")


def _refuse_existing(target: Path) -> None:
    if target.exists():
        raise UserError(f"{target} exists already; give another folder or remove it")


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A hidden folder that becomes `target` at the end, or is removed."""
    target = target.absolute()
    partial = hidden_name(target)
    try:
        with writing(target):
            partial.mkdir(parents=True)
            yield partial
            partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _hash(folder: Path, progress: Progress) -> dict[str, FileRecord]:
    sizes = {name: (folder / name).stat().st_size for name in list_files(folder)}
    files: dict[str, FileRecord] = {}
    for found in _in_shares(
        "hashing", sizes, lambda share, shares: hash_files(folder, share, shares), progress
    ):
        files.update(found)
    return files


def _check_manifest(source: Path, manifest: Manifest, progress: Progress) -> None:
    """UserError listing files that are not what the manifest says. Reads every byte."""
    sizes = dict.fromkeys(list_files(source), 0) | {
        name: record.size for name, record in manifest.files.items()
    }
    found = _in_shares(
        "checking", sizes, lambda share, shares: check_files(source, manifest, share, shares), progress
    )
    problems = [problem for problems in found for problem in problems]
    if problems:
        more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise UserError(
            f"{source} is damaged: {'; '.join(problems[:20])}{more}; copy it again or take another checkpoint"
        )


def _in_shares(
    what: str, sizes: Mapping[str, int], work: Callable[[int, int], Result], progress: Progress
) -> list[Result]:
    """Work that `manifest.py` does on shares of the files, in parallel. `sizes` are those of all files that it looks at."""
    in_order = [sizes[name] for name in sorted(sizes)]
    shares = min(len(in_order), SHARES)
    meter = _Meter(what, sum(in_order), progress)

    def share(index: int) -> Result:
        result = work(index, shares)
        meter.add(sum(in_order[index::shares]))
        return result

    return in_parallel(share, range(shares))


class _Meter:
    """Counts bytes from several threads."""

    def __init__(self, what: str, total: int, progress: Progress) -> None:
        self.what, self.total, self.progress = what, total, progress
        self.done = 0
        self._lock = threading.Lock()
        progress(what, 0, total)

    def add(self, count: int) -> None:
        with self._lock:
            self.done += count
            self.progress(self.what, self.done, self.total)
