"""
The stages in order, from a config to verified deployable files.

Each stage reads files of the run folder and writes files into it; nothing else passes between stages. So each can be
run alone, and a run that was stopped goes on where it was.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nncf_mpq_plugin import distributed
from nncf_mpq_plugin.adapters.nncf3 import (
    NNCFQuantizedModel,
    freeze,
    load_model,
    place,
    quantize_to_int8,
    save_model,
)
from nncf_mpq_plugin.allocation import BitsConstraint, prepare, search
from nncf_mpq_plugin.batches import Batches, split_batch
from nncf_mpq_plugin.checkpoint import load_state, model_tensors, restore_tensors, save_state
from nncf_mpq_plugin.comparison import uniform
from nncf_mpq_plugin.config import Config
from nncf_mpq_plugin.costs import LatencyTable, limits_of
from nncf_mpq_plugin.data import Data, check_data, check_inputs, load_data
from nncf_mpq_plugin.errors import InfeasibleBudgetError, InputError
from nncf_mpq_plugin.finetune import FinetuneConfig, finetune, with_fine_tuned_granularity
from nncf_mpq_plugin.floating import FloatConfig, train_float
from nncf_mpq_plugin.importance import importance_from_scales
from nncf_mpq_plugin.joint import JointConfig, JointResult, train_jointly
from nncf_mpq_plugin.loop import History
from nncf_mpq_plugin.models import build_model, check_model, load_weights
from nncf_mpq_plugin.placement import QuantizedModel
from nncf_mpq_plugin.policies import check_policy
from nncf_mpq_plugin.refine import JointLoss, Refinement, refine
from nncf_mpq_plugin.runfolder import RunFolder
from nncf_mpq_plugin.sensitivity import fisher_importance, loss_change_importance
from nncf_mpq_plugin.stability import stability
from nncf_mpq_plugin.summary import summarize
from nncf_mpq_plugin.training import Evaluation, LossFunction, evaluate, set_weights, to_device, weights_of
from nncf_mpq_plugin.types import Budget, ImportanceTable, Policy, read_json, write_json

if TYPE_CHECKING:
    from nncf_mpq_plugin.deploy.verification import VerifyReport

FLOAT_MODEL, FLOAT_METRICS = "float/model.safetensors", "float/metrics.json"
JOINT_MODEL, JOINT_HISTORY = "joint/model.safetensors", "joint/history.json"
JOINT_SCALES = "joint/scales.json"
IMPORTANCE, POLICY, UNIFORM_POLICY = "importance.json", "policy.json", "uniform_policy.json"
MODEL, MODEL_CONFIG, MODEL_METRICS = "model/model.safetensors", "model/nncf_config.json", "model/metrics.json"
UNIFORM_METRICS, INT8_METRICS = "uniform/metrics.json", "int8/metrics.json"
ONNX, IR, IR_WEIGHTS = "deploy/model.onnx", "deploy/model.xml", "deploy/model.bin"
VERIFICATION, SUMMARY = "verify.json", "summary.json"
MODEL_HISTORY, UNIFORM_HISTORY = "model/history.json", "uniform/history.json"
BENCHMARK, REPORT = "benchmark.json", "report.html"
SCALE_ALPHAS = (0.5, 1.0, 2.0)  # of the learned scales, among what a refinement may begin with


@dataclass(frozen=True)
class Listener:
    """
    Who wants to know how a run goes.

    :param log: called with a line of text.
    :param progress: called with the stage, steps done, steps in all and the latest numbers.
    """

    log: Callable[[str], None] = lambda text: None
    progress: Callable[[str, int, int, Mapping[str, float]], None] = lambda stage, done, total, numbers: None


@dataclass(frozen=True)
class Sources:
    """
    What a run works on.

    :param build: makes the model anew, with the same initial weights each time.
    :param load_data: makes the loaders.
    :param loss: (output, target) -> loss; None for cross entropy.
    :param classification: whether targets are class numbers, which are checked against the model's outputs.
    """

    build: Callable[[], nn.Module]
    load_data: Callable[[], Data]
    loss: LossFunction | None = None
    classification: bool = True


def sources_of(config: Config, *, allow_code: bool = False) -> Sources:
    """
    What a config names.

    :param allow_code: whether callables outside torchvision and this package may be imported.
    :raises InputError: if the run was made by :func:`nncf_mpq_plugin.quantize`, whose model is in no file.
    """
    if config.model.startswith("python:"):
        msg = "This run was begun from Python with a model of its own; go on with the same quantize(...) call there."
        raise InputError(msg)

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return build_model(config.model, config.model_arguments, allow_code=allow_code)

    def load() -> Data:
        data = config.data
        return load_data(
            data.source,
            config.sample_size,
            batch_size=data.batch_size,
            workers=data.workers,
            arguments=data.arguments,
            allow_code=allow_code,
        )

    return Sources(build, load)


@dataclass
class Pipeline:
    """
    A run: a folder, what it works on, and who listens.

    :param folder: the run's folder.
    :param sources: the model, the data and the loss.
    :param listener: gets log lines and progress.
    """

    folder: RunFolder
    sources: Sources
    listener: Listener = field(default_factory=Listener)

    def run(self) -> dict[str, Any]:
        """
        Run every stage that is not done.

        :return: the summary, as in summary.json.
        :raises MPQError: as the stages do. What was done stays, and the next call goes on from there.
        """
        for name in STAGES:
            self.run_stage(name)
        summary: dict[str, Any] = read_json(self.folder.file(SUMMARY))
        return summary

    def run_stage(self, name: str) -> bool:
        """
        Run one stage on the saved outputs of those before it.

        :param name: a key of :data:`STAGES`.
        :return: False if it was done already on the same inputs.
        :raises InputError: if an output of an earlier stage is missing.
        """
        stage = STAGES[name]
        inputs = distributed.on_main(lambda: self._begin(name))
        if inputs is None:
            return False
        begin = time.perf_counter()
        if stage.shared:
            stage.function(self)
        else:
            distributed.on_main(lambda: stage.function(self))
        distributed.on_main(lambda: self.folder.finish(name, [*inputs, *stage.final]))
        self._log(f"{stage.title}: done in {time.perf_counter() - begin:.1f} s")
        return True

    def _begin(self, name: str) -> list[str] | None:
        """:return: the files that the stage reads; None if there is nothing to do."""
        stage = STAGES[name]
        if not stage.wanted(self.folder):
            return None
        inputs = [*stage.inputs, *(extra for extra in stage.optional if self.folder.file(extra).exists())]
        if self.folder.is_done(name, [*inputs, *stage.final], stage.outputs):
            self._log(f"{stage.title}: done already")
            return None
        missing = next((file for file in inputs if not self.folder.file(file).exists()), "")
        maker = next((other for other, made in STAGES.items() if missing in made.outputs), name)
        hint = f"Run that stage first: nncf-mpq {STAGES[maker].command} {self.folder.path}"
        self.folder.begin(name, inputs, needed_by=hint)
        self._log(f"{stage.title} ...")
        return inputs

    @cached_property
    def device(self) -> torch.device:
        """Where training runs."""
        name = self.folder.config.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda" and not torch.cuda.is_available():
            msg = "device: 'cuda' is asked for, but torch finds no CUDA device. Use 'auto' or 'cpu'."
            raise InputError(msg)
        return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)

    @cached_property
    def data(self) -> Data:
        """The loaders, checked once against the model."""
        data = self.sources.load_data()
        size = self.folder.config.sample_size
        outputs = check_model(self.sources.build(), torch.zeros(2, *size[1:]))
        if self.sources.classification:
            check_data(data, size, outputs)
        return data

    def example_input(self) -> Tensor:
        """:return: one sample of the model's input, ``[1, ...]``."""
        inputs, _ = split_batch(next(iter(self.data.validation)))
        return inputs[:1]

    def float_model(self) -> nn.Module:
        """:return: the floating-point model of the first stage, in evaluation mode, on the CPU."""
        model = self.sources.build().eval()
        load_weights(model, self.folder.file(FLOAT_MODEL))
        return model

    def frozen_model(self) -> nn.Module:
        """:return: the deployable mixed-precision model, with NNCF's own quantizers."""
        return load_model(self.folder.file("model"), self.sources.build())

    def train_float(self) -> None:
        """Load or train the floating-point model."""
        config = self.folder.config
        model = self.sources.build()
        if config.checkpoint is not None:
            load_weights(model, config.checkpoint)
        elif config.training["epochs"]:
            train_float(
                model,
                self.data.train,
                FloatConfig(**config.training, seed=config.seed),
                loss_fn=self.sources.loss,
                **self._training_arguments("float"),
            )

        def keep() -> None:
            metrics = self._evaluate(model)
            save_state(self.folder.file(FLOAT_MODEL), model.state_dict(), {})
            write_json(self.folder.file(FLOAT_METRICS), metrics)

        distributed.on_main(keep)

    def train_importance(self) -> None:
        """Place quantizers, train one scale per bit width, and write the importance table."""
        config = self.folder.config
        quantized = self._place()
        floating = quantized.floating_parameters
        if floating:
            self._log(f"  Kept in floating point, and not counted in sizes and BitOps: {', '.join(floating)}")
        # a budget that no policy can meet fails here, before the training; which policy is best does not matter yet
        program = {**self._program(), "out_of_order": "keep"}
        search(
            importance_from_scales(quantized), config.budget, **program, gap=config.gap, time_limit=config.time_limit
        )
        result = train_jointly(
            quantized,
            self.data.train,
            JointConfig(**config.joint_training, seed=config.seed),
            loss_fn=self.sources.loss,
            **self._training_arguments("importance"),
        )

        def keep() -> None:
            scales = importance_from_scales(quantized, config.model, f"joint training, {result.steps} steps")
            table = scales if config.importance["source"] == "scale" else self._measured_importance(quantized)
            save_state(self.folder.file(JOINT_MODEL), model_tensors(quantized.model), {})
            write_json(self.folder.file(JOINT_HISTORY), result.to_json())
            self._report_stability(result)
            scales.save(self.folder.file(JOINT_SCALES))
            table.save(self.folder.file(IMPORTANCE))

        distributed.on_main(keep)

    def _report_stability(self, result: JointResult) -> None:
        if not result.steps:
            return
        report = stability(result.history.steps, result.history.scales, result.steps_per_epoch)
        early = f"; {report.first_epoch.mean:.2f} after the first epoch" if report.first_epoch else ""
        self._log(
            "  Rank correlation of the learned scales with their final order: at least 0.95 from step "
            f"{report.settled_at} of {result.steps} on{early}; "
            f"{len(report.out_of_order)} of {report.indicators} out of order"
        )

    def search(self) -> None:
        """Find the policy, and the uniform one to compare it with."""
        config = self.folder.config
        table = ImportanceTable.load(self.folder.file(IMPORTANCE))
        program = self._program()
        if config.refine["evaluations"]:
            solution = self.refined(table, program, **config.refine).solution
        else:
            solution = search(table, config.budget, **program, gap=config.gap, time_limit=config.time_limit)
        self.folder.file(UNIFORM_POLICY).unlink(missing_ok=True)
        try:
            uniform(table, config.budget, program["latency"]).save(self.folder.file(UNIFORM_POLICY))
        except InfeasibleBudgetError as error:
            self._log(f"  There is no uniform policy to compare with: {error}")
        for correction in solution.corrections:
            became = "left out" if correction.used is None else f"replaced by {correction.used:.4g}"
            self._log(
                f"  {correction.layer}: {correction.tensor} importance at {correction.bits} bits "
                f"({correction.importance:.4g}) is above that of fewer bits: {became}"
            )
        solution.policy.save(self.folder.file(POLICY))

    def _program(self) -> dict[str, Any]:
        """:return: the config's arguments of :func:`nncf_mpq_plugin.allocation.search.prepare`."""
        config = self.folder.config
        return {
            "alpha": config.alpha,
            "out_of_order": config.out_of_order,
            "constraints": tuple(BitsConstraint(**limits) for limits in config.constraints),
            "latency": None if config.latency_table is None else LatencyTable.load(config.latency_table),
        }

    def refined(
        self,
        table: ImportanceTable,
        program: Mapping[str, Any],
        *,
        evaluations: int | None,
        seconds: float | None,
        samples: int,
        budget: Budget | None = None,
    ) -> Refinement:
        """
        Measure policies in the jointly trained model, see :mod:`nncf_mpq_plugin.refine`.

        The loss is measured on training samples that joint training has not seen, where its ``data_fraction`` leaves
        any out. Batch-norm statistics are estimated for each policy, unless fine-tuning keeps the model's.

        :param program: arguments of :func:`nncf_mpq_plugin.allocation.search.prepare`.
        :param budget: default: the config's.
        """
        config = self.folder.config
        budget = budget or config.budget
        quantized = self._joint_model()
        quantized.model.to(self.device)
        fraction = config.joint_training["data_fraction"]
        seen = Batches(self.data.train, seed=config.seed, fraction=fraction).take(config.num_init_samples)
        judges = Batches(self.data.train, seed=config.seed, fraction=fraction, held_back=True).take(samples)
        frozen = config.fine_tuning["batch_norm"] == "frozen"
        measure = JointLoss(
            self._as_fine_tuned(quantized, seen[0][0]),
            [] if frozen else [inputs for inputs, _ in to_device(seen, self.device)],
            to_device(judges, self.device),
            self.sources.loss,
            config.joint_training["label_free"],
        )
        scales = ImportanceTable.load(self.folder.file(JOINT_SCALES))
        candidates = {
            f"scale, alpha {other:g}": search(scales, budget, **{**program, "alpha": other}).policy.layers
            for other in SCALE_ALPHAS
        }
        refinement = refine(
            prepare(table, budget, **program),
            measure,
            candidates=candidates,
            evaluations=evaluations,
            seconds=seconds,
            progress=lambda done, total, numbers: self.listener.progress("refinement", done, total, numbers),
        )
        self._log(
            f"  Of {', '.join(f'{name} {loss:.4f}' for name, loss in refinement.losses.items())} began with "
            f"{refinement.start!r}; {len(refinement.swaps)} swaps in {refinement.evaluations} measurements lowered the "
            f"loss to {refinement.loss:.4f}"
        )
        for swap in refinement.swaps:
            moves = ", ".join(f"{tensor} {before} -> {after} bits" for tensor, (before, after) in swap.moves.items())
            self._log(f"  {moves}: loss {swap.loss:.4f}")
        return refinement

    def check_policy(self, policy: Policy, place: str) -> None:
        """:raises InputError: if ``policy`` (called ``place`` in messages) does not belong to this run's model."""
        check_policy(ImportanceTable.load(self.folder.file(IMPORTANCE)), policy, place)

    def finetune(self) -> None:
        """Fine-tune at the policy's bits and freeze."""
        frozen, history = self._finetuned(POLICY, "finetune")

        def keep() -> None:
            metrics = self._evaluate(frozen)
            save_model(self.folder.file("model"), frozen)
            write_json(self.folder.file(MODEL_HISTORY), history.to_json())
            write_json(self.folder.file(MODEL_METRICS), metrics)

        distributed.on_main(keep)

    def finetune_uniform(self) -> None:
        """Fine-tune the uniform policy of the same budget under the same schedule, for comparison."""
        frozen, history = self._finetuned(UNIFORM_POLICY, "uniform")

        def keep() -> None:
            write_json(self.folder.file(UNIFORM_HISTORY), history.to_json())
            write_json(self.folder.file(UNIFORM_METRICS), self._evaluate(frozen))

        distributed.on_main(keep)

    def measure_int8(self) -> None:
        """Quantize to 8 bits as NNCF does after training, for comparison."""
        quantized = quantize_to_int8(self.float_model(), self.calibration(), self.folder.config.ignored_scopes)
        write_json(self.folder.file(INT8_METRICS), self._evaluate(quantized))

    def export(self) -> None:
        """Write the deployable files."""
        from nncf_mpq_plugin.deploy import export

        export(self.frozen_model(), self.example_input(), self.folder.file("deploy"))

    def verify(self) -> None:
        """
        Compare the deployable files with the torch model on validation samples.

        :raises VerificationError: if they disagree; verify.json says by how much.
        """
        report = self.agreement(self.folder.file("deploy"))
        write_json(self.folder.file(VERIFICATION), report.to_json())
        report.check(export=f"nncf-mpq export {self.folder.path}")

    def agreement(self, exported: str | Path) -> VerifyReport:
        """
        Compare an exported file, or a folder of them, with the torch model on validation samples.

        :param exported: ``.xml``, ``.onnx``, or a folder with ``model.xml`` and ``model.onnx``.
        """
        from nncf_mpq_plugin.deploy import verify

        samples = (split_batch(batch)[0] for batch in self.data.validation)
        config = self.folder.config
        return verify(self.frozen_model(), exported, samples, config.verify_samples, config.target)

    def summarize(self) -> None:
        """Write summary.json."""
        metrics = {"float": FLOAT_METRICS, "int8": INT8_METRICS, "uniform": UNIFORM_METRICS, "mixed": MODEL_METRICS}
        uniform_policy = self.folder.file(UNIFORM_POLICY)
        table = ImportanceTable.load(self.folder.file(IMPORTANCE))
        summary = summarize(
            table,
            Policy.load(self.folder.file(POLICY)),
            Policy.load(uniform_policy) if uniform_policy.exists() else None,
            {
                name: read_json(self.folder.file(file))
                for name, file in metrics.items()
                if self.folder.file(file).exists()
            },
            read_json(self.folder.file(VERIFICATION)),
            limits_of(table, self.folder.config.budget, self._program()["latency"]),
        )
        write_json(self.folder.file(SUMMARY), summary)

    def report(self) -> None:
        """Write report.html."""
        from nncf_mpq_plugin.report import write_report

        write_report(self.folder.path)

    def calibration(self) -> list[Tensor]:
        """:return: batches of training inputs that ranges come from, ``range.num_init_samples`` samples in all."""
        config = self.folder.config
        taken = Batches(self.data.train, seed=config.seed).take(config.num_init_samples)
        if self.sources.classification:
            for inputs, _ in taken:
                check_inputs(inputs, config.sample_size, "training data")
        return [inputs[: config.num_init_samples] for inputs, _ in taken]

    def _place(self) -> NNCFQuantizedModel:
        config = self.folder.config
        return place(
            self.float_model(),
            self.example_input(),
            self.calibration(),
            bits=config.bits,
            fixed_bits=config.fixed_bits,
            ignored_scopes=config.ignored_scopes,
            target=config.target,
        )

    def _measured_importance(self, quantized: NNCFQuantizedModel) -> ImportanceTable:
        config = self.folder.config
        measure = fisher_importance if config.importance["source"] == "fisher" else loss_change_importance
        batches = Batches(self.data.train, seed=config.seed).take(config.importance["samples"])
        return measure(
            self._as_fine_tuned(quantized, batches[0][0]),
            batches,
            loss_fn=self.sources.loss,
            label_free=config.joint_training["label_free"],
            device=self.device,
            progress=lambda done, total, numbers: self.listener.progress("measurement", done, total, numbers),
            model_name=config.model,
        )

    def _as_fine_tuned(self, quantized: NNCFQuantizedModel, inputs: Any) -> QuantizedModel:
        granularity = self.folder.config.fine_tuning["weight_granularity"]
        return with_fine_tuned_granularity(quantized, [inputs], granularity)

    def _joint_model(self, weights: str = "trained") -> NNCFQuantizedModel:
        """:return: the jointly trained model, with the ``trained`` or the ``original`` weights."""
        quantized = self._place()
        original = weights_of(quantized.model)
        restore_tensors(quantized.model, load_state(self.folder.file(JOINT_MODEL))[0])
        if weights == "original":
            set_weights(quantized.model, original)
        return quantized

    def _finetuned(self, name: str, stage: str) -> tuple[nn.Module, History]:
        config = self.folder.config
        policy = Policy.load(self.folder.file(name))
        self.check_policy(policy, str(self.folder.file(name)))
        quantized = self._joint_model(config.keep_weights)
        result = finetune(
            quantized,
            policy,
            self.data.train,
            FinetuneConfig(**config.fine_tuning, seed=config.seed),
            loss_fn=self.sources.loss,
            **self._training_arguments(stage),
        )
        quantized.model.cpu()
        return freeze(quantized), result.history

    def _training_arguments(self, stage: str) -> dict[str, Any]:
        return {
            "state_dir": self.folder.state(stage),
            "device": self.device,
            "progress": lambda done, total, numbers: self.listener.progress(stage, done, total, numbers),
        }

    def _evaluate(self, model: nn.Module) -> dict[str, Any]:
        result: Evaluation = evaluate(
            model.to(self.device), self.data.validation, self.device, loss_fn=self.sources.loss
        )
        model.cpu()
        if not math.isfinite(result.loss):
            msg = (
                f"The loss on the validation data is {result.loss}: the model's weights (or checkpoint), an input or "
                "the loss function give NaN or an infinity. Look for them there."
            )
            raise InputError(msg)
        return {"accuracy": result.accuracy, "loss": result.loss, "samples": result.samples}

    def _log(self, text: str) -> None:
        if distributed.is_main():
            self.folder.log(text)
            self.listener.log(text)


