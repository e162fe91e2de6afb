"""What an initialisation leaves in NNCF's ``log_dir``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nncf.common.logging import nncf_logger
from nncf.torch.quantization.precision_init.base_init import (
    BasePrecisionInitializer,
)

from nncf_mpq_plugin.types import write_json

FOLDER = "learned_importance_dumps"
PAINTED_BITS = {2, 4, 6, 8}  # NNCF's bit width graph has colours for these only


def write_dumps(algo: Any, setup: Any, complete: Any, outcome: Any, *, detailed: bool) -> None:
    """
    Write ``bitwidth_per_scope.json``, as HAWQ does, which ``manual`` initialisation takes as it is.

    :param algo: the controller of the initialisation.
    :param setup: NNCF's setup with the bit widths found.
    :param complete: the same with every point of the controller's, for the graph.
    :param outcome: the initialiser's ``Outcome``.
    :param detailed: also write ``learned_importance_dumps/`` with the importance table, the policy, the curves of joint
        training and the bit width graph.
    """
    from nncf.common.utils import debug

    folder = Path(debug.DEBUG_LOG_DIR)
    bits = BasePrecisionInitializer.get_bitwidth_per_scope(setup)
    write_json(folder / "bitwidth_per_scope.json", {"bitwidth_per_scope": bits})
    if not detailed:
        return
    outcome.table.save(folder / FOLDER / "importance.json")
    outcome.solution.policy.save(folder / FOLDER / "policy.json")
    write_json(folder / FOLDER / "joint_training.json", outcome.joint.to_json())
    _write_graph(folder / FOLDER / "bitwidth_graph.dot", algo, complete)


def _write_graph(path: Path, algo: Any, setup: Any) -> None:
    from nncf.common.utils.dot_file_rw import write_dot_graph
    from nncf.torch.quantization.precision_init.bitwidth_graph import (
        BitwidthGraph,
    )

    widths = {point.qconfig.num_bits for point in setup.quantization_points.values()}
    if widths - PAINTED_BITS:
        nncf_logger.warning(
            f"No bitwidth_graph.dot: NNCF can draw {sorted(PAINTED_BITS)} bits, the policy has {sorted(widths)}"
        )
        return
    controller, model = algo.apply_new_quantizer_setup(setup)
    graph = BitwidthGraph(controller, model, controller.groups_of_adjacent_quantizers).get()
    write_dot_graph(graph, path)
