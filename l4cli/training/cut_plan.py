"""What of a teacher becomes a student's first weights, decided and checked by configs alone.

in: the shapes of both, which layers to keep and how experts become fewer; out: a `CutPlan`
source: layers kept evenly over the depth as in DistilBERT, arXiv 1910.01108

Refused is what would not be the teacher's any more: heads of another size turn by other angles,
and a student that is larger in anything has nothing to be cut from. A vocabulary may be larger
(it is rounded up), and a dense layer may be wider than the experts it takes the place of: what is
more keeps its random start.

Experts are dropped unless merging is asked for: those of a teacher trained from scratch have
nothing in common that an average would keep. (Held-out loss of four made two: 1.49 dropped, 1.53
merged; made dense 1.53 and 1.54.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from l4cli.errors import UsageError
from l4cli.model import Llama4Config, TextConfig

MERGE, DROP = "merge", "drop"
_WHAT = "cannot cut the student from the teacher"
_ELSE = "or leave `--init-from-teacher` out"


@dataclass(frozen=True)
class CutOptions:
    """What a user may choose of a cut."""

    layers: tuple[int, ...] | None = None  # of the teacher, one a layer of the student, rising
    experts: str = DROP  # how experts become fewer, or a dense layer


@dataclass(frozen=True)
class CutPlan:
    """A cut that is possible."""

    teacher: Llama4Config
    student: Llama4Config
    layers: tuple[int, ...]  # the teacher's, by the student's
    experts: str

    def report(self) -> list[str]:
        """What is cut, in lines for people."""
        teacher, student = self.teacher.text, self.student.text
        kept = ", ".join(f"{i} <- {source}" for i, source in enumerate(self.layers))
        lines = [f"layers {len(self.layers)} of {teacher.num_hidden_layers}: {kept}"]
        lines += _width_lines(teacher, student)
        lines += self._feed_forward_lines()
        if self.teacher.vision is not None:
            lines.append("vision " + ("dropped" if self.student.vision is None else "copied"))
        if student.vocab_size > teacher.vocab_size:
            count = student.vocab_size - teacher.vocab_size
            lines.append(f"vocabulary: {count} rows keep their random start")
        return lines + _differences(teacher, student, self.layers)

    def _feed_forward_lines(self) -> list[str]:
        teacher, student = self.teacher.text, self.student.text
        kinds = {(teacher.is_moe(s), student.is_moe(i)) for i, s in enumerate(self.layers)}
        lines = []
        if (True, True) in kinds:
            theirs, ours = teacher.num_local_experts, student.num_local_experts
            verb = "merged" if self.experts == MERGE else "dropped"
            lines += [f"experts {theirs} -> {ours} {verb}"] * (theirs != ours)
            lines += _cut_line("expert width", teacher, student, "intermediate_size")
        if (False, False) in kinds:
            lines += _cut_line("dense width", teacher, student, "intermediate_size_mlp")
        if (True, False) in kinds:
            width = student.intermediate_size_mlp
            routed = "their average" if self.experts == MERGE else "the strongest routed neurons"
            line = f"experts -> dense width {width}: the shared expert, then {routed}"
            spare = width - available_neurons(teacher, self.experts)
            lines.append(line + f", then {spare} neurons that start silent" * (spare > 0))
        return lines


def _cut_line(what: str, teacher: TextConfig, student: TextConfig, name: str) -> list[str]:
    ours, theirs = getattr(student, name), getattr(teacher, name)
    return [f"{what} {ours} of {theirs} by importance"] if ours != theirs else []


def available_neurons(teacher: TextConfig, experts: str) -> int:
    """How many neurons of a sparse layer a dense one can take."""
    copies = 1 if experts == MERGE else teacher.num_local_experts
    return teacher.intermediate_size * (1 + copies)


def plan_cut(teacher: Llama4Config, student: Llama4Config, options: CutOptions) -> CutPlan:
    """Choose the layers, and refuse what cannot be cut before any weight is read.

    raises: UsageError naming the size, or the layers
    """
    if options.experts not in (MERGE, DROP):
        why = f"`{options.experts}` is no way to have fewer experts"
        raise UsageError(_WHAT, why=why, fix=f"choose from `{MERGE}`, `{DROP}`")
    _check_sizes(teacher.text, student.text)
    _check_vision(teacher, student)
    if options.layers is None:
        layers = _choose_layers(teacher.text, student.text)
    else:
        layers = tuple(options.layers)
        _check_layers(teacher.text, student.text, layers)
    _check_feed_forwards(teacher.text, student.text, layers)
    return CutPlan(teacher, student, layers, options.experts)


def with_layers(teacher: Llama4Config, layers: Sequence[int]) -> Llama4Config:
    """The teacher's shape with some of its layers alone, each of the kind it is."""
    text = teacher.text
    return dataclasses.replace(
        teacher,
        text=dataclasses.replace(
            text,
            num_hidden_layers=len(layers),
            no_rope_layers=[int(text.uses_rope(layer)) for layer in layers],
            moe_layers=[i for i, layer in enumerate(layers) if text.is_moe(layer)],
            layer_types=[text.layer_types[layer] for layer in layers] if text.layer_types else None,
        ),
    )