@dataclass(frozen=True)
class Stage:
    """
    :param title: for people.
    :param command: the command that runs it.
    :param inputs: files of the run folder that it reads.
    :param outputs: files that it writes.
    :param optional: files that it reads where they exist.
    :param wanted: whether the config asks for it.
    :param final: outputs that nobody edits; one that is not as the stage left it is made again.
    :param shared: all processes that torchrun has started take part; otherwise the first one does it alone.
    """

    title: str
    command: str
    function: Callable[[Pipeline], None]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    optional: tuple[str, ...] = ()
    wanted: Callable[[RunFolder], bool] = lambda folder: True
    final: tuple[str, ...] = ()
    shared: bool = False


STAGES: Mapping[str, Stage] = {
    "float": Stage("Floating-point model", "run", Pipeline.train_float, (), (FLOAT_MODEL, FLOAT_METRICS), shared=True),
    "importance": Stage(
        "Joint training and importance",
        "train-importance",
        Pipeline.train_importance,
        (FLOAT_MODEL,),
        (JOINT_MODEL, JOINT_HISTORY, JOINT_SCALES, IMPORTANCE),
        shared=True,
    ),
    "search": Stage(
        "Search", "search", Pipeline.search, (IMPORTANCE,), (POLICY,), optional=(JOINT_MODEL, JOINT_SCALES)
    ),
    "finetune": Stage(
        "Fine-tuning",
        "finetune",
        Pipeline.finetune,
        (FLOAT_MODEL, JOINT_MODEL, POLICY),
        (MODEL, MODEL_CONFIG, MODEL_METRICS, MODEL_HISTORY),
        shared=True,
    ),
    "uniform": Stage(
        "Fine-tuning of the uniform policy",
        "finetune",
        Pipeline.finetune_uniform,
        (FLOAT_MODEL, JOINT_MODEL, UNIFORM_POLICY),
        (UNIFORM_METRICS, UNIFORM_HISTORY),
        wanted=lambda folder: folder.config.uniform_baseline and folder.file(UNIFORM_POLICY).exists(),
        shared=True,
    ),
    "int8": Stage(
        "Post-training quantization to INT8",
        "run",
        Pipeline.measure_int8,
        (FLOAT_MODEL,),
        (INT8_METRICS,),
        wanted=lambda folder: folder.config.uniform_baseline,
    ),
    "export": Stage(
        "Export",
        "export",
        Pipeline.export,
        (MODEL, MODEL_CONFIG),
        (ONNX, IR, IR_WEIGHTS),
        final=(ONNX, IR, IR_WEIGHTS),
    ),
    "verify": Stage(
        "Verification", "verify", Pipeline.verify, (MODEL, MODEL_CONFIG, ONNX, IR, IR_WEIGHTS), (VERIFICATION,)
    ),
    "summary": Stage(
        "Summary",
        "run",
        Pipeline.summarize,
        (IMPORTANCE, POLICY, FLOAT_METRICS, MODEL_METRICS, VERIFICATION),
        (SUMMARY,),
        optional=(INT8_METRICS, UNIFORM_METRICS, UNIFORM_POLICY),
    ),
    "report": Stage(
        "Report",
        "report",
        Pipeline.report,
        (IMPORTANCE, POLICY, SUMMARY),
        (REPORT,),
        optional=(UNIFORM_POLICY, JOINT_HISTORY, MODEL_HISTORY, UNIFORM_HISTORY, BENCHMARK),
    ),
}
