"""
The initialiser that NNCF 2.19 runs for ``"type": "learned_importance"``: the core on NNCF's own placement.

Imported by :func:`nncf_mpq_plugin.adapters.nncf2.register` only, since the names of NNCF below are gone in NNCF 3.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from nncf.common.logging import nncf_logger
from nncf.config.extractors import extract_algo_specific_config
from nncf.config.schemata.defaults import QUANTIZATION_OVERFLOW_FIX
from nncf.torch.initialization import (
    DefaultInitializingDataLoader,
    PTInitializingDataLoader,
)
from nncf.torch.quantization.precision_init.base_init import (
    BasePrecisionInitializer,
    BasePrecisionInitParams,
)
from nncf.torch.structures import QuantizationPrecisionInitArgs
from torch import Tensor

from nncf_mpq_plugin import distributed
from nncf_mpq_plugin.adapters.nncf2_dumps import write_dumps
from nncf_mpq_plugin.adapters.nncf2_graph import hold, operations, position_of
from nncf_mpq_plugin.adapters.nncf2_keys import STRICT, checked
from nncf_mpq_plugin.adapters.nncf2_limits import int8_ratio, int8_ratio_limit, with_equal_bits, with_groups
from nncf_mpq_plugin.adapters.nncf2_placement import LegacyModel, place
from nncf_mpq_plugin.adapters.plan import Op, Position, before_additions, reads_input
from nncf_mpq_plugin.allocation.search import Solution, prepare, solution_of, solve_prepared
from nncf_mpq_plugin.batches import Batches
from nncf_mpq_plugin.errors import InputError
from nncf_mpq_plugin.importance import importance_from_scales
from nncf_mpq_plugin.joint import JointConfig, JointResult, train_jointly
from nncf_mpq_plugin.sensitivity import fisher_importance, loss_change_importance
from nncf_mpq_plugin.training import evaluation_mode, set_weights, weights_of
from nncf_mpq_plugin.types import Budget, ImportanceTable

DEFAULT_INIT_SAMPLES = 256
HIGHEST_BITS = 8


@dataclass(frozen=True)
class LearnedScale:
    """
    What a quantizer takes over from joint training.

    :param bits: the bit width that was chosen.
    :param step: LSQ's step size at it.
    :param half_range: whether only half of the integers are used, of an 8-bit weight.
    :param constant: whether the step is not to be trained further: it is a power of two, at the network's input.
    """

    bits: int
    step: Tensor
    half_range: bool
    constant: bool


@dataclass(frozen=True)
class Outcome:
    """
    What an initialisation found.

    :param table: importances.
    :param solution: the policy and what it reaches.
    :param int8_ratio: HAWQ's compression ratio of the policy.
    :param joint: how joint training went.
    :param seconds: time of each part.
    """

    table: ImportanceTable
    solution: Solution
    int8_ratio: float
    joint: JointResult
    seconds: Mapping[str, float]


class LearnedImportanceParams(BasePrecisionInitParams):
    """
    The config's entry, checked, with the data; and what the initialiser leaves for the builder.

    :param user_init_args: NNCF's structure with data loader and criterion.
    :param values: every key of the entry.
    :param samples: samples for range initialisation.
    :param half_range: whether 8-bit weights use half of their range on devices without a list of bit widths, as NNCF
        has it for CPUs (``overflow_fix``).
    """

    def __init__(self, user_init_args: Any, values: Mapping[str, Any], samples: int, half_range: bool):
        super().__init__(user_init_args)
        self.values, self.samples, self.half_range = values, samples, half_range
        self.scales: dict[str, LearnedScale] = {}
        self.outcome: Outcome | None = None

    @classmethod
    def from_config(cls, config: Any, initializer: Mapping[str, Any]) -> LearnedImportanceParams:
        """
        :param config: the ``NNCFConfig`` with its extra structures.
        :param initializer: its ``initializer`` entry.
        :raises ConfigError: for a key or value that is not valid.
        :raises InputError: if no data was registered.
        """
        values = checked(initializer["precision"])
        try:
            arguments = config.get_extra_struct(QuantizationPrecisionInitArgs)
        except KeyError as error:
            msg = (
                "learned_importance needs data and a loss: call nncf.torch.register_default_init_args(config, loader, "
                "criterion=...) before create_compressed_model, as for hawq."
            )
            raise InputError(msg) from error
        ranges = initializer.get("range")
        samples = ranges.get("num_init_samples", DEFAULT_INIT_SAMPLES) if isinstance(ranges, dict) else None
        overflow_fix = extract_algo_specific_config(config, "quantization").get(
            "overflow_fix", QUANTIZATION_OVERFLOW_FIX
        )
        return cls(arguments, values, samples or DEFAULT_INIT_SAMPLES, overflow_fix == "enable")

    def carry_scales(self, *quantizers: Mapping[Any, Any]) -> None:
        """
        Write the learned scales into the final quantizers, whose ranges NNCF has initialised anew by statistics, and
        what else they were trained with.

        :param quantizers: NNCF's quantizer id -> information about the quantizer.
        """
        carried = 0
        for infos in quantizers:
            for key, info in infos.items():
                native, learned = info.quantizer_module_ref, self.scales.get(str(key))
                if learned is None or learned.bits != native.num_bits:
                    continue
                storage = native._scale_param_storage
                if storage.numel() != learned.step.numel():
                    continue  # per-channel activations were trained with one scale; NNCF's statistics serve them better
                if learned.half_range and not native.is_half_range:
                    for holder, prefix in ((native, "_"), (native._qspec, "")):  # the latter goes into NNCF's state
                        setattr(holder, f"{prefix}half_range", True)
                        setattr(holder, f"{prefix}narrow_range", False)
                    native.set_levels()
                full = (learned.step * native.level_high).reshape(storage.shape).to(storage)
                storage.data.copy_(full.log() if native.is_using_log_scale_storage else full)
                native.initialized = True
                if learned.constant:
                    hold(native)
                carried += 1
        nncf_logger.info(f"Learned scales were carried into {carried} quantizers")


class LearnedImportanceInitializer(BasePrecisionInitializer):
    """Joint training, importance and search on the quantizers that NNCF has placed."""

    def __init__(self, algo: Any, params: LearnedImportanceParams, hw_precision_constraints: Any = None):
        super().__init__(algo, params, hw_precision_constraints)
        self._params = params

    def apply_init(self) -> Any:
        """
        :return: NNCF's setup with the bit widths found.
        :raises InputError: in a script that runs in several processes.
        :raises MPQError: as the core's functions do.
        """
        if distributed.size() > 1:  # NNCF calls this in each of them
            msg = (
                f"learned_importance chooses bit widths in one process, and this script runs in {distributed.size()}. "
                "Call create_compressed_model in a script of its own first, and save "
                "compression_ctrl.get_compression_state() and the model's state_dict. Pass the former to "
                "create_compressed_model as compression_state here, and load the latter (nncf.torch.load_state)."
            )
            raise InputError(msg)
        values, arguments = self._params.values, self._params.user_init_args
        ops, activations = operations(self._model), self._activations_for_openvino()
        quantized = place(
            self._algo,
            self._allowed_by_hardware(),
            values["bits"],
            values["fixed_bits"],
            equal=self._adjacent() if values["bitwidth_assignment_mode"] == STRICT else (),
            dropped=self._before_additions(ops, activations),
            half_range=self._params.half_range and not self._hw_precision_constraints,
            inputs={key for position, key in activations.items() if reads_input(position, ops)},
        )
        if quantized.unread:
            nncf_logger.warning(f"Not searched, since their inputs are not quantized: {', '.join(quantized.unread)}")
        if quantized.several:
            nncf_logger.warning(
                "Not searched, since they are called behind several quantizers (nncf2.freeze refuses those that have "
                f"a bias): {', '.join(quantized.several)}"
            )
        home = next(self._model.parameters()).device
        device = torch.device(arguments.device) if arguments.device else home
        weights = {name: value.cpu() for name, value in weights_of(self._model).items()}
        found = False
        try:
            with evaluation_mode(self._model), quantized.in_place():
                self._model.to(device)
                outcome = self._search(quantized, device)
                chosen = self._choose(quantized, outcome)
            found = True
        finally:
            if not found or values["keep_weights"] == "original":
                set_weights(self._model, weights)
            self._model.to(home)
        self._params.outcome = outcome
        complete = self._setup(chosen)
        setup = self._without(complete, quantized.dropped)
        self._params.scales = {
            str(setup.quantization_points[point].insertion_point): LearnedScale(
                chosen[key],
                quantized.modules[key].trained_step(chosen[key]),
                quantized.modules[key].half_range and chosen[key] == HIGHEST_BITS,
                quantized.modules[key].power_of_two,
            )
            for point, key in self._algo.setup_to_module_id_translation_dict.items()
            if key not in quantized.dropped
        }
        write_dumps(self._algo, setup, complete, outcome, detailed=values["dump_init_precision_data"])
        return setup

    def _search(self, quantized: LegacyModel, device: torch.device) -> Outcome:
        values, arguments = self._params.values, self._params.user_init_args
        loader = Pairs.of(arguments.data_loader)

        def loss(output: Any, target: Any) -> Tensor:
            result: Tensor = arguments.criterion_fn(output, target, arguments.criterion)
            return result

        seed, training = values["seed"], values["joint_training"]
        begin = time.perf_counter()
        quantized.calibrate([inputs for inputs, _ in Batches(loader, seed=seed).take(self._params.samples)])
        self._solve(quantized, quantized.possible(importance_from_scales(quantized)), "keep")  # is there any policy?
        joint = train_jointly(
            quantized, loader, JointConfig(**training, seed=seed), loss_fn=loss, device=device, progress=_log_progress
        )
        trained = time.perf_counter()
        if values["importance"]["source"] == "scale":
            table = importance_from_scales(quantized, "", f"joint training, {joint.steps} steps")
        else:
            measure = {"fisher": fisher_importance, "loss_change": loss_change_importance}
            batches = Batches(loader, seed=seed, fraction=training["data_fraction"])
            table = measure[values["importance"]["source"]](
                quantized,
                batches.take(values["importance"]["samples"]),
                loss_fn=loss,
                label_free=training["label_free"],
                device=device,
            )
        table = quantized.possible(table)
        measured = time.perf_counter()
        solution = self._solve(quantized, table, values["out_of_order"])
        seconds = {
            "joint training": trained - begin,
            "importance": measured - trained,
            "search": time.perf_counter() - measured,
        }
        bits = solution.policy.layers
        ratio = int8_ratio(table, bits)
        widths = ", ".join(f"{name} W{width.weight}A{width.activation}" for name, width in bits.items())
        limit = values["compression_ratio"]
        asked = "" if limit is None else f" (limit {limit:g})"
        nncf_logger.info(f"Chosen bit widths, compression ratio to INT8 {ratio:.2f}{asked}: {widths}")
        return Outcome(table, solution, ratio, joint, seconds)

    def _solve(self, quantized: LegacyModel, table: ImportanceTable, out_of_order: str) -> Solution:
        values, begin = self._params.values, time.perf_counter()
        strict = values["bitwidth_assignment_mode"] == STRICT
        ratio, budgets = values["compression_ratio"], values["budgets"]
        prepared = prepare(
            with_groups(table, quantized.equal_groups) if strict else table,
            Budget.from_json(budgets, "initializer.precision.budgets") if budgets else None,
            alpha=values["alpha"],
            out_of_order=out_of_order,
            further_limits=() if ratio is None else (int8_ratio_limit(table, ratio),),
        )
        if strict:
            prepared = with_equal_bits(prepared)
        return solution_of(prepared, solve_prepared(prepared), begin)

    def _choose(self, quantized: LegacyModel, outcome: Outcome) -> dict[Any, int]:
        """:return: NNCF's quantizer id -> bit width, of every quantizer."""
        quantized.select(outcome.solution.policy.layers)
        chosen = {key: module.active for key, module in quantized.modules.items()}
        chosen |= dict.fromkeys(quantized.dropped, HIGHEST_BITS)  # not used
        for group in quantized.equal:  # strict: what no layer reads follows the others of its group
            chosen.update(dict.fromkeys(group, min(chosen[key] for key in group)))
        return chosen

    def _allowed_by_hardware(self) -> dict[Any, list[int]]:
        """:return: quantizer id -> bit widths that every point of the quantizer may have; empty for any."""
        if not self._hw_precision_constraints:
            return {}
        allowed: dict[Any, set[int]] = {}
        for point, key in self._algo.setup_to_module_id_translation_dict.items():
            widths = {config.num_bits for config in self._possible(point)}
            allowed[key] = allowed.get(key, widths) & widths
        return {key: sorted(widths) for key, widths in allowed.items()}

    def _possible(self, number: int) -> list[Any]:
        """:return: the device's configs of a point that the multi-bit quantizer stands for: all but their bit width."""
        key = self._algo.setup_to_module_id_translation_dict[number]
        native, point = self._algo.all_quantizations[key], self._algo._quantizer_setup.quantization_points[number]
        # NNCF has the list of one point only for quantizers of several, and less than the list for weights
        is_weight = point.is_weight_quantization_point()
        configs = self._hw_precision_constraints.get(key) if is_weight else point.possible_qconfigs
        mode = native.get_quantizer_config().mode
        return [
            config
            for config in configs
            if config.mode == mode and config.per_channel == native.per_channel and config.num_bits <= HIGHEST_BITS
        ]

    def _adjacent(self) -> list[tuple[Any, ...]]:
        """:return: quantizers that feed one operation, by id."""
        return [
            tuple(key for key, _ in (*group.weight_quantizers, *group.activation_quantizers))
            for group in self._algo.groups_of_adjacent_quantizers
        ]

    def _before_additions(self, ops: Sequence[Op], positions: Mapping[Position, Any]) -> tuple[Any, ...]:
        """
        :param ops: the model's operations.
        :param positions: where activation quantizers stand -> their ids.
        :return: quantizers between a weighted layer and an addition, whose rounding OpenVINO's fused kernels lose, by
            id.
        """
        signs = {position: self._algo.all_quantizations[key].signed for position, key in positions.items()}
        found = before_additions(ops, signs)
        kept = {key for position, key in positions.items() if position not in found}  # one may stand in several places
        return tuple(dict.fromkeys(key for position in found if (key := positions[position]) not in kept))

    def _activations_for_openvino(self) -> dict[Position, Any]:
        """
        :return: where activation quantizers stand -> their ids. Where the device has lists of configs, it has kernels
            of its own, and nothing is changed for OpenVINO's: there are none.
        """
        if self._hw_precision_constraints:
            return {}
        points = self._algo._quantizer_setup.quantization_points
        return {
            position_of(points[number].insertion_point): key
            for number, key in self._algo.setup_to_module_id_translation_dict.items()
            if not points[number].is_weight_quantization_point()
        }

    def _without(self, setup: Any, dropped: Sequence[Any]) -> Any:
        """:return: a copy of the setup without the points of some quantizers."""
        setup = copy.deepcopy(setup)
        for number, key in self._algo.setup_to_module_id_translation_dict.items():
            if key in dropped:
                setup.discard(number, keep_shared_input_qps=True)
        return setup

    def _setup(self, chosen: Mapping[Any, int]) -> Any:
        """:return: NNCF's setup with the chosen bit widths; where hardware has a list, with its entries."""
        setup = self._algo.get_quantizer_setup_for_current_state()
        for number, point in setup.quantization_points.items():
            bits = chosen[self._algo.setup_to_module_id_translation_dict[number]]
            if self._hw_precision_constraints:
                point.qconfig = next(config for config in self._possible(number) if config.num_bits == bits)
            else:
                point.qconfig.num_bits = bits
        return setup


