"""The benchmark of growth: exponents, collectives, skipped parts, tables and the picture."""

from __future__ import annotations

import doctest
import functools
import json
import os
from concurrent.futures.process import BrokenProcessPool

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from matplotlib.figure import Figure

import regjax
from benchmarks import gpu_model, scale, scale_axes, scale_tables, sharded_step, slopes, tpu_model
from regjax import optim
from tests.scale_record import content

XS = (1, 10, 100, 1000, 10_000)


@pytest.mark.parametrize(
    ("curve", "exponent", "start", "points"),
    [
        ({x: 3 * x for x in XS}, 1, 1, 5),
        ({x: 2 * x**2 for x in XS}, 2, 1, 5),
        (dict.fromkeys(XS, 5.0), 0, 1, 5),
        ({x: 8 / x for x in (1, 2, 4, 8)}, -1, 1, 4),
        ({x: max(100, x) for x in XS}, 1, 100, 3),  # bent
        ({x: x * 1.1 ** (i % 2) for i, x in enumerate(XS)}, 1, 1, 5),  # noisy
        ({1: 1, 10: 100, 100: 100}, 0, 10, 2),  # nowhere known to be straight
        ({1: 0, 10: 10, 100: 100}, 1, 10, 2),  # a zero has no logarithm
    ],
)
def test_the_exponent_is_that_of_the_straight_tail(curve, exponent, start, points):
    slope = slopes.fit(curve)
    assert slope.exponent == pytest.approx(exponent, abs=0.02)
    assert (slope.start, slope.points) == (start, points)


def test_one_point_has_no_exponent():
    assert slopes.fit({1: 1.0}) is None


@pytest.mark.parametrize("module", [slopes, sharded_step], ids=lambda module: module.__name__)
def test_examples(module):
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("%a = f32[2,4]{1,0} add(%x, %y)", {}),
        ("%r = f32[2,4]{1,0} all-reduce(%x), to_apply=%add", {"all-reduce": (1, 32)}),
        ("%r = (f32[8]{0}, bf16[8]{0}) all-reduce-start(%x, %y)", {"all-reduce": (1, 48)}),
        ("%r = (f32[8]{0}, f32[2]{0}) reduce-scatter-start(%x)", {"reduce-scatter": (1, 8)}),
        ("%g = (bf16[4]{0}, bf16[16]{0:T(128)}) all-gather-start(%x)", {"all-gather": (1, 32)}),
        ("%d = bf16[16]{0} all-gather-done(%g)", {}),
        (
            "%p = (s32[8], s32[8], u32[], u32[]) collective-permute-start(%x)",
            {"collective-permute": (1, 32)},
        ),
        ("%t = pred[8,8]{1,0} all-to-all(%x)", {"all-to-all": (1, 64)}),
    ],
)
def test_collectives_are_counted_in_the_text(line, expected):
    assert sharded_step.collectives(f"ENTRY\n  {line}\n") == expected


@pytest.mark.parametrize("planted", [False, True])
def test_a_planted_collective_is_found(monkeypatch, planted):
    monkeypatch.setattr(scale_axes, "_free", lambda: 0.0)  # compile only
    mesh = Mesh(np.array(jax.devices()[:2]), ("devices",))
    shards, whole = (NamedSharding(mesh, PartitionSpec(*axis)) for axis in (("devices",), ()))
    drop = scale_axes._dropouts()[scale_axes.DROPOUT]

    def program(x, key):
        y = drop(x, key)
        return jax.lax.with_sharding_constraint(y, whole) * 2 if planted else y

    x = jax.ShapeDtypeStruct((256, 128), jnp.float32, sharding=shards)
    sample = scale_axes.measure(
        "devices", "title", 2, {scale_axes.WITHOUT: program}, (x, scale_axes._key()), 1
    )
    assert sample.collectives == {scale_axes.WITHOUT: int(planted)}


def test_a_program_larger_than_the_memory_is_only_compiled(monkeypatch):
    monkeypatch.setattr(scale_axes, "_free", lambda: 1000.0)
    programs = {scale_axes.WITHOUT: lambda x: x + 1}
    shape = jax.ShapeDtypeStruct((200,), jnp.float32)
    sample = scale_axes.measure("elements", "title", 200, programs, (shape,), 1)
    assert sample.seconds == {}
    assert sample.bytes == {scale_axes.WITHOUT: 800}
    assert sample.compile[scale_axes.WITHOUT][0] > 0


@pytest.mark.parametrize("axis", ["elements", "sites", "leaves"])
@pytest.mark.sample(2)
def test_a_quick_axis_compares_every_candidate(monkeypatch, axis):
    """Two small sizes of each program."""
    for name in ("ELEMENTS", "SITES", "LEAVES"):
        monkeypatch.setattr(scale_axes, name, getattr(scale_axes, name)[:1])
    monkeypatch.setattr(scale_axes, "ENOUGH", 0.0)
    for sample in scale_axes.AXES[axis](True, 1):
        names = set(sample.seconds)
        assert scale_axes.WITHOUT in names
        assert len(names) > 1
        for figures in (sample.trace, sample.compile, sample.bytes, sample.instructions):
            assert set(figures) == names
        if scale_axes.DROPOUT in names:
            one, other = (sample.instructions[n] for n in (scale_axes.DROPOUT, scale_axes.WITHOUT))
            assert one > 2 * other


def test_every_candidate_of_the_leaves_decays():
    """The mask decays kernels and no biases; both change more than without decay."""
    params = {"layer": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}

    def updated(penalty=0.0, **options):
        optimizer = optim.adamw(0.1, **options)
        zeros = jax.tree.map(jnp.zeros_like, params)
        found, _ = scale_axes._update(optimizer, penalty, (params, optimizer.init(params)), zeros)
        return [bool((leaf != 1).any()) for leaf in jax.tree.leaves(found)]  # bias, kernel

    assert updated(weight_decay=0.0) == [False, False]
    assert updated(weight_decay=0.1) == [True, True]
    assert updated(weight_decay=0.1, mask=regjax.decay_mask) == [False, True]
    assert updated(weight_decay=0.0, penalty=0.1) == [True, True]


