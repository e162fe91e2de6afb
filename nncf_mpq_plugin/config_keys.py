"""
The keys of the JSON config: :data:`SCHEMA` drives the checks, ``nncf-mpq config schema`` and docs/config.md.

The keys are NNCF's where NNCF has them. The ``compression`` entry is complete in itself; data, training schedules and
deployment stand beside it.
"""

from __future__ import annotations

from typing import Any

from nncf_mpq_plugin.schema import Key, reference

CANDIDATE_BITS = (2, 3, 4, 5, 6, 7, 8)


def _section(doc: str, **keys: Key) -> Key:
    return Key("object", doc, keys=keys)


def _optional_number(doc: str, **limits: Any) -> Key:
    return Key("number", doc, default=None, nullable=True, **limits)


_BUDGETS = _section(
    "Limits that the policy must keep, any mix of them. BitOps are summed over the searchable layers, weight sizes "
    "over all layers.",
    average_bits=Key(
        "object",
        "With both, the BitOps of that uniform policy; with one, the average bits of weights, or of activations "
        "weighted by MACs. Searchable layers.",
        default=None,
        nullable=True,
        keys={
            "weight": _optional_number("Bits of weights.", above=0, maximum=8),
            "activation": _optional_number("Bits of activations.", above=0, maximum=8),
        },
    ),
    bitops=_optional_number("Bit operations of one sample: MACs x weight bits x activation bits.", above=0),
    bitops_ratio=_optional_number("BitOps relative to uniform 8 bits.", above=0, maximum=1),
    compression_ratio=_optional_number("Bits of the FP32 weights / bits of the policy's weights, all layers.", above=0),
    model_size_bytes=_optional_number("Bytes of all quantized weights.", above=0),
    latency_ratio=_optional_number("Latency relative to uniform 8 bits, from a measured table.", above=0),
)

_SHARED_TRAINING = {
    "scale_learning_rate": _optional_number("Learning rate of the scales; null takes `learning_rate`.", above=0),
    "momentum": Key("number", "Of SGD, or Adam's first beta.", default=0.9, minimum=0, maximum=0.9999),
    "nesterov": Key("boolean", "Nesterov momentum (SGD).", default=True),
    "weight_decay": Key(
        "number", "Of weights only, never of scales, biases and batch norm.", default=2.5e-5, minimum=0
    ),
    "gradient_clip": Key("number", "Gradients are clipped to ± this, by element.", default=1.0, above=0, nullable=True),
    "optimizer": Key("string", "The optimizer.", default="sgd", choices=("sgd", "adam")),
    "distillation": Key(
        "number", "Share of the distance to the teacher's outputs in the loss.", default=0.0, minimum=0, maximum=1
    ),
    "label_free": Key("boolean", "Train on that distance alone; labels are not read.", default=False),
}

# names and defaults are those of joint.JointConfig and finetune.FinetuneConfig; tests/test_config.py holds them equal
_JOINT = _section(
    "Joint training: a step runs one pass at each bit width and one at random bits, and sums the gradients.",
    epochs=Key("integer", "Passes over the data used.", default=5, minimum=0),
    data_fraction=Key("number", "Share of the training data that is used.", default=0.5, above=0, maximum=1),
    learning_rate=Key("number", "Start of the cosine.", default=0.01, above=0),
    label_smoothing=Key("number", "Of the cross entropy.", default=0.1, minimum=0, maximum=0.999),
    scale_bit_decay=Key(
        "number",
        "Factor on the scales' learning rate for each bit less than the highest.",
        default=1.0,
        above=0,
        maximum=1,
    ),
    batch_norm=Key(
        "string",
        "Running statistics: one set per bit width, one for all, or the model's own.",
        default="switched",
        choices=("switched", "shared", "frozen"),
    ),
    train_weights=Key("boolean", "false trains scales, biases and batch norm only.", default=True),
    early_stop=_optional_number(
        "End when the mean rank correlation of the learned scales with those a fifth of the training earlier reaches "
        "this, e.g. 0.99; null trains to the end.",
        above=0,
        maximum=1,
    ),
    **_SHARED_TRAINING,
)

