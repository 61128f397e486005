"""Converts between Hugging Face folders and Megatron checkpoint folders, offline.

One process, no GPU. The model is divided into pieces (`pieces.py`). A few threads each read and write one
piece at a time, so memory does not grow with the model. The checkpoint folder has the format of a run's
checkpoints (`manifest.json`, `weights/`, `hf/`), and `to_hf` also converts a run's checkpoints.

Tensors keep their stored dtype, bit for bit, unless another is requested (`dtypes.py`).
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

from megatron_fipo.checkpoint.companions import copy_companions
from megatron_fipo.checkpoint.convert.dtypes import cast, dtypes_in_megatron, target_dtype
from megatron_fipo.checkpoint.convert.name_map import megatron_shape
from megatron_fipo.checkpoint.convert.pieces import CopyStep, steps_to_hf, steps_to_megatron
from megatron_fipo.checkpoint.convert.stacking import extra_state_keys, place_of
from megatron_fipo.checkpoint.convert.torch_dist import (
    WEIGHTS,
    TensorPiece,
    WeightsReader,
    in_parallel,
    write_weights,
)
from megatron_fipo.checkpoint.hf_writer import HFWriter, hidden_name
from megatron_fipo.checkpoint.manifest import NAME as MANIFEST
from megatron_fipo.checkpoint.manifest import (
    FileRecord,
    Manifest,
    check_files,
    hash_files,
    list_files,
    read_manifest,
    share_of,
    write_manifest,
    wrong_names,
)
from megatron_fipo.checkpoint.model_folder import open_model_folder
from megatron_fipo.checkpoint.safetensors_folder import SafetensorsFolder, require_exactly
from megatron_fipo.checkpoint.shard_layouts import join, shard
from megatron_fipo.errors import UserError, writing
from megatron_fipo.families.family import Architecture, Layout, Weight
from megatron_fipo.families.registry import read_model_config

HF = "hf"
"""The folder of config, tokenizer and similar files in a checkpoint."""
SHARES = 64
"""Number of progress steps while files are hashed."""

Result = TypeVar("Result")
Progress = Callable[[str, int, int], None]
"""Called with (name of the phase, bytes done, bytes in total), from one thread at a time."""


@dataclass
class Summary:
    """The result of a conversion."""

    tensors: int
    """Hugging Face tensors."""
    bytes: int
    """Size of the written values."""
    rounded: set[str] = field(default_factory=set)
    """Parameters rounded by a requested cast: Megatron's names in the complete model."""


def to_megatron(source: Path, target: Path, dtype: str, progress: Progress) -> Summary:
    """Convert a Hugging Face folder to a checkpoint folder. `target` appears only when it is complete.

    UserError: as `open_model_folder`; a dtype that cannot be kept; `source` of another kind; `target` exists
    or cannot be written.
    """
    _refuse_other_kind(source, "to-megatron")
    _refuse_existing(target)
    opened = open_model_folder(source)
    architecture, weights, folder = opened.architecture, opened.weights, opened.source
    dtypes = dtypes_in_megatron(weights, architecture, folder, dtype)
    steps = {
        step.piece: step
        for weight in weights
        for step in steps_to_megatron(
            weight, architecture, dtypes[place_of(weight, architecture).key].itemsize
        )
    }
    size = sum(prod(piece.size) * dtypes[piece.place.key].itemsize for piece in steps)
    summary = Summary(sum(len(weight.names) for weight in weights), size)
    meter = _Meter("converting", size, progress)

    def read(piece: TensorPiece) -> torch.Tensor:
        values = _read_hf(steps[piece], architecture, folder)
        result, changed = cast(values, dtypes[piece.place.key])
        if changed:
            summary.rounded.add(steps[piece].weight.megatron)
        meter.add(result.nbytes)
        return result

    with _staged(target) as partial:
        for name in (WEIGHTS, HF):
            (partial / name).mkdir(parents=True)
        copy_companions(source, partial / HF)
        wanted = [(piece, dtypes[piece.place.key]) for piece in steps]
        extra_states = extra_state_keys(weights, architecture)
        write_weights(partial / WEIGHTS, wanted, extra_states, {"architecture": asdict(architecture)}, read)
        files = _hash(partial, progress)
        write_manifest(
            partial, files, {"converted_from": source.absolute().name, "family": opened.family.name}
        )
    return summary