class Pairs:
    """
    A ``PTInitializingDataLoader`` as a loader of (input, target).

    :param loader: gives the model's arguments and the target.
    """

    def __init__(self, loader: Any):
        self._loader = loader

    @staticmethod
    def of(loader: Any) -> Any:
        """:return: a loader of (input, target); NNCF's default wrapper is taken off, for its samples to be shuffled."""
        if isinstance(loader, DefaultInitializingDataLoader):
            return loader._data_loader
        return Pairs(loader) if isinstance(loader, PTInitializingDataLoader) else loader

    def __len__(self) -> int:
        """:return: batches."""
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        """
        :return: (input, target) of each batch.
        :raises InputError: if the model is not called with one tensor.
        """
        for item in self._loader:
            args, kwargs = self._loader.get_inputs(item)
            if kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
                msg = (
                    "learned_importance calls the model with one tensor; the data loader's get_inputs gives "
                    f"{len(args)} positional and {len(kwargs)} named arguments. Wrap the model to take one tensor."
                )
                raise InputError(msg)
            yield args[0], self._loader.get_target(item)


def _log_progress(done: int, total: int, numbers: Mapping[str, float]) -> None:
    if done == total or done % max(1, total // 10) == 0:
        nncf_logger.info(f"Joint training: step {done} of {total}, loss {numbers['loss']:.4f}")