_FINE_TUNING = _section(
    "Quantization-aware training at the chosen bits.",
    epochs=Key("integer", "Passes over the data used.", default=10, minimum=0),
    data_fraction=Key("number", "Share of the training data that is used.", default=1.0, above=0, maximum=1),
    learning_rate=Key("number", "Top of the cosine.", default=0.01, above=0),
    warmup_epochs=Key("number", "Epochs of linear rise of the learning rate.", default=0.5, minimum=0),
    label_smoothing=Key("number", "Of the cross entropy.", default=0.0, minimum=0, maximum=0.999),
    batch_norm=Key(
        "string",
        "Running statistics: those of batches at the final weights, those that followed the training, or the model's "
        "own, for data too few or too unlike the model's.",
        default="reestimated",
        choices=("reestimated", "trained", "frozen"),
    ),
    weight_granularity=Key(
        "string", "One weight scale per output channel, or per layer.", default="channel", choices=("channel", "tensor")
    ),
    scale_initialization=Key(
        "string",
        "Start from the scales of joint training, or from the steps with the least squared error.",
        default="trained",
        choices=("trained", "statistics"),
    ),
    calibration_samples=Key("integer", "Samples for `statistics`.", default=256, minimum=1),
    **_SHARED_TRAINING,
)

_PRECISION = _section(
    "How bit widths are found.",
    type=Key("string", "The method.", default="learned_importance", choices=("learned_importance",)),
    bits=Key(
        "list",
        "Candidate bit widths.",
        default=(2, 3, 4, 5, 6),
        item=Key("integer", "A bit width.", choices=CANDIDATE_BITS),
        minimum=1,
        unique=True,
    ),
    fixed_bits=Key(
        "map",
        'Bit widths of layers that are not searched: "first", "last", a layer\'s name or a pattern with * -> bits.',
        default={"first": 8, "last": 8},
        item=Key("integer", "A bit width.", choices=CANDIDATE_BITS),
    ),
    joint_training=_JOINT,
    keep_weights=Key(
        "string",
        "What fine-tuning starts from: the floating-point weights (joint training's compromise between all bit widths "
        "is given up), or the jointly trained ones.",
        default="original",
        choices=("original", "trained"),
    ),
    importance=_section(
        "What the jointly trained model is asked.",
        source=Key(
            "string",
            "`fisher`: gradient-weighted output errors; `loss_change`: the loss with one tensor alone at fewer bits "
            "(slower); `scale`: the learned scales themselves, which is the paper's indicator.",
            default="fisher",
            choices=("fisher", "loss_change", "scale"),
        ),
        samples=Key("integer", "Training samples that `fisher` and `loss_change` look at.", default=256, minimum=1),
    ),
    alpha=Key(
        "number",
        "Weight importance counts alpha times in the objective; null is 2 for `scale` (as published) and 0.25 "
        "for importances in units of loss.",
        default=None,
        nullable=True,
        minimum=0,
    ),
    out_of_order=Key(
        "string",
        "What becomes of an importance that rises with more bits: the choice is banned, replaced by the nearest "
        "falling curve, or kept. The output lists each.",
        default="ban",
        choices=("ban", "isotonic", "keep"),
    ),
    budgets=_BUDGETS,
    search=_section(
        "The program, and what comes after it.",
        constraints=Key(
            "list",
            "Limits on single layers: objects with `layers` (a name or a pattern with *), `tensor` (`weight`, "
            "`activation` or `both`) and `minimum`, `maximum` or `pinned` bits.",
            default=(),
            item=Key(
                "object",
                "A limit.",
                keys={
                    "layers": Key("string", "A layer's name, or a pattern with *."),
                    "tensor": Key(
                        "string",
                        "What is limited.",
                        default="both",
                        choices=("weight", "activation", "both"),
                    ),
                    **{
                        name: Key("integer", text, default=None, nullable=True, choices=CANDIDATE_BITS)
                        for name, text in (
                            ("minimum", "Smallest bit width."),
                            ("maximum", "Largest bit width."),
                            ("pinned", "The bit width."),
                        )
                    },
                },
            ),
        ),
        latency_table=Key(
            "string",
            "File with measured times of the layers, for the budget `latency_ratio`; relative to the config.",
            default=None,
            nullable=True,
        ),
        gap=Key("number", "Relative gap to the optimum at which the search may stop.", default=1e-9, minimum=0),
        time_limit=_optional_number("Seconds after which the best policy found so far is taken.", above=0),
        refine=_section(
            "Measure policies in the jointly trained model: begin with the best of several (other alphas, the learned "
            "scales), then swap bits between tensors as long as the loss falls.",
            evaluations=Key(
                "integer", "Policies to measure at most; 0 takes the program's answer.", default=0, minimum=0
            ),
            seconds=_optional_number("Time after which no further policy is measured (not repeatable).", above=0),
            samples=Key("integer", "Training samples that the loss is measured on.", default=1024, minimum=1),
        ),
    ),
    seed=Key("integer", "Seed of everything random in the run.", default=0, minimum=0, maximum=2**32 - 1),
)

