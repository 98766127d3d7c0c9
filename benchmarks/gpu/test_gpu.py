"""``benchmarks.gpu`` on a machine without a GPU: a stage that fails is recorded as failed. ``--dry-run`` runs in CI."""

from .stages import in_own_process


def test_a_stage_that_cannot_run_is_recorded_as_failed():
    stage = in_own_process("races", "tpu", small=True)
    assert stage["status"] == "failed"
    assert "CRL_KERNELS_BACKEND='tpu'" in stage["reason"]


def test_a_stage_that_needs_a_gpu_is_not_called_ok():
    stage = in_own_process("graphs", "auto", small=True)
    assert (stage["status"], stage["reason"]) == ("not run", "needs CUDA graphs")
