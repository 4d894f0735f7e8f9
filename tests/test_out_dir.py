"""What happens to a run whose out_dir is damaged, mistaken, in use, full, read-only or gone.

Runs are in this process: train.main. A disk is full where a small file system can be mounted.
"""

import contextlib
import dataclasses
import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import cli
import export
import train
from checkpoints import DamagedCheckpoint, checkpoints_in
from config import ExportConfig, TrainConfig
from errors import UserError
from tiny_training import TINY
from training import run_log, run_start
from training.checkpoints import read_state
from training.run_lock import RunLock
from training.run_log import Log
from utils import TrainState, load_model

pytestmark = pytest.mark.slow

SMALL = dataclasses.replace(
    TINY,
    model=dataclasses.replace(TINY.model, n_layer=1, bias=False, dropout=0.1),
    max_iters=15,
    eval_interval=5,
    eval_iters=1,
    log_interval=1,
    init_from="resume",
)
FILE_SYSTEM_BYTES = 4 * 2**20


@pytest.fixture(autouse=True)
def devices_are_in_use(monkeypatch):
    """Skip what must come before JAX's first use of a device, which here is long past."""
    monkeypatch.setattr(run_start, "use_cpu_cores", lambda config, processes: None)


def run_of(data_dir: Path, out_dir: Path, **changes) -> TrainConfig:
    """Return the config of a run of SMALL."""
    return dataclasses.replace(SMALL, data_dir=data_dir, out_dir=out_dir, **changes)


def rows(out_dir: Path) -> list[dict]:
    """Return metrics.jsonl without the clock."""
    parsed = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in parsed]


def newest_state(out_dir: Path) -> TrainState:
    """Return the newest checkpoint."""
    *_, newest = checkpoints_in(out_dir / "checkpoints").values()
    return read_state(newest, TrainState.abstract(SMALL, TrainState.create(SMALL).mesh))


def assert_same_end(out_dir: Path, undisturbed: Path) -> None:
    """Compare bits and logs of two finished runs, apart from notes."""
    assert [row for row in rows(out_dir) if "note" not in row] == rows(undisturbed)
    a, b = newest_state(out_dir), newest_state(undisturbed)
    assert int(a.step) == int(b.step) == SMALL.max_iters
    jax.tree.map(np.testing.assert_array_equal, (a.params, a.opt_state), (b.params, b.opt_state))