SCHEMA = _section(
    "A run: model, data, what to compress and how to deploy it.",
    model=Key("string", "`torchvision:NAME` or `package.module:callable` that returns a model."),
    model_arguments=Key("free", "Keyword arguments for the callable, e.g. `num_classes`.", default={}),
    checkpoint=Key(
        "string",
        "File with the floating-point weights (`.safetensors`, or a state dict read by `torch.load` with "
        "`weights_only=True`), relative to the config. The model is not trained in floating point then.",
        default=None,
        nullable=True,
    ),
    input_info=_section(
        "The model's input.",
        sample_size=Key(
            "list",
            "Shape of one batch of one sample, e.g. [1, 3, 224, 224].",
            item=Key("integer", "A dimension.", minimum=1),
            minimum=2,
        ),
    ),
    data=_section(
        "Training and validation data.",
        source=Key(
            "string",
            "`digits` (scikit-learn's, upscaled to the input), `imagefolder:DIR` (with `train/` and `val/`), or "
            "`package.module:callable` that returns a pair of loaders.",
            default="digits",
        ),
        arguments=Key("free", "Keyword arguments for the callable.", default={}),
        batch_size=Key("integer", "Samples in a step, over all processes.", default=64, minimum=1),
        workers=Key("integer", "Processes that read images (imagefolder).", default=0, minimum=0, maximum=256),
    ),
    training=_section(
        "Training of the floating-point model, where it has no checkpoint.",
        epochs=Key(
            "integer", "Passes over the data; 0 takes the model as its callable returns it.", default=0, minimum=0
        ),
        learning_rate=Key("number", "Top of the cosine.", default=0.1, above=0),
        warmup_epochs=Key("number", "Epochs of linear rise of the learning rate.", default=1.0, minimum=0),
        weight_decay=Key("number", "Of weights only.", default=5e-4, minimum=0),
        label_smoothing=Key("number", "Of the cross entropy.", default=0.0, minimum=0, maximum=0.999),
    ),
    compression=_section(
        "What NNCF knows as the compression algorithm.",
        algorithm=Key("string", "The algorithm.", default="quantization", choices=("quantization",)),
        ignored_scopes=Key(
            "list",
            "Layers to keep in floating point: names, patterns with *, or NNCF's `{re}` expressions.",
            default=(),
            item=Key("string", "A scope."),
        ),
        initializer=_section(
            "What happens before fine-tuning.",
            range=_section(
                "Start values of the scales.",
                num_init_samples=Key(
                    "integer", "Training samples that the statistics come from.", default=256, minimum=1
                ),
            ),
            precision=_PRECISION,
        ),
    ),
    fine_tuning=_FINE_TUNING,
    uniform_baseline=Key(
        "boolean",
        "Also measure what to compare with: the best uniform policy within the same budget, fine-tuned alike, and "
        "NNCF's post-training quantization to INT8.",
        default=True,
    ),
    deploy=_section(
        "Export and its check.",
        target=Key(
            "string",
            "Runtime that the quantizers are placed for.",
            default="openvino",
            choices=("openvino", "onnxruntime"),
        ),
        verify_samples=Key(
            "integer", "Validation samples in the comparison of the exported model.", default=64, minimum=1
        ),
    ),
    device=Key(
        "string",
        "Where to train: `auto` takes CUDA where there is one.",
        default="auto",
        choices=("auto", "cpu", "cuda"),
    ),
)


def reference_page() -> str:
    """:return: docs/config.md."""
    head = """# Config reference

One JSON file describes a run. Unknown keys are errors; a key that is left out has its default. This page is generated
(`nncf-mpq config docs`); `nncf-mpq config schema` prints the same as JSON Schema, and `nncf-mpq config check FILE`
checks a file.
"""
    return f"{head}\n{reference(SCHEMA)}"
