"""Whether a policy, which may have been written by hand, belongs to the model that an importance table describes."""

from __future__ import annotations

from nncf_mpq_plugin.costs import FLOAT_BITS
from nncf_mpq_plugin.errors import InputError
from nncf_mpq_plugin.schema import nearest
from nncf_mpq_plugin.types import ImportanceTable, LayerBits, Policy


def check_policy(table: ImportanceTable, policy: Policy, place: str) -> None:
    """
    :param table: the model's layers and candidate bit widths.
    :param place: how to call the policy in messages.
    :raises InputError: if searchable layers are missing or unknown, a bit width is not among the candidates (nor 32 for
        activations, which leaves them in floating point), layers of one activation group have different activation
        bits, or a fixed layer is given other bits than it has.
    """
    searchable = {layer.cost.name: layer.cost for layer in table.layers}
    fixed = {layer.cost.name: layer.bits for layer in table.fixed_layers}
    missing = [name for name in searchable if name not in policy.layers]
    if missing:
        msg = f"{place}: {_some(missing)} missing. Give bits to every layer that the importance table searches."
        raise InputError(msg)
    for name, bits in {**policy.fixed_layers, **policy.layers}.items():
        if name in searchable:
            _check_candidates(bits, table.bits, f"{place}, layer {name!r}")
        elif name not in fixed:
            close = nearest(name, [*searchable, *fixed])
            msg = f"{place}: the model has no layer {name!r}.{f' Did you mean {close!r}?' if close else ''}"
            raise InputError(msg)
        elif bits != fixed[name]:
            msg = (
                f"{place}: the layer {name!r} is fixed at {fixed[name].weight} weight and {fixed[name].activation} "
                f"activation bits, the policy gives it {bits.weight} and {bits.activation}. Change fixed_bits in the "
                "config to have it otherwise."
            )
            raise InputError(msg)
    readers: dict[str, str] = {}
    for name, cost in searchable.items():
        first = readers.setdefault(cost.activation_group, name)
        if policy.layers[first].activation != policy.layers[name].activation:
            msg = (
                f"{place}: the layers {first!r} and {name!r} read one tensor (activation group "
                f"{cost.activation_group!r}), but have {policy.layers[first].activation} and "
                f"{policy.layers[name].activation} activation bits. Give them one width."
            )
            raise InputError(msg)


def _check_candidates(bits: LayerBits, candidates: tuple[int, ...], place: str) -> None:
    for tensor, value in (("weight", bits.weight), ("activation", bits.activation)):
        if value in candidates or (tensor == "activation" and value == FLOAT_BITS):
            continue
        close = min(candidates, key=lambda candidate: abs(candidate - value))
        also = f" ({FLOAT_BITS} leaves them in floating point)" if tensor == "activation" else ""
        msg = (
            f"{place}: {value} {tensor} bits are not among the candidates {', '.join(map(str, candidates))} that "
            f"were trained{also}. The nearest is {close}."
        )
        raise InputError(msg)


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return f"layer {shown} is" if len(names) == 1 else f"{len(names)} layers ({shown}{', ...' * (len(names) > 3)}) are"