def files_in(directory: Path) -> dict[str, bytes]:
    """Return the content of every file, by path."""
    return {str(p): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def sentence_of(config: TrainConfig, capsys) -> str:
    """Run train.py as its command line does; return its one sentence on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end, cli.user_errors():
        train.main(config)
    assert end.value.code == 2
    sentence = capsys.readouterr().err
    assert sentence.count("\n") == 1 and "Traceback" not in sentence, sentence
    return sentence


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    """Let runs that differ in out_dir alone, which is a static argument, share what is compiled."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def undisturbed(data_dir, tmp_path_factory) -> Path:
    """OUT_DIR of a run that nothing happened to."""
    out_dir = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(run_start, "use_cpu_cores", lambda config, processes: None)
        assert train.main(run_of(data_dir, out_dir)) == 0
    return out_dir


@pytest.fixture
def finished(undisturbed, tmp_path) -> Path:
    """A copy of that run, to be damaged."""
    return shutil.copytree(undisturbed, tmp_path / "finished")


def damage(checkpoint: Path) -> None:
    """Flip 64 bytes in the middle of the largest file of parameters."""
    largest = max(checkpoint.glob("params/ocdbt.process_0/d/*"), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    middle = len(content) // 2
    for place in range(middle, middle + 64):
        content[place] ^= 0xFF
    largest.write_bytes(content)


# Damaged


def test_a_run_goes_back_to_the_newest_whole_checkpoint(data_dir, undisturbed, finished, capsys):
    """Catches damage that is trained on or not told, a log that has steps twice, and a run that
    ends elsewhere than an undisturbed one."""
    damage(finished / "checkpoints" / "15")
    assert train.main(run_of(data_dir, finished)) == 0
    printed = capsys.readouterr().out
    notes = {row["note"]: row["step"] for row in rows(finished) if "note" in row}
    (damaged, renamed) = notes
    assert set(notes.values()) == {10}
    assert damaged in printed and "checkpoints/15 is damaged" in damaged
    assert renamed in printed and "checkpoints/damaged/15" in renamed
    assert_same_end(finished, undisturbed)


def test_nothing_is_trained_if_no_checkpoint_is_whole(data_dir, finished, capsys):
    """Catches a run that starts anew over its damaged checkpoints, or deletes anything."""
    for checkpoint in checkpoints_in(finished / "checkpoints").values():
        damage(checkpoint.path)
    before = files_in(finished)
    sentence = sentence_of(run_of(data_dir, finished), capsys)
    assert "no checkpoint" in sentence and "is whole" in sentence
    assert all(f"checkpoints/{step} is damaged" in sentence for step in (5, 10, 15))
    assert files_in(finished) == before


def test_programs_that_only_read_refuse_damage(data_dir, finished, tmp_path, capsys):
    """Catches a sample, an answer, a score or an export from damaged parameters."""
    damage(finished / "checkpoints" / "15")
    config = run_of(data_dir, finished, eval_only=True)
    with pytest.raises(DamagedCheckpoint, match="checkpoints/15 is damaged"):
        train.main(config)
    _, best = min((row["val_loss"], row["step"]) for row in rows(finished) if "val_loss" in row)
    if best != 15:
        damage(finished / "checkpoints" / str(best))
    with pytest.raises(UserError, match=f"checkpoints/{best} is damaged.*move it out of"):
        load_model(finished)  # as sample.py, server.py and eval_harness.py do
    with pytest.raises(UserError, match="damaged"):
        export.main(ExportConfig(out_dir=finished, to=tmp_path / "hf"))
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("name", ["config.json", "meta.json", "metrics.jsonl"])
def test_damage_beside_the_checkpoints_is_refused(data_dir, finished, name, capsys):
    """Catches a model that computes another function, other letters, or a log that is lost."""
    path = finished / name
    text = path.read_text()
    damaged = text.replace('"n_head": 2', '"n_head": 4').replace("abcd", "abdc")
    path.write_text(damaged.replace('{"step": 3', '{"stop": 3'))
    before = files_in(finished)
    assert before[str(path)] != text.encode(), "nothing was damaged"
    sentence = sentence_of(run_of(data_dir, finished), capsys)
    assert str(path) in sentence and "damaged" in sentence
    after = files_in(finished)
    changed = {Path(name).name for name in before if before[name] != after.get(name)}
    assert changed <= {"config.json"}  # it is written anew, before the log is looked at


# Mistaken


def test_evaluation_of_no_run_is_refused(data_dir, tmp_path, capsys):
    """Catches random weights that are evaluated for a mistyped out_dir, which is then made."""
    config = run_of(data_dir, tmp_path / "typo", eval_only=True)
    sentence = sentence_of(config, capsys)
    assert str(tmp_path / "typo") in sentence and "holds no complete checkpoint" in sentence
    assert not list(tmp_path.iterdir())


def test_evaluation_only_reads(data_dir, finished, undisturbed, capsys):
    """Catches an evaluation that writes into a run, which may be training, or needs its lock."""
    before = files_in(finished)
    expected = [row for row in rows(undisturbed) if row["step"] == 15 and "val_loss" in row]
    with RunLock(finished) as lock:
        lock.acquire()
        assert train.main(run_of(data_dir, finished, eval_only=True)) == 0
    assert f"step 15: train loss {expected[0]['train_loss']:.4f}" in capsys.readouterr().out
    assert files_in(finished) == before


def test_a_run_in_use_is_left_alone(data_dir, finished, capsys):
    """Catches two runs in one out_dir, and one that is refused but has already cleaned up."""
    (finished / "checkpoints" / "20.orbax-checkpoint-tmp").mkdir()  # the other's save
    with RunLock(finished) as lock:
        lock.acquire()
        before = files_in(finished)
        sentence = sentence_of(run_of(data_dir, finished, max_iters=20), capsys)
        assert "is in use by another train.py, process" in sentence
        assert files_in(finished) == before
        assert (finished / "checkpoints" / "20.orbax-checkpoint-tmp").exists()


# Full, read-only, gone


@pytest.fixture
def small_disk(tmp_path):
    """A file system of FILE_SYSTEM_BYTES."""
    directory = tmp_path / "disk"
    directory.mkdir()
    size = f"size={FILE_SYSTEM_BYTES}"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "tmpfs", directory], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("this user cannot mount a file system")
    yield directory
    subprocess.run(["umount", "--lazy", directory], check=True)


@pytest.fixture
def before_update(monkeypatch) -> Callable[[int, Callable[[], object]], None]:
    """Return a function that has something done, once, before an update is made.

    The checkpoint of step 5 is complete by then."""
    actions: dict[int, Callable[[], object]] = {}
    step_of_train = train.train_step

    def train_step(state, batch, config):
        action = actions.pop(int(state.step) + 1, None)
        if action is not None:
            while not (config.out_dir / "checkpoints" / "5").exists():
                time.sleep(0.01)  # nothing to wait on: Orbax renames it in a thread of its own
            action()
        return step_of_train(state, batch, config)

    monkeypatch.setattr(train, "train_step", train_step)
    return actions.__setitem__


def fill(directory: Path, free: int) -> None:
    """Leave so many bytes of a file system."""
    (directory / "room").write_bytes(bytes(free))
    with (directory / "filler").open("wb") as filler, contextlib.suppress(OSError):
        filler.write(bytes(FILE_SYSTEM_BYTES))
    (directory / "room").unlink()


@pytest.mark.parametrize("free, update", [(0, 7), (0, 10), (80_000, 8)])
def test_a_full_disk_costs_no_checkpoint(
    data_dir, undisturbed, small_disk, before_update, capsys, free, update
):
    """Catches a traceback, a run that goes on without saving, a log cut in the middle that cannot
    be resumed, and an older checkpoint that is deleted for one that was not written."""
    out_dir = small_disk / "out"
    before_update(update, lambda: fill(small_disk, free))
    sentence = sentence_of(run_of(data_dir, out_dir), capsys)
    assert "No space left on device" in sentence and str(out_dir) in sentence
    assert 5 in checkpoints_in(out_dir / "checkpoints")

    (small_disk / "filler").unlink()
    assert train.main(run_of(data_dir, out_dir)) == 0
    assert_same_end(out_dir, undisturbed)


def test_a_line_of_the_log_that_does_not_fit_is_told(data_dir, tmp_path, monkeypatch):
    """Catches "No space left on device" without a word on which file."""
    log = Log(run_of(data_dir, tmp_path), 0)
    log.file.close()
    log.file = Path("/dev/full").open("w")
    monkeypatch.setattr(run_log, "is_at", lambda path, file: True)
    with pytest.raises(OSError, match="No space left on device") as error:
        log.write(1, loss=1.0)
    assert error.value.filename == str(tmp_path / "metrics.jsonl")


def make_read_only(directory: Path) -> None:
    """Mount a directory over itself so that nobody can write into it, root neither."""
    subprocess.run(["mount", "--bind", directory, directory], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", directory], check=True)


def test_a_directory_that_becomes_read_only(
    data_dir, undisturbed, small_disk, before_update, capsys
):
    """Catches what a full disk does, and a run that starts where it could not save."""
    out_dir = small_disk / "out"
    before_update(7, lambda: make_read_only(out_dir))
    sentence = sentence_of(run_of(data_dir, out_dir), capsys)
    assert "Read-only file system" in sentence and str(out_dir) in sentence
    assert "Read-only file system" in sentence_of(run_of(data_dir, out_dir), capsys)
    assert list(checkpoints_in(out_dir / "checkpoints")) == [5]

    subprocess.run(["umount", "--lazy", out_dir], check=True)
    assert train.main(run_of(data_dir, out_dir)) == 0
    assert_same_end(out_dir, undisturbed)


@pytest.mark.parametrize(
    "gone, words",
    [
        (".", "was removed while this run was using"),
        ("metrics.jsonl", "was removed while this run was writing it"),
    ],
)
def test_what_is_removed_while_a_run_uses_it(
    data_dir, tmp_path, before_update, capsys, gone, words
):
    """Catches a run that goes on for days and leaves nothing, or makes half an out_dir again."""
    out_dir = tmp_path / "out"
    path = out_dir / gone
    # A save is perhaps under way: renamed, everything is gone at once.
    before_update(7, lambda: path.rename(tmp_path / "elsewhere"))
    sentence = sentence_of(run_of(data_dir, out_dir), capsys)
    assert words in sentence and str(out_dir) in sentence
    assert out_dir.exists() == (gone != ".")


def test_a_failed_save_is_told_at_the_next_line_of_the_log(data_dir, tmp_path, monkeypatch, capsys):
    """Catches a run that trains on, until its next save, on a disk that has taken no checkpoint."""
    write = train.Checkpoints.require_saved
    asked = SimpleNamespace(times=0)

    def fail_once(checkpoints):
        asked.times += 1
        if asked.times == 7:
            checkpoints.manager.wait_until_finished = lambda: refuse()
        write(checkpoints)

    def refuse() -> None:
        raise ValueError("[os_error_code='13'] from a thread")

    monkeypatch.setattr(train.Checkpoints, "require_saved", fail_once)
    sentence = sentence_of(run_of(data_dir, tmp_path / "out", eval_interval=1000), capsys)
    assert "Permission denied" in sentence and "checkpoints" in sentence
    assert max(row["step"] for row in rows(tmp_path / "out")) < 10
