"""Checkpoints of a training run: kept, proved whole, and what happens to damaged ones.

CASES=2000 python -m pytest tests/test_checkpoints.py -k damage    tries ten times as much."""

import dataclasses
import json
import os
import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import Checkpoint, DamagedCheckpoint, best_step, read_run
from config import GPTConfig, TrainConfig
from errors import UserError
from formats.checksums import checksums, read_sealed, seal
from tokenizer import CharTokenizer
from training.checkpoints import Checkpoints, free_name, read_state
from utils import TrainState

pytestmark = pytest.mark.slow

TINY = TrainConfig(
    model=GPTConfig(block_size=8, vocab_size=5, n_layer=2, n_head=2, n_embd=8),
    max_iters=100,
)
LOSSES = {10: 3.0, 20: 2.0, 30: 1.0}
"""Validation loss of each checkpoint of the run that is damaged: the latest is the best."""


@pytest.fixture(scope="module")
def state():
    return TrainState.create(TINY)


def at_step(state, step: int):
    """Return a state of other numbers, all of them, after so many updates.

    They are noise, which does not compress: in what does, damage is found by the compression."""
    rng = np.random.default_rng(step)

    def move(array):
        noise = rng.normal(size=array.shape) if array.ndim else step
        return array + jnp.asarray(noise, array.dtype)

    params, opt_state = jax.tree.map(move, (state.params, state.opt_state))
    return dataclasses.replace(state, step=jnp.int32(step), params=params, opt_state=opt_state)


def write_run(out_dir: Path, state, losses: dict[int, float | None], keep: int = 3) -> None:
    """Write what train.py leaves: a checkpoint for each step, config.json and meta.json."""
    saved = Checkpoints(out_dir, keep)
    for step, loss in losses.items():
        saved.save(at_step(state, step), loss)
    saved.close()
    description = seal({"model": dataclasses.asdict(TINY.model)})
    (out_dir / "config.json").write_text(json.dumps(description))
    (out_dir / "meta.json").write_text(json.dumps(seal(CharTokenizer("abcd\n").meta())))


