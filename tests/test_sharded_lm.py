"""The sharded language model: settings, data, shardings, checkpoints and the supervisor."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import regjax
from examples.sharded_lm import checkpoints, cli, data, equality, launch, masks, train
from examples.sharded_lm import mesh as meshes
from examples.sharded_lm.settings import InputError, Recipe, RunError, check_mesh, parse_mesh

TINY = Recipe(width=32, depth=1, heads=4, context=8, batch=16, warmup=4)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("8", (8, 1, 1)),
        ("2x4", (2, 4, 1)),
        ("1x2x4", (1, 2, 4)),
        ("tensor=4,data=2", (2, 1, 4)),
    ],
)
def test_meshes_are_parsed(text, sizes):
    assert tuple(parse_mesh(text).values()) == sizes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model=2", r"must have axes of data, fsdp, tensor; got 'model' in 'model=2'"),
        *(
            (text, "must be sizes such as 2x4")
            for text in ("", "x", "2x", "1x1x1x2", "0x2", "2x-1")
        ),
        *((text, "must be sizes such as 2x4") for text in ("data=", "data=2,data=2", "data=2.0")),
    ],
)
def test_wrong_meshes_are_rejected(text, message):
    with pytest.raises(ValueError, match=message):
        parse_mesh(text)


@pytest.mark.parametrize(
    ("mesh", "micro_batches", "devices", "message"),
    [
        ("2x4", 1, 1, r"must have 1 devices, .*; got 2x4x1 = 8. Pass --devices 8"),
        ("3", 1, 3, r"must divide the batch: .* 3 x 1 x 1 = 3, and the batch has 16 examples"),
        ("2x4", 4, 8, r"must divide the batch: .* 2 x 4 x 4 = 32"),
        ("1x1x8", 1, 8, r"must divide the heads by its axis tensor: 4 by 8; got 1x1x8"),
    ],
)
def test_a_mesh_that_does_not_fit_is_rejected(mesh, micro_batches, devices, message):
    with pytest.raises(ValueError, match=message):
        check_mesh(TINY, parse_mesh(mesh), micro_batches, devices)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--devices 8 --mesh 3x2", "argument --mesh: must have 8 devices"),
        ("--devices 6 --mesh 3x2", "argument --mesh: must divide the batch"),
        ("--devices 2 --mesh pipeline=2", "argument --mesh: must have axes of data, fsdp, tensor"),
        ("--devices 8 --mesh -2x-4", "argument --mesh: must be sizes such as 2x4"),
        ("--devices 3 --spawn 2", "argument --devices: must be a multiple of the 2 processes"),
        ("--spawn 2 --coordinator h:1 --processes 2 --process-id 0", "argument --spawn: must be"),
        ("--coordinator h:1", "arguments --coordinator, --processes and --process-id: must be"),
        ("--coordinator h:1 --processes 2 --process-id 2", "argument --process-id: must be below"),
        ("--coordinator h", "argument --coordinator: must be host:port; got 'h'"),
        ("--heads 3", "argument --heads: must divide --width, 128"),
    ],
)
def test_wrong_options_are_one_line(capsys, tmp_path, options, message):
    with pytest.raises(SystemExit) as exited:
        cli.main([*options.split(), "--out", str(tmp_path)])
    line = capsys.readouterr().err
    assert exited.value.code == 2
    assert line.count("\n") == 1
    assert f"error: {message}" in line


def test_a_new_run_does_not_mix_with_the_checkpoints_of_another(capsys, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "00000010.json").touch()
    with pytest.raises(SystemExit):
        cli.main(["--out", str(tmp_path)])
    assert "Pass --resume to continue that run" in capsys.readouterr().err


@pytest.mark.skipif(not launch.fcntl, reason="the system has no locks of whole files")
def test_a_folder_belongs_to_one_job(capsys, tmp_path):
    for _ in range(2):  # the first job has let it go
        with launch.only_job(tmp_path), pytest.raises(SystemExit) as exited:
            cli.main(["--out", str(tmp_path), "--resume"])
        line = capsys.readouterr().err
        assert exited.value.code == 2
        assert line.count("\n") == 1
        assert "argument --out: must be a folder of one job; got" in line


def test_a_coordinator_that_does_not_answer_is_one_line(capsys, tmp_path):
    place = ["--processes", "2", "--process-id", "1", "--timeout", "1"]
    with pytest.raises(SystemExit) as exited:
        cli.main(["--coordinator", launch.free_address(), *place, "--out", str(tmp_path)])
    line = capsys.readouterr().err
    assert exited.value.code == 2
    assert line.count("\n") == 1
    assert "argument --coordinator: must answer within 1 s; got '127.0.0.1:" in line


@functools.cache
def corpus() -> data.Corpus:
    return data.read_corpus()


def test_batches_are_a_function_of_seed_and_step():
    batches = [data.training_batch(corpus(), TINY, 5, count) for count in (1, 4)]
    for whole, parts in zip(*batches, strict=True):
        np.testing.assert_array_equal(whole.reshape(parts.shape), parts)
    assert batches[1].rows.tolist()[1] == [4, 5, 6, 7]
    others = [
        data.training_batch(corpus(), TINY, 6, 1),
        data.training_batch(corpus(), dataclasses.replace(TINY, seed=1), 5, 1),
        *data.validation_batches(corpus(), TINY, 2),
    ]
    for other in others:
        assert not np.array_equal(other.tokens, batches[0].tokens)


def test_targets_are_the_next_bytes_of_the_text():
    tokens = data.training_batch(corpus(), TINY, 0, 1).tokens[0, 0].astype(np.uint8).tobytes()
    assert tokens in corpus().train.tobytes()


def test_every_tenth_file_is_held_out(tmp_path):
    for number in range(20):
        (tmp_path / f"{number:02}.py").write_text(f"{number:02}" * 5000)
    read = data.read_corpus(tmp_path)
    assert set(read.validation.tobytes().decode()) == {"0", "1"}
    assert len(read.train) == 9 * len(read.validation)
    with pytest.raises(RunError, match="standard library must be installed as source text"):
        data.read_corpus(tmp_path / "none")


@functools.cache
def abstract_state() -> train.State:
    return jax.eval_shape(functools.partial(train.init_state, TINY))


def test_every_sharding_has_a_parameter_and_the_moments_have_the_same():
    mesh = meshes.make_mesh(parse_mesh("2x2x2"))
    state = abstract_state()
    shardings = meshes.shardings_of(state, mesh)
    used = {s.spec for s in jax.tree.leaves(shardings.params)}
    assert set(meshes.SPECS.values()) <= used
    names = {
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        for path, _ in jax.tree_util.tree_leaves_with_path(state.params)
    }
    for ending in meshes.SPECS:
        assert any(f"/{name}".endswith(f"/{ending}") for name in names), ending
    moments = shardings.optimizer[1]["moments"]
    assert jax.tree.leaves(moments.mu) == jax.tree.leaves(shardings.params)
    assert jax.tree.leaves(moments.nu) == jax.tree.leaves(shardings.params)
    whole = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    local = sum(
        np.prod(sharding.shard_shape(leaf.shape))
        for leaf, sharding in zip(
            jax.tree.leaves(state.params), jax.tree.leaves(shardings.params), strict=True
        )
    )
    assert local < 0.3 * whole


def test_only_kernels_decay():
    table = regjax.decay_mask(abstract_state().params)
    for path, decays in jax.tree_util.tree_leaves_with_path(table):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert decays == name.endswith("kernel/value"), name


def sharded(mesh: str, scale: float = 1.0) -> dict[str, jax.Array]:
    """Return a small state on a mesh of 8 devices."""
    made = meshes.make_mesh(parse_mesh(mesh))
    kernel = scale * np.arange(64, dtype=np.float32).reshape(8, 8)
    return {
        "kernel": jax.device_put(kernel, NamedSharding(made, P("data", "fsdp"))),
        "count": jax.device_put(np.int32(7), NamedSharding(made, P())),
    }


def saved(folder: Path, *steps: int, keep: int = 3) -> None:
    for step in steps:
        checkpoints.save(folder, step, sharded("2x4", step), {"width": 1}, {"a": [step]}, keep)


def restored(folder: Path, warnings: list[str], mesh: str = "2x4", **about: int):
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), sharded(mesh)
    )
    return checkpoints.restore(folder, {"width": 1, **about}, target, warnings.append)


@pytest.mark.parametrize("mesh", ["2x4", "8", "1x2x4"])
def test_a_checkpoint_loads_on_every_mesh(tmp_path, mesh):
    saved(tmp_path, 20)
    state, losses = restored(tmp_path, warnings := [], mesh)
    assert losses == {"a": [20]}
    assert not warnings
    for name, expected in sharded(mesh, 20).items():
        assert state[name].sharding == expected.sharding
        np.testing.assert_array_equal(state[name], expected)


def test_the_last_checkpoints_are_kept(tmp_path):
    saved(tmp_path, 1, 2, 3, 10, keep=2)
    assert checkpoints.steps(tmp_path) == [3, 10]
    assert len(list(tmp_path.iterdir())) == 4


def largest(path: Path) -> Path:
    return max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(path: Path) -> None:
    largest(path).write_bytes(largest(path).read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(largest(path).read_bytes())
    content[len(content) // 2] ^= 1
    largest(path).write_bytes(content)


def edit(path: Path, **changes: object) -> None:
    manifest = path.with_suffix(".json")
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **changes}))


DAMAGES = {
    "truncated": truncate,
    "one bit": flip_a_bit,
    "a file is missing": lambda path: largest(path).unlink(),
    "a file is added": lambda path: (path / "added").touch(),
    "no folder": shutil.rmtree,
    "manifest": lambda path: path.with_suffix(".json").write_text('{"files": {'),
    "empty manifest": lambda path: path.with_suffix(".json").write_text(""),
    "other manifest": lambda path: path.with_suffix(".json").write_text("[]"),
    "losses": lambda path: edit(path, losses={}),
    "files": lambda path: edit(path, files=[]),
    "identity": lambda path: edit(path, identity={"width": 2}),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.sample(6)
def test_a_corrupt_checkpoint_falls_back_to_the_one_before(tmp_path, damage):
    saved(tmp_path, 10, 20)
    DAMAGES[damage](tmp_path / "00000020")
    state, losses = restored(tmp_path, warnings := [])
    assert losses == {"a": [10]}
    np.testing.assert_array_equal(state["kernel"], sharded("2x4", 10)["kernel"])
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: the checkpoint of step 20 is corrupt (")
    assert warnings[0].endswith("; using step 10")
    # The resumed run replaces it.
    saved(tmp_path, 20)
    assert restored(tmp_path, warnings)[1] == {"a": [20]}
    assert len(warnings) == 1


def test_only_corrupt_checkpoints_are_an_error(tmp_path):
    saved(tmp_path, 10, 20)
    for path in (tmp_path / "00000010", tmp_path / "00000020"):
        truncate(path)
    with pytest.raises(RunError, match=r"must hold an intact .*; got corrupt ones of steps 10"):
        restored(tmp_path, [])
    assert checkpoints.steps(tmp_path) == [10, 20]


def test_an_unfinished_checkpoint_is_not_used(tmp_path):
    saved(tmp_path, 10)
    for name in ("00000020", "00000030.orbax-checkpoint-tmp"):
        shutil.copytree(tmp_path / "00000010", tmp_path / name)
    assert restored(tmp_path, warnings := [])[1] == {"a": [10]}
    assert not warnings
    assert {path.name for path in tmp_path.iterdir()} == {"00000010", "00000010.json"}
    assert checkpoints.restore(tmp_path / "none", {}, {}, print) is None


def test_other_files_in_the_folder_are_ignored(tmp_path):
    saved(tmp_path, 10)
    (tmp_path / "notes.json").write_text("{}")
    (tmp_path / "00000020.json").mkdir()
    assert restored(tmp_path, warnings := [])[1] == {"a": [10]}
    assert not warnings


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (("state", {"losses": [2.0] * 3}), "continuing from the checkpoint of step 3"),
        (None, "no checkpoint in runs; training from the start"),
    ],
)
def test_a_resumed_run_reports_where_it_begins(monkeypatch, found, line):
    monkeypatch.setattr(checkpoints, "restore", lambda *args: found)
    empty = train.State({}, (), jnp.zeros((), jnp.int32))
    monkeypatch.setattr(train, "init_state", lambda recipe: empty)  # compiles faster
    assert resumed(steps=3 if found else 0) == [line]


def test_a_run_does_not_end_before_its_checkpoint(monkeypatch):
    found = "state", {"losses": [2.0] * 3}
    monkeypatch.setattr(checkpoints, "restore", lambda *args: found)
    with pytest.raises(InputError, match=r"^argument --steps: must be at least 3, .*; got '2'\. T"):
        resumed(steps=2)


def resumed(steps: int) -> list[str]:
    """Return the lines that a resumed run prints."""
    plan = cli._read(cli.make_parser().read_args(["--resume", f"--steps={max(steps, 1)}"]))[1]
    plan = dataclasses.replace(plan, steps=steps)
    mesh = meshes.make_mesh(parse_mesh("8"))
    train.train(TINY, plan, mesh, data.read_corpus(), Path("runs"), warn=(lines := []).append)
    return lines


def test_a_checkpoint_of_another_model_is_rejected(tmp_path):
    saved(tmp_path, 10)
    with pytest.raises(InputError, match=r"00000010 must be of this .*, with width 2; got width 1"):
        restored(tmp_path, [], width=2)


@pytest.mark.parametrize("place", ["arrays", "manifest"])
def test_a_full_disk_loses_no_earlier_checkpoint(tmp_path, monkeypatch, place):
    saved(tmp_path, 10)
    error = OSError(28, "No space left on device")

    def fail(*args: object, **kwargs: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        if place == "arrays":
            patch.setattr(checkpoints.ocp.StandardCheckpointer, "save", fail)
        else:
            patch.setattr(checkpoints, "write_atomically", fail)
        with pytest.raises(RunError, match=r"no space left on device\. The .* step 10 is"):
            saved(tmp_path, 20, keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {"00000010", "00000010.json"}
    assert restored(tmp_path, [])[1] == {"a": [10]}


SAME = {"masks": {"embedding": "a"}, "losses": [5.0, 4.0]}


@pytest.mark.parametrize(
    ("changes", "agrees"),
    [
        ({}, True),
        ({"losses": [5.0, 4.0 + 0.9e-10]}, True),
        ({"losses": [5.0 + 1.1e-10, 4.0]}, False),
        ({"masks": {"embedding": "b"}}, False),
        ({"masks": {}}, False),
    ],
)
def test_other_masks_and_losses_are_found(changes, agrees):
    row = equality.compare(equality.Case(1, "1"), "float64", {**SAME, **changes}, SAME)
    assert row["agrees"] == agrees


@pytest.mark.parametrize(
    ("collectives", "temporary", "agree"), [(3, 101, True), (2, 100, False), (3, 97, False)]
)
@pytest.mark.parametrize("without", ["dropout", "decay"])
def test_other_collectives_and_memory_are_found(collectives, temporary, agree, without):
    costs = {
        "2x4": {"collectives": {"all-reduce": 3}, "temporary": 100},
        f"2x4 without {without}": {
            "collectives": {"all-reduce": collectives},
            "temporary": temporary,
        },
    }
    assert equality.costs_agree(costs) == agree


_LOST = "error: another process of the job was lost (Gloo all-reduce failed)\n"


@pytest.mark.parametrize(
    ("failed", "logs", "expected"),
    [
        ({1: -9}, {1: "connected"}, "error: process 1 of 2 was ended by SIGKILL. Run the command"),
        ({0: 1, 1: -9}, {0: _LOST, 1: ""}, "error: process 1 of 2 was ended by SIGKILL."),
        ({0: 1, 1: 1}, {0: _LOST, 1: "x\nerror: disk\n"}, "error: disk"),
        ({0: 2, 1: 2}, {0: "error: mesh\n", 1: "error: mesh\n"}, "error: mesh"),
        ({0: 1}, {0: _LOST}, "error: another process of the job was lost by process 0. Run"),
        ({0: -6}, {0: "F1129 client.h"}, "error: 2 processes must connect to the coordinator h:1"),
        ({0: -6}, {0: "connected to the coordinator\nheartbeat"}, "error: another process of the"),
        ({1: 1}, {1: "Traceback\nKeyError\n"}, "Traceback\nKeyError\nerror: process 1 of 2 failed"),
    ],
)
def test_the_cause_of_a_failure_is_explained(failed, logs, expected):
    code, text = launch.explain(failed, logs, 2, "h:1")
    assert text.startswith(expected)
    assert code == failed[0] if "mesh" in text else code == 1


CHILDREN = {
    "killed": "import os; os.kill(os.getpid(), 9)",
    "error": "import sys; print('error: no', file=sys.stderr); sys.exit(2)",
    "hangs": "import signal; signal.pause()",
    "with supervisor": "import sys; sys.stdin.read()",
    "fine": "",
}


@pytest.mark.parametrize(
    ("children", "code", "message"),
    [
        (("fine", "fine"), 0, ""),
        (("hangs", "killed"), 1, "error: process 1 of 2 was ended by SIGKILL. Run the command"),
        (("error", "hangs"), 2, "error: no\n"),
        (("fine", "error"), 2, "error: no\n"),
    ],
)
def test_all_processes_end_when_one_fails(capfd, monkeypatch, children, code, message):
    started = []
    original = launch.subprocess.Popen

    def start(command: list[str], **options: object):
        number = int(command[-1])
        process = original([command[0], "-c", CHILDREN[children[number]]], **options)
        started.append(process)
        return process

    monkeypatch.setattr(launch.subprocess, "Popen", start)
    monkeypatch.setattr(launch, "_GRACE", 0.05)
    assert launch.supervise([], range(2), 2, "h:1") == code
    assert all(process.returncode is not None for process in started)
    assert capfd.readouterr().err.startswith(message)
    if code == 1:
        assert started[0].returncode == -signal.SIGKILL


@pytest.mark.slow
def test_masks_have_names_and_shapes_of_the_sites():
    """The digests cover the masks that a train step applies, on any mesh and in any parts."""
    batch = data.training_batch(corpus(), TINY, 3, 1)
    root, events = jax.random.key(TINY.seed, impl="threefry2x32"), []
    drop = train.Dropout(TINY.rate, root, jnp.int32(3), jnp.asarray(batch.rows[0]))
    one = meshes.make_mesh(parse_mesh("1"), jax.devices()[:1])
    with jax.set_mesh(one):
        graphdef, params = train.nnx.split(train.GPT(TINY, train.nnx.Rngs(0)))
        with regjax.observing(events.append):
            jax.jit(lambda: train.loss_of(graphdef, params, jnp.asarray(batch.tokens[0]), drop))()
            jax.effects_barrier()
    sites = {event.key: event.site for event in events if hasattr(event, "site")}
    applied = {sites[event.key]: event.mask for event in events if hasattr(event, "mask")}
    mesh = meshes.make_mesh(parse_mesh("2x2x2"))
    parts = meshes.shard_batch(data.training_batch(corpus(), TINY, 3, 4), mesh)
    drawn = masks.masks_of_step(TINY, mesh, parts, 3)
    assert drawn.keys() == applied.keys()
    for site, mask in drawn.items():
        assert len(mask.sharding.device_set) == 8
        whole = np.asarray(mask).reshape(applied[site].shape)
        np.testing.assert_array_equal(whole, applied[site])
        assert 0.85 < whole.mean() < 0.95
