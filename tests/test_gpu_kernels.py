"""Counts and sums of the program that compiles kernels for NVIDIA GPUs."""

from __future__ import annotations

import pytest

from benchmarks import gpu_kernels

CODE = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/               @P0 IADD3 R2, R2, 0x1, RZ ;
.L_x_0:
        /*0020*/                   LDG.E R3, desc[UR4][R2.64] ;
        /*0030*/              @!P1 STG.E desc[UR4][R2.64], R3 ;
        /*0040*/              @!P0 BRA `(.L_x_0) ;
        /*0050*/                   EXIT ;
.L_x_1:
        /*0060*/                   BRA `(.L_x_1);
        /*0070*/                   NOP;
"""


def test_instructions_of_a_loop_count_as_often_as_it_runs():
    names = ["LDC", "IADD3", "LDG.E", "STG.E", "BRA", "EXIT", "BRA"]
    assert gpu_kernels.instructions(CODE) == names
    assert gpu_kernels.executed(CODE, trips=1) == 7
    assert gpu_kernels.executed(CODE, trips=4) == 7 + 3 * 3


def kernel(name: str, estimates: str, kind: str = "") -> str:
    settings = f'"fusion_backend_config":{{"kind":"{kind}"}},"reification_cost":[{estimates}]'
    return f"  %{name} = f32[8] fusion(%x), backend_config={{{settings}}}"


def estimate(time: float, name: str = "") -> str:
    return f'{{"exec_time_us":{time},"name":"{name}"}}'


def test_kernels_of_a_loop_count_as_often_and_matrix_products_not_at_all():
    softmax = f"{estimate(1e9)},{estimate(5, 'indexing-cost-model')}"
    lines = [
        "%body.1 (x: f32[8]) -> f32[8] {",
        kernel("add", estimate(2)),
        kernel("product", estimate(100), "__triton_nested_gemm_fusion"),
        "}",
        "%fused (x: f32[8]) -> f32[8] {",
        "}",
        "ENTRY %main (x: f32[8]) -> f32[8] {",
        kernel("softmax", softmax, "__triton"),
        "  %while.2 = (f32[8]) while(%tuple), condition=%cond, body=%body.1, backend_config="
        '{"known_trip_count":{"n":"8"}}',
        "}",
    ]
    assert gpu_kernels.microseconds("\n".join(lines)) == 5 + 8 * 2


def test_a_kernel_without_an_estimate_is_an_error():
    program = "ENTRY %main (x: f32[8]) -> f32[8] {\n" + kernel("add", "") + "\n}"
    with pytest.raises(ValueError, match=r"got none for %add\. Set XLA_FLAGS"):
        gpu_kernels.microseconds(program)


def test_without_its_compiler_the_program_is_skipped_in_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_kernels.gpu_model, "entry_points", lambda group: ())
    assert gpu_kernels.main(["--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("skipped: ")
    assert out.count("\n") == 1
    monkeypatch.setattr(gpu_kernels, "path_of", lambda tool: None)
    assert gpu_kernels.missing() == (
        "skipped: pip install --no-deps nvidia-cuda-nvcc nvidia-cuda-nvdisasm"
    )