def steps_kept(out_dir: Path) -> list[int]:
    names = [path.name for path in (out_dir / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdecimal())


def same_bits(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, state) -> Path:
    """A run with the checkpoints of LOSSES, which tests copy before they damage it."""
    out_dir = tmp_path_factory.mktemp("run")
    write_run(out_dir, state, LOSSES)
    return out_dir


@pytest.fixture
def copy(run_dir, tmp_path) -> Path:
    return shutil.copytree(run_dir, tmp_path / "copy")


# What is kept


def test_what_a_killed_save_has_left_is_cleared_away(copy, state):
    """Catches directories of unfinished saves that pile up, each as large as a checkpoint."""
    left_over = copy / "checkpoints" / "40.orbax-checkpoint-tmp"
    left_over.mkdir()
    opened = Checkpoints(copy, keep=4)
    opened.save(at_step(state, 50), 4.0)  # which waits until all is cleared away
    opened.close()
    assert not left_over.exists()
    assert steps_kept(copy) == [*LOSSES, 50]


@pytest.mark.parametrize(
    "keep, losses, kept",
    [
        (1, {1: 3.0, 2: 1.0, 3: 2.0, 4: 5.0, 5: None}, [2, 5]),
        (3, {1: 3.0, 2: 1.0, 3: 2.0, 4: 5.0, 5: None, 6: 4.0}, [2, 4, 5, 6]),
        (2, {1: 3.0, 2: 2.0, 3: 1.0}, [2, 3]),
        (1, {1: 1.0, 2: float("nan"), 3: 2.0}, [1, 3]),
        (1, {1: None, 2: None}, [2]),
    ],
)
def test_the_latest_and_the_best_are_kept(tmp_path, state, keep, losses, kept):
    """Catches the worst kept for the best, everything kept, too few kept, a NaN that is best."""
    write_run(tmp_path, state, losses, keep)
    assert steps_kept(tmp_path) == kept
    again = Checkpoints(tmp_path, keep)  # the losses of before count in a run that goes on
    again.save(at_step(state, 90), 9.0)
    again.close()
    best = (
        min((loss, step) for step, loss in losses.items() if loss) if any(losses.values()) else ()
    )
    expected = {*kept[len(kept) - keep + 1 :], 90, *best[1:]}
    assert set(steps_kept(tmp_path)) == expected


@pytest.mark.parametrize(
    "losses, best",
    [
        ({}, None),
        ({1: None, 2: None}, None),
        ({1: float("nan"), 2: 2.0, 3: 3.0}, 2),  # as the versions before there were records wrote
        ({1: 2.0, 2: float("-inf")}, 1),
        ({1: 1.0, 2: 1.0, 3: 2.0}, 2),
    ],
)
def test_the_best_has_the_lowest_loss(losses, best):
    """Catches a loss that is no number but the best, and the older of two that are equal."""
    assert best_step(losses) == best


def test_restored_bits_are_the_saved_ones(run_dir, state):
    """Catches a restore of another checkpoint, of other bits, and a step that is not restored."""
    abstract = TrainState.abstract(TINY, state.mesh)
    restored = read_state(Checkpoint(run_dir / "checkpoints" / "20"), abstract)
    expected = at_step(state, 20)
    assert int(restored.step) == 20
    assert same_bits(restored.params, expected.params)
    assert same_bits(restored.opt_state, expected.opt_state)
    assert resume(run_dir, abstract, state) == (30, [])


def test_a_record_of_before_skipped_updates_were_counted(copy, state):
    """Catches a checkpoint that is refused, or a count that is made up, where the record has
    none; and one that is not restored where it has."""
    opened = Checkpoints(copy)
    opened.save(at_step(state, 40), None, skipped_in_a_row=7)
    opened.close()
    for expected in (7, 0):
        opened = Checkpoints(copy)
        opened.restore(state)
        opened.close()
        assert opened.skipped_in_a_row == expected
        file = copy / "checkpoints" / "40" / "record" / "metadata"
        record = read_sealed(file)
        record.pop("skipped_in_a_row", None)
        file.write_text(json.dumps(seal(record)))


def test_a_resumed_run_saves_what_it_was_given(copy, state):
    """Catches a checkpoint set aside that keeps its step from being saved again, or is lost when
    that is damaged once more."""
    for turn in ("30", "30-2"):
        (copy / "checkpoints" / "30" / "params" / "manifest.ocdbt").write_bytes(b"x")
        opened = Checkpoints(copy)
        assert int(opened.restore(state).step) == 20
        assert "manifest.ocdbt" in opened.notes[0] and turn in opened.notes[1]
        opened.save(at_step(state, 30), 1.0)
        opened.close()
        assert resume(copy, state, state) == (30, [])
        assert (copy / "checkpoints" / "damaged" / turn / "opt_state").is_dir()


def test_nothing_is_deleted_if_nothing_is_whole(copy, state):
    """Catches a run that starts anew over damaged checkpoints, or that sets aside the last one."""
    for step in (10, 20, 30):
        (copy / "checkpoints" / str(step) / "record" / "metadata").write_text("{}")
    step, [sentence] = resume(copy, state, state)
    assert step is None and "nothing was deleted" in sentence
    assert all(f"checkpoints/{step} is damaged" in sentence for step in (10, 20, 30))
    assert steps_kept(copy) == [10, 20, 30]


def test_a_loss_that_was_tampered_with_does_not_choose_the_best(copy, state):
    """Catches a best checkpoint chosen by a damaged number, and one of unknown loss deleted."""
    record = copy / "checkpoints" / "10" / "record" / "metadata"
    record.write_text(record.read_text().replace('"val_loss": 3.0', '"val_loss": 0.0'))
    step, sentence = use(copy, state)
    assert step is None and "checkpoints/10 is damaged" in sentence and "move it out" in sentence
    opened = Checkpoints(copy, keep=1)
    opened.save(at_step(state, 40), 2.0)
    opened.close()
    assert steps_kept(copy) == [10, 30, 40]


def test_checkpoints_that_have_changed_places_are_damaged(copy, state):
    """Catches an older state that is taken for a newer one."""
    directory = copy / "checkpoints"
    for old, new in (("20", "x"), ("30", "20"), ("x", "30")):
        (directory / old).rename(directory / new)
    step, notes = resume(copy, state, state)
    assert step == 10
    assert "30 is damaged" in notes[0] and "belongs to step 20" in notes[0]
    assert "20 is damaged" in notes[1] and "belongs to step 30" in notes[1]


def test_checkpoints_without_checksums_are_restored_with_a_warning(copy, state, caplog):
    """Catches a run of an older version that cannot be resumed or used any more, or is taken for a
    verified one, and its losses forgotten."""
    for step, loss in LOSSES.items():
        directory = copy / "checkpoints" / str(step)
        shutil.rmtree(directory / "record")
        items = directory / "_CHECKPOINT_METADATA"
        items.write_text(items.read_text().replace('"record"', '"metrics"'))
        (directory / "metrics").mkdir()
        (directory / "metrics" / "metrics").write_text(json.dumps({"val_loss": -loss}))
    for name in ("config.json", "meta.json"):
        content = json.loads((copy / name).read_text())
        del content["sha256"]
        (copy / name).write_text(json.dumps(content))
    assert use(copy, state) == (10, "")
    assert "without checksums" in caplog.text
    assert resume(copy, state, state) == (30, [])


def test_another_optimizer_is_no_damage(copy, state):
    """Catches a whole checkpoint set aside because the flags do not fit it."""
    muon = dataclasses.replace(TINY, optimizer="muon")
    opened = Checkpoints(copy)
    with pytest.raises(UserError, match="another model or optimizer") as error:
        opened.restore(TrainState.abstract(muon, state.mesh))
    assert not isinstance(error.value, DamagedCheckpoint)
    opened.close()
    assert steps_kept(copy) == [10, 20, 30]


def test_a_file_that_may_not_be_read_is_no_damage(copy, state, monkeypatch):
    """Catches a run that goes back because of a lost permission."""
    hidden = copy / "checkpoints" / "30" / "params" / "manifest.ocdbt"
    # Root, as which tests may run, may read all files.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != hidden)
    step, [sentence] = resume(copy, state, state)
    assert step is None and str(hidden) in sentence and "permission" in sentence
    assert steps_kept(copy) == [10, 20, 30]


def test_a_checkpoint_deleted_while_it_is_read_is_looked_for_again(copy, state, monkeypatch):
    """Catches a server that does not start because the run it serves goes on training."""
    read = Checkpoint.read

    def delete_and_read(checkpoint, items):
        if checkpoint.step == 30:
            shutil.rmtree(checkpoint.path)
        return read(checkpoint, items)

    monkeypatch.setattr(Checkpoint, "read", delete_and_read)
    assert use(copy, state) == (20, "")


# Checksums


def test_any_change_of_an_array_changes_its_checksum():
    """Catches a checksum that forgets an element, a bit of it, its sign, or its place."""
    array = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    array[0, 0, 0] = 0.0
    others = [array.copy() for _ in range(4 * array.size)]
    for i, other in enumerate(others):
        bits = other.view(np.uint32).reshape(-1)
        bits[i % array.size] ^= np.uint32(1 << (i * 7 % 32))
    others[0] = array.copy()
    others[0][0, 0, 0] = -0.0
    others.append(np.roll(array, 1))
    others.append(np.swapaxes(array, 0, 0)[::-1])
    others.append(array.reshape(5, 4, 3).transpose(2, 1, 0))
    sums = checksums([jnp.asarray(a) for a in [array, *others]])
    assert len(set(sums)) == len(sums)
    assert checksums([jnp.asarray(array)]) == sums[:1]
    # What is exchanged between number and place is a change too.
    for one, other in (([5, 3], [4, 4]), ([0, 0], [1, 1]), ([0, 3], [1, 2])):
        assert len(set(checksums([jnp.int32(one), jnp.int32(other)]))) == 2
    assert checksums([jnp.int32(0), jnp.int32(1)])[0] != checksums([jnp.int32(1)])[0]


def test_checksums_stay_what_they_were():
    """Catches another checksum than that of runs that exist: all of them would be damaged."""
    array = jnp.arange(12, dtype=jnp.float32).reshape(3, 4) / 7
    assert checksums([array, jnp.bfloat16(array), jnp.int32(5)]) == [
        "2f8bcaf322626ac7",
        "0d9508260c6f8578",
        "cc0d53cdf3020d76",
    ]


def test_a_sealed_file_is_refused_if_anything_in_it_changes(tmp_path):
    """Catches a digest of a part of the content, and a file without a seal where one must be."""
    path = tmp_path / "x.json"
    content = {"a": 1, "b": [1.5, "x"], "c": None}
    text = json.dumps(seal(content))
    path.write_text(text)
    assert read_sealed(path) == content
    for place in range(len(text)):
        for other in "0x ":
            path.write_text(text[:place] + other + text[place + 1 :])
            if other != text[place]:
                with pytest.raises(UserError, match="x.json is damaged"):
                    read_sealed(path)
    path.write_text(json.dumps(content))
    assert read_sealed(path, sealed=False) == content
    with pytest.raises(UserError, match="damaged"):
        read_sealed(path)


# Damage


def flip(path: Path, rng: random.Random, files: list[Path]) -> None:
    """Flip some bits."""
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 4, 64))):
        if content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    replace(path, bytes(content))