def _refuse(why: str, fix: str) -> UsageError:
    return UsageError(_WHAT, why=why, fix=f"{fix}, {_ELSE}")


def _require_smaller(teacher: TextConfig, student: TextConfig, name: str) -> None:
    ours, theirs = getattr(student, name), getattr(teacher, name)
    if ours > theirs:
        why = f"the student's `{name}` is {ours}, the teacher has only {theirs}"
        raise _refuse(why, f"give the student `{name}` {theirs} or less")


def _check_sizes(teacher: TextConfig, student: TextConfig) -> None:
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")
    for name in names:
        _require_smaller(teacher, student, name)
    if student.head_dim != teacher.head_dim:
        why = f"the student's `head_dim` is {student.head_dim}, the teacher's {teacher.head_dim}, "
        why += "and the channels of a head turn by angles of their own"
        raise _refuse(why, f"give the student `head_dim` {teacher.head_dim}")
    ours, theirs = _heads_per_group(student), _heads_per_group(teacher)
    if ours > theirs:
        why = f"the student has {ours} query heads to a key/value head, the teacher only {theirs}"
        heads = theirs * student.num_key_value_heads
        raise _refuse(why, f"give the student `num_attention_heads` {heads} or less")


def _heads_per_group(text: TextConfig) -> int:
    return text.num_attention_heads // text.num_key_value_heads


def _check_vision(teacher: Llama4Config, student: Llama4Config) -> None:
    if student.vision is None:
        return
    fix = "give the student no vision (`vision_config=null`)"
    if teacher.vision is None:
        raise _refuse("the student sees pictures, and the teacher does not", fix)
    ours, theirs = dataclasses.asdict(student.vision), dataclasses.asdict(teacher.vision)
    for name, value in ours.items():
        if value != theirs[name]:
            why = f"the student's vision has `{name}` {value}, the teacher's {theirs[name]}, "
            raise _refuse(why + "and vision is copied whole", f"make them equal, {fix}")


def _check_layers(teacher: TextConfig, student: TextConfig, layers: tuple[int, ...]) -> None:
    last = teacher.num_hidden_layers - 1
    shown = ",".join(map(str, layers))
    if len(layers) != student.num_hidden_layers:
        why = f"{len(layers)} layers are named (`{shown}`), the student has "
        why += f"{student.num_hidden_layers}"
        raise _refuse(why, "name one for each layer of the student")
    outside = [i for i in layers if not 0 <= i <= last]
    if outside:
        raise _refuse(f"layer {outside[0]} is none of the teacher's", f"name layers of 0 to {last}")
    if any(after <= before for before, after in pairwise(layers)):
        raise _refuse(f"the layers `{shown}` do not rise", "name each layer once, in order")


