"""``benchmarks.gpu`` on a machine without a GPU: what fails is recorded as failed. ``--dry-run`` runs in CI."""

from . import gpu


def test_a_stage_that_cannot_run_is_recorded_as_failed():
    found = gpu.in_its_own_process("races", "tpu", small=True)
    assert found["status"] == "failed"
    assert "CRL_KERNELS_BACKEND='tpu'" in found["reason"]


def test_a_stage_that_needs_a_gpu_is_not_called_ok():
    found = gpu.in_its_own_process("graphs", "auto", small=True)
    assert (found["status"], found["reason"]) == ("not run", "needs CUDA graphs")