def truncate(path: Path, rng: random.Random, files: list[Path]) -> None:
    """Cut the file short, perhaps to nothing."""
    content = path.read_bytes()
    replace(path, content[: rng.randrange(len(content))] if content else content)


def delete(path: Path, rng: random.Random, files: list[Path]) -> None:
    """Delete the file, or the directory within a checkpoint that it is in."""
    if rng.random() < 0.2 and "30" in [parent.name for parent in path.parent.parents]:
        shutil.rmtree(path.parent)
    else:
        path.unlink()


def swap(path: Path, rng: random.Random, files: list[Path]) -> None:
    """Put another file in its place, which may be of another checkpoint, and it in that one's."""
    same_place = [file for file in files if file.relative_to(file.parents[1]).name == path.name]
    other = rng.choice(same_place if rng.random() < 0.5 else files)
    content, other_content = path.read_bytes(), other.read_bytes()
    replace(path, other_content)
    replace(other, content)


def replace(path: Path, content: bytes) -> None:
    """Write the file anew: what it was may be linked to from another copy of the run."""
    path.unlink()
    path.write_bytes(content)


def damage(out_dir: Path, seed: int) -> str:
    """Damage a file of checkpoint 30, or beside the checkpoints, and say which and how."""
    rng = random.Random(seed)
    newest = out_dir / "checkpoints" / "30"
    how = rng.choice((flip, truncate, delete, swap))
    part = rng.choice(("params", "opt_state", "record", "", "out_dir"))
    if part == "out_dir":
        files = [out_dir / "config.json", out_dir / "meta.json"]
        path = rng.choice(files)
    else:
        files = sorted(p for p in out_dir.glob("checkpoints/*/**/*") if p.is_file())
        inside = (newest / part).rglob("*") if part else newest.glob("*")
        candidates = sorted(p for p in inside if p.is_file())
        sizes = [p.stat().st_size for p in candidates]
        path = rng.choices(candidates, sizes if rng.random() < 0.5 else None)[0]
    how(path, rng, files)
    return f"seed {seed}: {how.__name__} {path.relative_to(out_dir)}"