def _check_feed_forwards(teacher: TextConfig, student: TextConfig, layers: tuple[int, ...]) -> None:
    for i, source in enumerate(layers):
        kinds = (student.is_moe(i), teacher.is_moe(source))
        if kinds == (True, False):
            why = f"layer {i} of the student has experts, and layer {source} of the teacher, "
            why += "which it would be cut from, has none"
            sparse = [s for s in range(teacher.num_hidden_layers) if teacher.is_moe(s)]
            fix = "give the student experts (`moe_layers`) where the teacher has them: "
            fix += f"its layers {sparse}" if sparse else "in no layer"
            raise _refuse(why, fix)
        if kinds == (True, True):
            for name in ("num_local_experts", "intermediate_size", "num_experts_per_tok"):
                _require_smaller(teacher, student, name)
        elif kinds == (False, False):
            _require_smaller(teacher, student, "intermediate_size_mlp")


# No experts from a dense layer; positions or none as the teacher's layer; ends at the ends; experts
# or none alike; near to an even spread: each matters more than all that follow. (Held-out loss of
# two layers with positions, of eight: 2.65 from 0 and 5, 2.84 from 0 and 7, which has none.)
_Cost = tuple[int, int, int, int, float]


def _choose_layers(teacher: TextConfig, student: TextConfig) -> tuple[int, ...]:
    """The best rising choice of the teacher's layers, by dynamic programming over both depths."""
    ours, theirs = student.num_hidden_layers, teacher.num_hidden_layers
    best: dict[int, tuple[_Cost, tuple[int, ...]]] = {-1: ((0, 0, 0, 0, 0.0), ())}
    for i in range(ours):
        extended: dict[int, tuple[_Cost, tuple[int, ...]]] = {}
        for source in range(i, theirs - (ours - 1 - i)):
            cost = _layer_cost(teacher, student, i, source)
            paths = (
                (_sum(before, cost), (*chosen, source))
                for last, (before, chosen) in best.items()
                if last < source
            )
            extended[source] = min(paths)
        best = extended
    return min(best.values())[1]


def _layer_cost(teacher: TextConfig, student: TextConfig, i: int, source: int) -> _Cost:
    ours, theirs = student.num_hidden_layers, teacher.num_hidden_layers
    even = i * (theirs - 1) / (ours - 1) if ours > 1 else (theirs - 1) / 2
    is_end = ours > 1 and i in (0, ours - 1)
    has_no_experts = student.is_moe(i) and not teacher.is_moe(source)
    return (
        int(has_no_experts),
        int(student.uses_rope(i) != teacher.uses_rope(source)),
        int(is_end and source != even),
        int(student.is_moe(i) != teacher.is_moe(source)),
        (source - even) ** 2,
    )


def _sum(a: _Cost, b: _Cost) -> _Cost:
    return (a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3], a[4] + b[4])


def _width_lines(teacher: TextConfig, student: TextConfig) -> list[str]:
    ours, theirs = student.hidden_size, teacher.hidden_size
    lines = [f"width {ours} of {theirs}: the principal directions"] * (ours != theirs)
    ours, theirs = student.num_attention_heads, teacher.num_attention_heads
    ours_kv, theirs_kv = student.num_key_value_heads, teacher.num_key_value_heads
    if (ours, ours_kv) != (theirs, theirs_kv):
        line = f"heads {ours} of {theirs}, key/value heads {ours_kv} of {theirs_kv} by importance"
        lines.append(line)
    return lines


def _differences(teacher: TextConfig, student: TextConfig, layers: tuple[int, ...]) -> list[str]:
    """What the student computes otherwise with the same weights, and training has to mend."""
    lines = []
    for i, source in enumerate(layers):
        if student.uses_rope(i) != teacher.uses_rope(source):
            here, there = ("RoPE", "none") if student.uses_rope(i) else ("no RoPE", "RoPE")
            lines.append(f"layer {i} uses {here}, layer {source} of the teacher {there}")
    names = ("rope_theta", "rope_scaling", "full_rope", "use_qk_norm", "attention_chunk_size")
    for name in (*names, "attn_temperature_tuning", "scalable_softmax", "num_experts_per_tok"):
        ours, theirs = getattr(student, name), getattr(teacher, name)
        if ours != theirs:
            lines.append(f"`{name}` is {ours}, the teacher's {theirs}")
    return lines