def to_hf(source: Path, target: Path, dtype: str, progress: Progress) -> Summary:
    """Convert a checkpoint folder (converted, or of a run) to a Hugging Face folder at `target`.

    Reads only the model.

    UserError: files that differ from the manifest; tensors or shapes that do not match hf/config.json;
    `source` of another kind; `target` exists or cannot be written.
    """
    _refuse_other_kind(source, "to-hf")
    _refuse_existing(target)
    manifest = read_manifest(source)
    family, architecture = read_model_config(source / HF)
    reader = WeightsReader(source / WEIGHTS)
    weights = list(family.weights(architecture))
    _check_stored(weights, architecture, reader)
    dtypes = {
        name: target_dtype(reader.tensors[place_of(weight, architecture).key].properties.dtype, dtype, name)
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

    def convert(step: CopyStep) -> None:
        values = reader.read(step.piece).reshape(step.shape)
        for name, tensor in _hf_tensors(step, values, architecture):
            result, changed = cast(tensor, dtypes[name])
            if changed:
                summary.rounded.add(step.weight.megatron)
            writer.add(name, result, step.first_row)
            meter.add(result.nbytes)

    try:
        in_parallel(
            convert, [step for weight in weights for step in _stored_steps(weight, architecture, reader)]
        )
        writer.finish()
    except BaseException:
        writer.discard()
        raise
    return summary


# --- tensors ------------------------------------------------------------------------------------------------


def _read_hf(step: CopyStep, architecture: Architecture, folder: SafetensorsFolder) -> torch.Tensor:
    """The values of a piece from the Hugging Face tensors. Rows after the end of a vocabulary are zero."""
    if step.name is None:
        return shard(step.weight, [folder.slice(name) for name in step.weight.names], architecture, 0, 1)
    last = min(step.first_row + step.rows, folder.tensors[step.name].shape[0])
    values = folder.slice(step.name)[step.first_row : last]
    missing = step.rows - len(values)
    return torch.cat((values, values.new_zeros(missing, *values.shape[1:]))) if missing else values


def _stored_steps(weight: Weight, architecture: Architecture, reader: WeightsReader) -> Iterator[CopyStep]:
    place = place_of(weight, architecture)
    shape = tuple(reader.tensors[place.key].size)[len(place.lengths) :]
    yield from steps_to_hf(weight, architecture, shape, reader.chunks(place))


def _hf_tensors(
    step: CopyStep, values: torch.Tensor, architecture: Architecture
) -> list[tuple[str, torch.Tensor]]:
    """The Hugging Face tensors of a stored piece's values."""
    if step.name is not None:
        return [(step.name, values)]
    return list(zip(step.weight.names, join(step.weight, [values], architecture), strict=True))


def _check_stored(weights: Sequence[Weight], architecture: Architecture, reader: WeightsReader) -> None:
    """UserError unless the checkpoint has exactly the model's tensors; an optimizer's tensors are ignored."""
    found = {key for key in reader.tensors if not key.startswith("optimizer.")}
    places = [place_of(weight, architecture) for weight in weights]
    expected = {place.key: (place, weight) for place, weight in zip(places, weights, strict=True)}
    require_exactly(f"checkpoint {reader.folder}", found, expected.keys(), "hf/config.json")
    for key, (place, weight) in expected.items():
        stored = tuple(reader.tensors[key].size)
        wanted = (*place.lengths, *megatron_shape(weight))
        if weight.layout is Layout.VOCABULARY and stored[0] >= architecture.vocab_size:
            wanted = (stored[0], *wanted[1:])
        if stored != wanted:
            raise UserError(
                f"{key} in {reader.folder} has shape {list(stored)}; hf/config.json requires {list(wanted)}"
            )


# --- folders ------------------------------------------------------------------------------------------------


def _refuse_other_kind(source: Path, command: str) -> None:
    """UserError that names what the source is, unless the command can convert it."""
    takes_hf = command == "to-megatron"
    wanted = (
        "a Hugging Face folder (config.json and safetensors)"
        if takes_hf
        else f"a checkpoint folder (with {MANIFEST})"
    )
    if not source.is_dir():
        raise UserError(f"there is no folder {source}; {command} needs {wanted}")
    is_hf, is_checkpoint = (source / "config.json").is_file(), (source / MANIFEST).is_file()
    if is_hf if takes_hf else is_checkpoint:
        return
    if is_checkpoint:
        found = "already a Megatron checkpoint; convert to-hf converts in the other direction"
    elif is_hf:
        found = "already a Hugging Face folder; convert to-megatron converts in the other direction"
    elif (source / WEIGHTS).is_dir():
        found = f"a checkpoint without {MANIFEST}, so it is incomplete"
    elif (source / "checkpoints").is_dir():
        wanted_folder = source / "model" if takes_hf else f"one of {source / 'checkpoints'}"
        found = f"a run's folder; give {wanted_folder}"
    else:
        found = "neither a Hugging Face folder nor a checkpoint"
    raise UserError(f"{command} needs {wanted}, but {source} is {found}")


def _refuse_existing(target: Path) -> None:
    if target.exists():
        raise UserError(f"{target} already exists; give another folder or remove it")


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A hidden folder that is renamed to `target` at the end, or removed on an error."""
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
        "hashing", sizes, lambda share, shares: hash_files(folder, sorted(sizes)[share::shares]), progress
    ):
        files.update(found)
    return files


def _check_manifest(source: Path, manifest: Manifest, progress: Progress) -> None:
    """UserError listing the files that are missing or surplus; if there are none, those with other bytes."""
    problems = wrong_names(source, manifest)
    sizes = {name: record.size for name, record in manifest.files.items()}
    if not problems:
        found = _in_shares(
            "checking",
            sizes,
            lambda share, shares: check_files(source, share_of(manifest.files, share, shares)),
            progress,
        )
        problems = [problem for part in found for problem in part]
    if problems:
        more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise UserError(
            f"{source} is damaged: {'; '.join(problems[:20])}{more}; copy it again or use another checkpoint"
        )


def _in_shares(
    what: str, sizes: Mapping[str, int], work: Callable[[int, int], Result], progress: Progress
) -> list[Result]:
    """Run `work(share, shares)` for all shares of the files, in parallel.

    A share is every `shares`-th file of `sizes` in order of the names, from number `share` on.
    """
    in_order = [sizes[name] for name in sorted(sizes)]
    shares = min(len(in_order), SHARES)
    meter = _Meter(what, sum(in_order), progress)

    def share(index: int) -> Result:
        result = work(index, shares)
        meter.add(sum(in_order[index::shares]))
        return result

    return in_parallel(share, range(shares))


class _Meter:
    """Counts bytes from several threads and reports progress."""

    def __init__(self, what: str, total: int, progress: Progress) -> None:
        self.what, self.total, self.progress = what, total, progress
        self.done = 0
        self._lock = threading.Lock()
        progress(what, 0, total)

    def add(self, count: int) -> None:
        with self._lock:
            self.done += count
            self.progress(self.what, self.done, self.total)