def resume(out_dir: Path, like, state) -> tuple[int | None, list[str]]:
    """Restore as train.py does. Returns the step, None if it was refused, and what is told."""
    opened = Checkpoints(out_dir)
    try:
        restored = opened.restore(like)
    except UserError as error:
        return None, [str(error)]
    finally:
        opened.close()
    step = int(restored.step)
    expected = at_step(state, step)
    assert same_bits(restored.params, expected.params), "other parameters than were saved"
    assert same_bits(restored.opt_state, expected.opt_state), "another state of the optimizer"
    return step, opened.notes


def use(out_dir: Path, state) -> tuple[int | None, str]:
    """Read as sample.py does. Returns the step, None if it was refused, and the sentence."""
    try:
        config, params, meta, step = read_run(out_dir)
    except UserError as error:
        return None, str(error)
    assert same_bits(params, at_step(state, step).params), "other parameters than were saved"
    assert config == TINY.model and meta == CharTokenizer("abcd\n").meta()
    return step, ""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # TensorStore's
def test_damage_ends_in_the_older_checkpoint_or_in_a_sentence(run_dir, tmp_path, state):
    """Catches other numbers than were saved, a library's exception, an older checkpoint that is
    lost, a damaged one that is deleted or in the way of the next, and damage nobody is told of."""
    outcomes: dict[str, int] = {}
    for seed in range(int(os.environ.get("CASES", 200))):
        out_dir = tmp_path / "copy"
        shutil.copytree(run_dir, out_dir, copy_function=os.link)
        case = damage(out_dir, seed)
        files_before = sorted(p.name for p in out_dir.rglob("*") if p.is_file())

        used, sentence = use(out_dir, state)
        assert used in (None, 30), f"{case}: the best is 30, read_run took {used}"
        assert used is not None or "damaged" in sentence or "holds no" in sentence, case
        step, notes = resume(out_dir, state, state)
        assert all("\n" not in note for note in [*notes, sentence]), case
        kept = steps_kept(out_dir)
        if step == 30:
            assert notes == [] and kept == [10, 20, 30], case
        else:
            assert step in (10, 20), f"{case}: {notes}"
            assert "30 is damaged" in notes[0], f"{case}: {notes}"
            assert kept == [s for s in (10, 20) if s <= step], case
            assert (out_dir / "checkpoints" / "damaged" / "30").is_dir(), case
        assert sorted(p.name for p in out_dir.rglob("*") if p.is_file()) == files_before, case
        outcome = f"resumed at {step}, used {used}"
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        shutil.rmtree(out_dir)
    print(outcomes)
    assert len(outcomes) >= 4, outcomes  # resumed at 30 or 20, used or refused: all of them occur


def test_names_of_what_is_set_aside(tmp_path):
    """Catches a name that is taken: what was set aside earlier would be in the way, or lost."""
    names = []
    for _ in range(4):
        path = free_name(tmp_path / "10")
        path.mkdir()
        names.append(path.name)
    assert names == ["10", "10-2", "10-3", "10-4"]
