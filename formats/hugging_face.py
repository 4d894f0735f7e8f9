"""The files of a model directory in Hugging Face's form, read as data from strangers.

Start with `find_weights`, which returns the files of the weights and the function that opens one:
`open_safetensors` or `open_torch`. Neither executes anything in a file; what is wrong raises
UserError with one sentence. `load_json` does the same for the rest of the directory.

What the tensors must be called and what shapes they must have is in pretrained.py.
"""

import json
import zipfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors asks for by name
import numpy as np

from errors import UserError, require

if TYPE_CHECKING:
    import torch


# Weights


class StoredTensor(NamedTuple):
    """A tensor in a file: known by its header, not read yet."""

    label: str
    """Its name and its file, for messages."""
    shape: tuple[int, ...]
    dtype: str
    """As safetensors writes it, for instance F32."""
    load: Callable[[], np.ndarray]

    def read(self) -> np.ndarray:
        """Load the values. Raises UserError if that fails or if they are not all finite."""
        try:
            values = self.load()
        except Exception as e:  # a file that shrank after it was opened, or an odd torch tensor
            raise UserError(f"cannot read {self.label}: {first_line(e)}") from e
        require(
            bool(np.isfinite(values).all()),
            f"{self.label} holds NaN or infinity; the file is damaged",
        )
        return values


class WeightFiles(NamedTuple):
    """The files that hold a model's weights, all of one format."""

    paths: list[Path]
    open_file: Callable[[Path], dict[str, StoredTensor]]
    """Opens one of them: open_safetensors or open_torch."""


def find_weights(directory: Path) -> WeightFiles:
    """Return the files of the weights: whole or as shards, safetensors first.

    Raises UserError, saying what was looked for, if there are none."""
    for file, open_file in {
        "model.safetensors": open_safetensors,
        "pytorch_model.bin": open_torch,
    }.items():
        whole = directory / file
        index = directory / f"{file}.index.json"
        if whole.is_file():
            return WeightFiles([whole], open_file)
        if index.is_file():
            return WeightFiles(shard_files(index), open_file)
    require(
        not (directory / "checkpoints").is_dir(),
        f"{directory} is a run of train.py, not a directory in Hugging Face's form: "
        f"python export.py --out_dir={directory} --to=DIR makes one of it",
    )
    raise UserError(
        f"{directory} holds no model: looked for config.json with model.safetensors or "
        "pytorch_model.bin, whole or as shards (Hugging Face's form), and for checkpoints "
        "(a run of train.py)"
    )


def shard_files(index: Path) -> list[Path]:
    """Return the files that an index.json names. They must lie beside it."""
    weight_map = load_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map")
    files = sorted(set(map(str, weight_map.values())))
    for file in files:
        require(Path(file).name == file, f"{index} names {file!r}, which is not a file beside it")
        require((index.parent / file).is_file(), f"{index} names {file}, which is missing")
    return [index.parent / file for file in files]


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file by name. The library checks its header against its size."""
    from safetensors import SafetensorError, safe_open

    try:
        # Not memory-mapped: mapped pages would count as a second copy of the weights.
        file = safe_open(path, "numpy", backend="pread")
        slices = {name: file.get_slice(name) for name in file.keys()}
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} is truncated or no safetensors file: {first_line(e)}") from e
    tensors = {}
    for name, view in slices.items():
        load = partial(file.get_tensor, name)
        shape = tuple(view.get_shape())
        tensors[name] = StoredTensor(f"{name} in {path}", shape, view.get_dtype(), load)
    return tensors


def open_torch(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a pytorch_model.bin by name. The file is in memory from here on."""
    import torch  # here, because safetensors do not need it

    try:
        state = load_torch(path)
    except Exception as e:  # a hostile file can raise anything in an unpickler
        raise UserError(
            f"{path} is truncated or holds something else than tensors by name, none of it was "
            f"run: {first_line(e)}"
        ) from e
    dtypes = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    tensors = {}
    for name, tensor in state.items():
        dtype = dtypes.get(tensor.dtype, str(tensor.dtype))
        load = partial(torch_to_numpy, tensor)
        tensors[name] = StoredTensor(f"{name} in {path}", tuple(tensor.shape), dtype, load)
    return tensors


def load_torch(path: Path) -> "dict[str, torch.Tensor]":
    """Load a pytorch_model.bin, and run no code that is in it. A wrong file can raise anything."""
    import torch

    if zipfile.is_zipfile(path):  # what torch wrote before 1.6 is not
        size = sum(entry.file_size for entry in zipfile.ZipFile(path).infolist())
        require(
            size <= path.stat().st_size,
            f"it would unpack to {size} bytes, and torch packs nothing",
        )
    state = torch.load(path, map_location="cpu", weights_only=True)
    require(isinstance(state, dict), f"it is a {type(state).__name__}")
    for name, tensor in state.items():
        require(
            type(name) is str and type(tensor) in (torch.Tensor, torch.nn.Parameter),
            f"{name} is a {type(tensor).__name__}",
        )
    return state


def torch_to_numpy(tensor: "torch.Tensor") -> np.ndarray:
    """Return a tensor as float32, because numpy does not know torch's bfloat16."""
    return tensor.detach().float().numpy()


# JSON and messages


def load_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises UserError."""
    require(path.is_file(), f"there is no {path}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not JSON: {first_line(e)}") from e
    require(isinstance(value, dict), f"{path} holds no JSON object")
    return value


def save_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object to a file."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def quote_some(names: Iterable[str], most: int = 8) -> str:
    """Return the first names, escaped and shortened, in one line: a stranger chose them."""
    quoted = [ascii(name)[1:-1][:100] for name in sorted(names)]
    shown = quoted[:most]
    if len(quoted) > most:
        shown.append(f"{len(quoted) - most} more")
    return ", ".join(shown) or "none"


def first_line(message: Exception | str) -> str:
    """Return the first line of what an exception or a library says, or else the type's name."""
    text = str(message).strip() or type(message).__name__
    return text.splitlines()[0]
