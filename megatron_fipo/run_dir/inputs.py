"""What a run reads besides its settings, identified by content: the files of its model, and its data.

A path in the settings is only a name. A folder may be moved, written in another way, or hold other files the
next day. So a resumed run is compared with the stored one by what its paths contain.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

from megatron_fipo.checkpoint.companions import MODEL_FILES, companions, is_backup
from megatron_fipo.errors import UserError

INPUTS_FILE = "inputs.json"
"""The inputs of a run, in its folder and in each of its checkpoints."""


@dataclass(frozen=True)
class RunInputs:
    """None stands for an input that the run did not record (before version 0.2)."""

    model: dict[str, str] | None
    """Digest of each file that decides how the model is built and its text is tokenized, by file name. The
    weights are not among them: a resumed run has those of its checkpoint."""
    train: str | dict[str, str] | None
    """Fingerprint of the training problems; of those of each set, by name, with `data.sets`."""
    held_out: dict[str, str] | None
    """Fingerprint of each evaluation set, by name."""
    prompt_time: str | None
    """When the run first started, in ISO 8601: the time that a chat template may print."""


def model_files(folder: Path) -> dict[str, str]:
    """`RunInputs.model` of a model folder."""
    matches = companions(folder, MODEL_FILES)
    files = [file for path in matches for file in (path.rglob("*") if path.is_dir() else [path])]
    names = {file.relative_to(folder).as_posix(): file for file in sorted(files) if file.is_file()}
    return {
        name: hashlib.sha256(file.read_bytes()).hexdigest()
        for name, file in names.items()
        if not is_backup(name)
    }


def read_inputs(owner: Path) -> RunInputs:
    """The inputs that a run folder or a checkpoint recorded. Raises `UserError` if the record is damaged."""
    path = owner / INPUTS_FILE
    if not path.is_file():
        copies = owner / "hf"
        return RunInputs(model_files(copies) if copies.is_dir() else None, None, None, None)
    try:
        inputs = RunInputs(**json.loads(path.read_text()))
        if isinstance(inputs.held_out, str):  # before there were several sets
            inputs = replace(inputs, held_out=None)
        datetime.fromisoformat(inputs.prompt_time or "")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} is not a record of a run's inputs ({error}); restore it from a copy, or choose another run_dir"
        ) from None
    return inputs


def write_inputs(owner: Path, inputs: RunInputs) -> None:
    """Write the record; raises OSError."""
    (owner / INPUTS_FILE).write_text(json.dumps(asdict(inputs), indent=1) + "\n")


def input_changes(stored: RunInputs, inputs: RunInputs) -> dict[str, str | None]:
    """What changed under each setting that names a recorded input: a sentence, or None if nothing did.

    Settings whose content the stored run did not record are absent.
    """
    changes: dict[str, str | None] = {}
    if stored.model is not None:
        changes["model.path"] = _changed_files(stored.model, inputs.model or {})
    if isinstance(stored.train, dict) and isinstance(inputs.train, dict):
        for name in sorted(stored.train.keys() & inputs.train.keys()):
            key = f"data.sets.{name}.path"
            same = stored.train[name] == inputs.train[name]
            changes[key] = None if same else f"{key} has other training problems than the run"
    elif stored.train is not None:
        same = stored.train == inputs.train
        changes["data.train_path"] = (
            None if same else "data.train_path has other training problems than the run"
        )
    return changes


def set_changes(stored: RunInputs, inputs: RunInputs) -> list[str]:
    """What changed in the evaluation sets, which a run may change, in one sentence; empty if nothing did."""
    if stored.held_out is None:
        return []
    before, after = stored.held_out, inputs.held_out or {}
    changes = [f"{name} is new" for name in after.keys() - before.keys()]
    changes += [f"{name} is gone" for name in before.keys() - after.keys()]
    changes += [
        f"{name} has other problems" for name in before.keys() & after.keys() if before[name] != after[name]
    ]
    if not changes:
        return []
    return [
        f"the evaluation sets changed ({', '.join(sorted(changes))}), so evaluation/avg_at_k, which "
        "checkpoint.keep_best uses, does not compare with that of earlier iterations"
    ]


def _changed_files(before: dict[str, str], after: dict[str, str]) -> str | None:
    # Earlier records name backups too.
    names = [name for name in before.keys() | after.keys() if not is_backup(name)]
    different = sorted(name for name in names if before.get(name) != after.get(name))
    if not different:
        return None
    return f"model.path has other content than the run in {', '.join(different)}"