@pytest.mark.parametrize(("name", "package"), [("tpu", "libtpu"), ("gpu", "jax-cuda13-plugin")])
def test_a_part_without_its_compiler_is_skipped_in_one_line(
    capsys, monkeypatch, tmp_path, name, package
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(gpu_model, "entry_points", lambda group: ())
    assert scale.main(["--only", name, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("skipped: ")
    assert package in out
    assert out.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.fixture
def blank(monkeypatch):
    """Save blank pictures, which take no time; `test_pictures.py` draws the real one."""
    monkeypatch.setattr(scale, "draw", lambda content: Figure(figsize=(1, 1)))


def _isolated(parts, env, function, name, *_):
    if name not in parts:
        raise BrokenProcessPool
    return parts[name]


@pytest.mark.usefixtures("blank")
def test_an_aborted_compiler_ends_its_part_alone(capsys, monkeypatch, tmp_path):
    found = {name: content()[name] for name in ("elements", "gpu")}
    monkeypatch.setattr(scale, "isolated", functools.partial(_isolated, found))
    for module in (tpu_model, gpu_model):
        monkeypatch.setitem(scale.PARTS, module.NAME[:3], scale.Part(grids=("grid",)))
    assert scale.main(["--only", "elements", "tpu", "gpu", "--out", str(tmp_path)]) == 0
    assert "failed: the process of tpu ended early\n" in capsys.readouterr().out
    assert list(scale.load(tmp_path / "scale.json")) == ["elements", "gpu"]


@pytest.mark.usefixtures("blank")
def test_only_keeps_the_other_parts_and_redraw_measures_nothing(monkeypatch, tmp_path):
    whole = json.loads(json.dumps(content()))
    scale.save(tmp_path / "scale", {name: whole[name] for name in ("sites", "elements")})
    monkeypatch.setattr(scale, "isolated", functools.partial(_isolated, whole))
    assert scale.main(["--only", "leaves", "--out", str(tmp_path)]) == 0
    saved = scale.load(tmp_path / "scale.json")
    assert saved == {name: whole[name] for name in ("elements", "sites", "leaves")}
    (tmp_path / "scale.png").unlink()
    monkeypatch.setattr(scale, "isolated", None)
    assert scale.main(["--redraw", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "scale.png").read_bytes()[1:4] == b"PNG"


def test_a_part_runs_in_a_process_with_its_settings(monkeypatch):
    monkeypatch.delenv("SCALE_SETTING", raising=False)
    assert scale.isolated({"SCALE_SETTING": "8"}, _setting, "SCALE_SETTING") == "8"
    assert _setting("SCALE_SETTING") == ""


def _setting(name):
    return os.environ.get(name, "")


def cells(text, start):
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_has_growth_and_the_worst_ratio():
    text = scale_tables.markdown(content())
    line = "dropout of one array; 1,024 to 1.0e6 elements | time of a call, ms | dropout, packed"
    assert cells(text, line)[3:] == [
        "8.19",
        "8,389",
        "elements^1.00 from 1,024",
        "elements^1.00 from 1,024",
        "4.00",
        "4.00 at 1,024",
    ]
    line = "dropout of one array; 1,024 to 1.1e9 elements | memory, MB | dropout |"
    assert cells(text, line)[3:5] == ["0.0041", "4,295"]


def test_the_table_has_memory_collectives_and_shares():
    text = scale_tables.markdown(content())
    assert cells(text, "v5e:16x16")[1:] == [
        "256",
        "2.0",
        "3.0 → 3.5",
        "7 all-reduce",
        "1.0",
        "100 cycles",
        "19.0 %",
        "1.0 %",
    ]
    assert cells(text, "CPU:1")[4:] == ["none", "0.0", "", "", ""]
    assert cells(text, "H100:1x64x8")[6] == "100 microseconds"


def test_kernels_of_a_gpu_are_estimated_by_kind():
    def estimates(*pairs):
        found = [f'{{"exec_time_us":{time},"compute_time_us":9,"name":"{n}"}}' for n, time in pairs]
        return f'"reification_cost":[{",".join(found)}]'

    lines = [
        f"%a = f32[8] fusion(%x), {estimates(('', 7), ('sol', 1))}",
        f'%b = f32[8] fusion(%x), {{"kind":"__triton_nested_gemm_fusion"}} '
        f"{estimates(('', 70), ('sol', 10))}",
        f'%c = f32[8] fusion(%x), {{"kind":"__triton"}} '
        f"{estimates(('', 9e9), ('indexing-cost-model', 200), ('sol', 0.01))}",
        f"%d = f32[8] all-gather-start(%x), {estimates(('sol', 5000))}",
    ]
    assert gpu_model.step_microseconds("\n".join(lines)) == 217


@pytest.mark.parametrize("devices", [1, 2, 4, 8, 256, 512])
def test_the_mesh_has_all_devices(devices):
    assert np.prod(sharded_step.mesh_shape(devices)) == devices


@pytest.mark.slow
def test_the_step_of_the_example_has_one_mask_without_communication():
    """Dropout adds no collective on simulated devices."""
    found = {
        variant: sharded_step.compile_one("CPU:4", variant, sharded_step.SMALL)
        for variant in sharded_step.VARIANTS
    }
    assert len({str(one.collectives) for one in found.values()}) == 1
    assert found["dropout"].collectives["all-reduce"][0] > 0
